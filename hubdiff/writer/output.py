"""A file being written, and disk errors in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubdiff.errors import DiskFull, OutputError


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
            begin_writeback(self._fd, offset, len(data))

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


def begin_writeback(fd: int, offset: int, size: int) -> None:
    """Let the disk begin now with what was written, while there is other work, so that the fsync at
    the end has little to wait for: a tenth of the time of apply. Nothing is waited for here."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


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


def require_place(file: Path) -> None:
    """Raise ``OutputError`` where ``file`` can't be written: now, and not after the work for it."""
    if file.is_dir() or not file.parent.is_dir():
        what = "is a folder" if file.is_dir() else f"can't be written: there is no {file.parent}"
        raise OutputError(f"{file} {what}", next_step="Give the path of a file in a folder.")


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


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that under its name there is the old one or all of the new one. A link
    that stands there is replaced, not followed."""
    part = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        part.unlink(missing_ok=True)
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)  # a full disk leaves nothing behind
