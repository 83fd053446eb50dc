"""A folder that appears whole or not at all, and can be resumed.

Ranks on machines that share a file system fill it together: rank 0 makes the staging folder and
publishes it, each rank keeps a journal of its own there, and a resumed run reads them all, however
many ranks it has.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hubdiff.errors import OutputError
from hubdiff.files import LocalReader, safe_path
from hubdiff.hashing import hash_bytes, hash_reader, tensor_hash
from hubdiff.manifest import FileRecord, MadeFile, WrittenFile, written_file
from hubdiff.refs import PinnedRef
from hubdiff.writer.lock import lock_journal
from hubdiff.writer.output import OutputFile, disk_errors
from hubdiff.writer.place import refuse_place
from hubdiff.writer.sink import Published

JOURNAL = ".hubdiff-journal.jsonl"
# Network disks show what another machine wrote a little later.
VISIBLE_SECONDS = 10.0


class FolderSink:
    """A folder that appears whole or not at all. ``run`` identifies what is being written:
    leftovers of another run are discarded. ``reads`` are folders that no ``force`` may replace. Use
    it inside ``only_run``."""

    def __init__(
        self, folder: Path, run: str, reads: Sequence[Path] = (), *, force: bool = False
    ) -> None:
        self._place(folder)
        self._reads, self._force = reads, force
        self._refuse_place()
        with disk_errors(self.staging):
            self._finished = self._resume(run)

    def _place(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.staging = self.folder.parent / f".{self.folder.name}.hubdiff-partial"
        self._journal = self.staging / JOURNAL

    def _refuse_place(self) -> None:
        refuse_place(self.folder, self._reads, force=self._force)

    def _resume(self, run: str) -> dict[str, WrittenFile]:
        """What a killed run of the same name left finished."""
        self._refuse_ranks()
        head = json.dumps({"run": run})
        if _head(self._journal) != head:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
            try:
                self._log(head)
            except OutputError:
                self.discard()
                raise
        return self._read_journals()

    def _refuse_ranks(self) -> None:
        """Raise ``OutputExists`` while ranks of an earlier run still write here."""
        for journal in self._journals():
            os.close(lock_journal(journal, self.folder))

    def _journals(self) -> list[Path]:
        return sorted(self.staging.glob(f"{JOURNAL}*"))

    def _read_journals(self) -> dict[str, WrittenFile]:
        finished = {}
        for journal in self._journals():
            for line in journal.read_text(errors="replace").splitlines():
                # The last line may be cut short by the kill; some lines are no records.
                with suppress(json.JSONDecodeError, TypeError):
                    record = written_file(json.loads(line))
                    finished[record.path] = record
        return finished

    def _log(self, line: str) -> None:
        with disk_errors(self._journal), self._journal.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def done(self, path: str) -> WrittenFile | None:
        record = self._finished.get(path)
        if record is None:
            return None
        file = self.staging / safe_path(path)
        if not file.is_file() or file.stat().st_size != record.size:
            return None
        with closing(LocalReader(file)) as reader:
            if isinstance(record, MadeFile):
                same = hash_reader(reader, tensor_hash()) == record.blake3
            else:
                same = hash_reader(reader) == record.sha256
        return record if same else None

    def open(self, path: str, size: int) -> OutputFile:
        return OutputFile(self.staging / safe_path(path), size)

    def finish(self, record: WrittenFile) -> None:
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

    @property
    def resumed(self) -> bool:
        """Whether anything here is finished."""
        return bool(self._finished)

    def invite(self) -> str:
        """A word for the other ranks to find in the staging folder."""
        word = uuid.uuid4().hex
        self._log(json.dumps({"invited": word}))
        return word

    def deposit(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self._finished.values()]

    def accept(self, deposit: list[dict[str, Any]]) -> None:
        self._finished |= {entry["path"]: written_file(entry) for entry in deposit}

    def publish(self, message: str) -> Published:
        """Give the folder its name. Everything in it is on the disk by now."""
        self._refuse_place()  # again: hours may have passed
        self._check_whole()
        with disk_errors(self.folder):
            for journal in self._journals():
                journal.unlink()
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


class FolderShare(FolderSink):
    """Another rank's part of the folder that rank 0's ``FolderSink`` fills. Raises ``OutputError``
    where the word that rank 0 left there is not to be seen."""

    def __init__(self, folder: Path, rank: int, word: str) -> None:
        self._place(folder)
        self._find(word, rank)
        self._finished = self._read_journals()
        self._journal = self.staging / f"{JOURNAL}.{rank}"
        self._lock: int | None = lock_journal(self._journal, self.folder)

    def _find(self, word: str, rank: int) -> None:
        until = time.monotonic() + VISIBLE_SECONDS
        while not self._journal.is_file() or word not in self._journal.read_text(errors="replace"):
            if time.monotonic() > until:
                raise OutputError(
                    f"rank {rank} on {platform.node()} does not see {self.staging}, which rank 0 "
                    "made: the folder is not the same for all ranks",
                    next_step="Choose a folder on a file system that all machines share, by its "
                    "full path; without one, publish to the Hub (apply: --push-to REPO).",
                )
            time.sleep(0.1)

    def deposit(self) -> list[dict[str, Any]]:
        self.close()  # rank 0 removes the journals when it has all deposits
        return super().deposit()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _head(journal: Path) -> str | None:
    """The first line, which names the run."""
    if not journal.is_file():
        return None
    with journal.open(errors="replace") as file:
        return file.readline().rstrip("\n")


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync(Path(folder))


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
