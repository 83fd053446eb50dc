"""Where results go: a folder, or a repo on the Hub. Nothing half-written is ever in the place where
it would be loaded.

A folder is filled as ``.NAME.hubdiff-partial`` beside it and renamed when it is whole. A journal in
it names the files that are finished; a run that was killed goes on after them, once it has hashed
them again. A repo gets its files one by one, large ones stored as soon as they are written, and one
commit at the end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from hubdiff.errors import DiskFull, OutputError, OutputExists
from hubdiff.files import LocalReader, safe_path
from hubdiff.hashing import hash_bytes, hash_reader
from hubdiff.manifest import FileRecord
from hubdiff.refs import ModelRef, PinnedRef

JOURNAL = ".hubdiff-journal.jsonl"


class OutputFile:
    """A file being written, of a size known beforehand. Threads may write different parts."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._size = path, size
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # open() honours the umask: a file of normal permissions, unlike a NamedTemporaryFile.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                _reserve(self._fd, size)
            except OSError:
                os.close(self._fd)
                raise

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        with disk_errors(self.path):
            write_all(self._fd, data, offset)

    def close(self) -> None:
        with disk_errors(self.path):
            os.fsync(self._fd)
            os.close(self._fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write at ``offset``, again until nothing is left: a disk nearly full takes a part only."""
    view = memoryview(data).cast("B")
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _reserve(fd: int, size: int) -> None:
    """Take the disk space now: a full disk is said before hours of work, not after them."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, size)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say a failed write in words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no room left for {path}",
                next_step="Free some space or choose another --output; run it again to go on.",
            ) from error
        raise OutputError(
            f"{path} can't be written: {error.strerror}",
            next_step="Check that the folder exists and that you may write there.",
        ) from error


@dataclass(frozen=True)
class Published:
    """Where a result is: ``where`` is the folder or repo, ``url`` the commit's page."""

    where: str
    url: str | None = None
    commit: str | None = None
    pr_url: str | None = None


@dataclass(frozen=True)
class Kind:
    """What is published. ``marker`` is the file that every repo of this kind has; ``owned`` are the
    globs of files that belong to it and go when a new version lacks them."""

    name: str
    marker: str
    owned: tuple[str, ...]


DELTA = Kind(
    "delta",
    "hubdiff.json",
    ("delta-*", "tail-*", "exact-*", "delta.safetensors.index.json", "tuned/*", "base/*"),
)
RESULT = Kind("result", "hubdiff-result.json", ("*.safetensors", "*.safetensors.index.json"))


class Sink(Protocol):
    """Takes the files of a result. Use as a context; without ``publish`` nothing appears."""

    staging: Path

    def done(self, path: str) -> FileRecord | None:
        """The record of a file that an earlier run finished, checked again; else None."""

    def open(self, path: str, size: int) -> OutputFile:
        """A file to write, inside ``staging``."""

    def finish(self, record: FileRecord) -> None:
        """The file is whole in ``staging``, closed, and has this content."""

    def put(self, path: str, data: bytes) -> FileRecord:
        """A small file, whole."""

    def copies_from(self, pin: PinnedRef) -> bool:
        """Whether ``copy`` can take files from that place without their bytes passing here."""

    def copy(self, path: str, pin: PinnedRef, source: str) -> None: ...

    def publish(self, message: str) -> Published:
        """Make all of it visible at once."""


@contextmanager
def open_sink(
    destination: ModelRef,
    kind: Kind,
    *,
    run: str | None = None,
    force: bool = False,
    private: bool = False,
    pr: bool = False,
) -> Iterator[Sink]:
    """The sink for a folder or a repo. ``run`` names work that may be resumed: what a killed run of
    the same name left finished is used. ``force`` replaces what stands there and is not of this
    kind. Raises ``OutputExists``."""
    if destination.path is not None:
        folder = FolderSink(destination.path, run or uuid.uuid4().hex, force=force)
        try:
            yield folder
        finally:
            if run is None:
                folder.discard()
        return
    assert destination.repo is not None
    with tempfile.TemporaryDirectory(prefix="hubdiff-") as staging:
        yield HubSink(destination, kind, Path(staging), force=force, private=private, pr=pr)


class FolderSink:
    """A folder that appears whole or not at all. ``run`` identifies what is being written:
    leftovers of another run are discarded."""

    def __init__(self, folder: Path, run: str, *, force: bool = False) -> None:
        self.folder = folder.absolute()
        self._force = force
        self._refuse_existing()
        self.staging = self.folder.parent / f".{self.folder.name}.hubdiff-partial"
        self._journal = self.staging / JOURNAL
        self._finished = self._resume(run)

    def _refuse_existing(self) -> None:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise OutputExists(
                f"{self.folder} exists and is not a folder", next_step="Choose another place."
            )
        if not self._force and self.folder.is_dir() and any(self.folder.iterdir()):
            raise OutputExists(
                f"{self.folder} exists and is not empty",
                next_step="Choose another place, or replace what is there with --force.",
            )

    def _resume(self, run: str) -> dict[str, FileRecord]:
        """What a killed run of the same name left finished."""
        head = json.dumps({"run": run})
        lines = self._journal.read_text().splitlines() if self._journal.is_file() else []
        if not lines or lines[0] != head:
            with disk_errors(self.staging):
                shutil.rmtree(self.staging, ignore_errors=True)
                self.staging.mkdir(parents=True)
            self._log(head)
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

    def put(self, path: str, data: bytes) -> FileRecord:
        output = self.open(path, len(data))
        output.write_at(0, data)
        output.close()
        record = FileRecord(path, len(data), hash_bytes(data))
        self.finish(record)
        return record

    def copies_from(self, pin: PinnedRef) -> bool:
        return False

    def copy(self, path: str, pin: PinnedRef, source: str) -> None:
        raise NotImplementedError("a folder takes bytes")

    def publish(self, message: str) -> Published:
        """Give the folder its name. Everything in it is on the disk by now."""
        with disk_errors(self.folder):
            self._journal.unlink()
            _sync_folders(self.staging)
            if self.folder.exists():
                self._replace()
            else:
                os.rename(self.staging, self.folder)
            _sync(self.folder.parent)
        return Published(str(self.folder))

    def _replace(self) -> None:
        old = self.folder.parent / f".{self.folder.name}.hubdiff-old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(self.folder, old)
        os.rename(self.staging, self.folder)
        shutil.rmtree(old)

    def discard(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)


class HubSink:
    """A commit, or a pull request, on the Hub. Files are stored on the Hub one by one and deleted
    here; the repo changes at ``publish`` only."""

    def __init__(
        self,
        destination: ModelRef,
        kind: Kind,
        staging: Path,
        *,
        force: bool,
        private: bool,
        pr: bool,
    ) -> None:
        from hubdiff.hub import HubUpload, require_token

        require_token()
        assert destination.repo is not None
        self.staging = staging
        self._kind = kind
        self._upload = HubUpload(
            destination.repo, revision=destination.revision, private=private, create_pr=pr
        )
        self._existing = self._upload.existing_files()
        self._paths: set[str] = set()
        if not (force or pr):
            self._refuse_other_kind(destination)

    def _refuse_other_kind(self, destination: ModelRef) -> None:
        """Don't let a mistyped name replace somebody's model."""
        weights = [path for path in self._existing if path.endswith((".safetensors", ".bin"))]
        if weights and self._kind.marker not in self._existing:
            raise OutputExists(
                f"{destination} holds {weights[0]} and is not a {self._kind.name} that hubdiff "
                "made",
                next_step="Choose another repo, open a pull request with --pr, or replace it with "
                "--force.",
            )

    def done(self, path: str) -> FileRecord | None:
        return None

    def open(self, path: str, size: int) -> OutputFile:
        return OutputFile(self.staging / safe_path(path), size)

    def finish(self, record: FileRecord) -> None:
        local = self.staging / record.path
        self._upload.add(record.path, local)
        self._paths.add(record.path)
        local.unlink()

    def put(self, path: str, data: bytes) -> FileRecord:
        self._upload.add_bytes(path, data)
        self._paths.add(path)
        return FileRecord(path, len(data), hash_bytes(data))

    def copies_from(self, pin: PinnedRef) -> bool:
        return pin.repo is not None

    def copy(self, path: str, pin: PinnedRef, source: str) -> None:
        self._upload.copy(path, pin, source)
        self._paths.add(path)

    def publish(self, message: str) -> Published:
        """Commit. What an earlier version had and this one lacks is deleted in the same commit, so
        that the repo never holds a mixture."""
        for path in self._existing:
            owned = any(fnmatchcase(path, glob) for glob in self._kind.owned)
            if owned and path not in self._paths:
                self._upload.delete(path)
        done = self._upload.commit(message)
        return Published(self._upload.repo, done.url, done.oid, done.pr_url)


class Nowhere:
    """A sink that keeps nothing: the work is done for its checks alone."""

    staging = Path(os.devnull)

    def done(self, path: str) -> FileRecord | None:
        return None

    def open(self, path: str, size: int) -> OutputFile:
        return _Discarded()

    def finish(self, record: FileRecord) -> None:
        pass

    def put(self, path: str, data: bytes) -> FileRecord:
        return FileRecord(path, len(data), hash_bytes(data))

    def copies_from(self, pin: PinnedRef) -> bool:
        return False

    def copy(self, path: str, pin: PinnedRef, source: str) -> None:
        raise NotImplementedError("nothing is copied to nowhere")

    def publish(self, message: str) -> Published:
        return Published("nowhere")


class _Discarded(OutputFile):
    def __init__(self) -> None:
        pass

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        pass

    def close(self) -> None:
        pass


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync(Path(folder))


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
