"""A model or a delta as a tree of files, on disk or on the Hub, behind one interface.

``FileTree`` lists files and opens them for random access; ``LocalTree`` is a folder. The Hub's
tree lives in ``hub``, the one place that talks to the network. Every path a tree lists went through
``safe_path``. Nothing here knows tensors.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
from typing import Protocol

from hubdiff.errors import CheckpointError, RefError, UnsafePath
from hubdiff.refs import ModelRef, PinnedRef

# A file read whole sits in memory: a card, a config, a tokenizer (the largest have 35 MB).
MAX_WHOLE_FILE = 256 << 20

# What git, the Hub client and Python leave in a model's folder; no part of the model.
_SKIPPED_FOLDERS = {".git", ".cache", "__pycache__"}

# What a run of hubdiff leaves beside its output while it works, or after it was killed.
_LEFTOVERS = (".*.hubdiff-partial", ".*.hubdiff-old", ".*.hubdiff-lock")

# A folder with one of these is a delta or a result: of its own, where it lies inside a model.
_DELTA, _RESULT = "hubdiff.json", "hubdiff-result.json"


@dataclass(frozen=True)
class FileInfo:
    """One file of a tree: its path inside the tree, its size in bytes, and its sha256 (hex) when
    the place it lives in lists one (the Hub does for large files, a folder does not). ``git_id`` is
    what the Hub lists for the others: the id of git's blob, a sha1."""

    path: str
    size: int
    sha256: str | None = None
    git_id: str | None = field(default=None, compare=False)


class ByteReader(Protocol):
    """Random access to one file. Safe to call from several threads at once."""

    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``; a short file is an error, never a short
        answer."""

    def close(self) -> None: ...


class FileTree(Protocol):
    """A pinned set of files."""

    pin: PinnedRef

    def files(self) -> dict[str, FileInfo]:
        """Every file by path. Asked once, remembered."""

    def open(self, path: str) -> AbstractContextManager[ByteReader]: ...

    def read_bytes(self, path: str) -> bytes:
        """A small file, whole."""

    def is_remote(self, path: str) -> bool:
        """Whether reading this file costs network traffic, or did when this tree fetched it."""


def open_tree(ref: ModelRef, *, cache: bool = False) -> FileTree:
    """Pin a ref and list its files. ``cache`` lets a Hub repo fill the local Hub cache; without it
    the cache is used but never added to. Raises ``RefError`` or ``HubError``."""
    if ref.path is not None:
        return LocalTree(ref)
    from hubdiff.hub import HubTree

    return HubTree(ref, cache=cache)


def safe_path(path: str) -> str:
    """The path itself when joining it to a folder stays inside that folder on every system; else
    ``UnsafePath``. Paths come from listings and manifests that strangers wrote."""
    parts = path.split("/")
    windows = PureWindowsPath(path)
    if (
        any(part in ("", ".", "..") for part in parts)
        # Git tracks no such name, and a hook written there would run.
        or any(part.lower() == ".git" for part in parts)
        or "\\" in path
        or windows.drive
        or windows.root
        or any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in path)
    ):
        raise UnsafePath(
            f"{path!r} is no safe file name: it could be written outside its folder",
            next_step="Do not use this repo; tell its owner if the name looks like a mistake.",
        )
    return path


class LocalTree:
    """A folder. Links to files are followed (a snapshot in the Hub cache is made of them), links to
    folders are not. Deltas and results inside a model's folder are no part of it."""

    def __init__(self, ref: ModelRef) -> None:
        if ref.path is None or not ref.path.is_dir():
            raise RefError(
                f"there is no folder {ref}",
                next_step='Check the path; a repo on the Hub is written "org/name".',
            )
        self.pin = PinnedRef.folder(ref)
        self._root = ref.path
        self._files: dict[str, FileInfo] | None = None

    def files(self) -> dict[str, FileInfo]:
        if self._files is None:
            self._files = {info.path: info for info in _walk(self._root)}
        return self._files

    def open(self, path: str) -> AbstractContextManager[LocalReader]:
        return closing(LocalReader(self._root / safe_path(path)))

    def read_bytes(self, path: str) -> bytes:
        with self.open(path) as reader:
            return read_whole(reader, path)

    def is_remote(self, path: str) -> bool:
        return False


class LocalReader:
    """One open file, read by position: threads share it without a lock."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"{path} can't be read: {error.strerror}",
                next_step="Check that the file exists and that you may read it.",
            ) from error
        self._path = path
        self.size = os.fstat(self._fd).st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        while len(view):
            count = os.preadv(self._fd, [view], offset)
            if count == 0:
                raise CheckpointError(
                    f"{self._path} ends at byte {offset}, {len(view)} bytes too early",
                    next_step="The file is cut short: fetch it again.",
                )
            view, offset = view[count:], offset + count

    def forget(self, offset: int, size: int) -> None:
        """Let the system drop what it caches of these bytes."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._fd)


class BytesReader:
    """A file that is in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.size = len(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        if offset + len(view) > self.size:
            raise CheckpointError(
                f"bytes {offset} to {offset + len(view)} of a file that has {self.size}",
                next_step="The file is cut short: fetch it again.",
            )
        view[:] = self._data[offset : offset + len(view)]

    def close(self) -> None:
        pass


def read_whole(reader: ByteReader, path: str) -> bytes:
    """Every byte of a file that is meant to be small. ``path`` is for the message."""
    if reader.size > MAX_WHOLE_FILE:
        raise CheckpointError(
            f"{path} has {reader.size} bytes; a file of its kind has at most {MAX_WHOLE_FILE}",
            next_step="Check that the repo is what you think it is.",
        )
    data = bytearray(reader.size)
    reader.read_into(0, memoryview(data))
    return bytes(data)


def _walk(root: Path) -> Iterator[FileInfo]:
    is_delta = (root / _DELTA).is_file()
    for folder, subfolders, names in os.walk(root):
        inner = Path(folder) != root and not is_delta
        if inner and (_DELTA in names or _RESULT in names):
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not _is_noise(name))
        for name in sorted(names):
            if _is_leftover(name):
                continue
            full = Path(folder, name)
            try:
                status = full.stat()
            except OSError as error:
                raise CheckpointError(
                    f"{full} can't be read: {error.strerror}",
                    next_step="Remove it if it is a link to a file that is gone, or fetch it "
                    "again.",
                ) from error
            if stat.S_ISREG(status.st_mode):
                path = safe_path(full.relative_to(root).as_posix())
                yield FileInfo(path=path, size=status.st_size)


def _is_noise(folder: str) -> bool:
    return folder in _SKIPPED_FOLDERS or _is_leftover(folder)


def _is_leftover(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _LEFTOVERS)
