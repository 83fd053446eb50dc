"""A folder that appears whole or not at all, and can be resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path

from hubdiff.errors import OutputError
from hubdiff.files import LocalReader, safe_path
from hubdiff.hashing import hash_bytes, hash_reader
from hubdiff.manifest import FileRecord
from hubdiff.refs import PinnedRef
from hubdiff.writer.output import OutputFile, disk_errors
from hubdiff.writer.place import refuse_place
from hubdiff.writer.sink import Published

JOURNAL = ".hubdiff-journal.jsonl"


class FolderSink:
    """A folder that appears whole or not at all. ``run`` identifies what is being written:
    leftovers of another run are discarded. ``reads`` are folders that no ``force`` may replace. Use
    it inside ``only_run``."""

    def __init__(
        self, folder: Path, run: str, reads: Sequence[Path] = (), *, force: bool = False
    ) -> None:
        self.folder = folder.absolute()
        self._reads, self._force = reads, force
        self._refuse_place()
        self.staging = self.folder.parent / f".{self.folder.name}.hubdiff-partial"
        self._journal = self.staging / JOURNAL
        with disk_errors(self.staging):
            self._finished = self._resume(run)

    def _refuse_place(self) -> None:
        refuse_place(self.folder, self._reads, force=self._force)

    def _resume(self, run: str) -> dict[str, FileRecord]:
        """What a killed run of the same name left finished."""
        head = json.dumps({"run": run})
        text = self._journal.read_text(errors="replace") if self._journal.is_file() else ""
        lines = text.splitlines()
        if not lines or lines[0] != head:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
            try:
                self._log(head)
            except OutputError:
                self.discard()
                raise
            return {}
        finished = {}
        for line in lines[1:]:
            # The last line may be cut short by the kill.
            with suppress(json.JSONDecodeError, TypeError):
                record = FileRecord(**json.loads(line))
                finished[record.path] = record
        return finished

    def _log(self, line: str) -> None:
        with disk_errors(self._journal), self._journal.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def done(self, path: str) -> FileRecord | None:
        record = self._finished.get(path)
        if record is None:
            return None
        file = self.staging / safe_path(path)
        if not file.is_file() or file.stat().st_size != record.size:
            return None
        with closing(LocalReader(file)) as reader:
            return record if hash_reader(reader) == record.sha256 else None

    def open(self, path: str, size: int) -> OutputFile:
        return OutputFile(self.staging / safe_path(path), size)

    def finish(self, record: FileRecord) -> None:
        self._log(json.dumps(asdict(record)))
        self._finished[record.path] = record

    def put(self, path: str, data: bytes) -> FileRecord:
        output = self.open(path, len(data))
        output.write_at(0, data)
        output.close()
        record = FileRecord(path, len(data), hash_bytes(data))
        self.finish(record)
        return record

    def copy(self, path: str, pin: PinnedRef, source: str) -> bool:
        return False  # a folder takes bytes

    def publish(self, message: str) -> Published:
        """Give the folder its name. Everything in it is on the disk by now."""
        self._refuse_place()  # again: hours may have passed
        self._check_whole()
        with disk_errors(self.folder):
            self._journal.unlink()
            _sync_folders(self.staging)
            if self.folder.exists():
                self._replace()
            else:
                os.rename(self.staging, self.folder)
            _sync(self.folder.parent)
        return Published(str(self.folder))

    def _check_whole(self) -> None:
        for record in self._finished.values():
            file = self.staging / safe_path(record.path)
            with disk_errors(file):
                size = file.stat().st_size
            if size != record.size:
                raise OutputError(
                    f"{file} has {size} bytes, {record.size} were written: something else changed "
                    "it",
                    next_step="See that nothing else writes there and run it again.",
                )

    def _replace(self) -> None:
        old = self.folder.parent / f".{self.folder.name}.hubdiff-old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(self.folder, old)
        os.rename(self.staging, self.folder)
        shutil.rmtree(old)

    def discard(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync(Path(folder))


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
