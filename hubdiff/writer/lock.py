"""One run at a time per output folder.

Of a run of several ranks, rank 0 holds the folder's lock and each other rank its own journal's, so
that one which outlives rank 0 keeps the next run out too.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubdiff.errors import OutputExists
from hubdiff.writer.output import disk_errors

_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold ``.NAME.hubdiff-lock`` beside ``folder``. Raises ``OutputExists`` while another run
    does. The system lets go of the lock of a run that was killed."""
    path = folder.parent / f".{folder.name}.hubdiff-lock"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock(path, folder)
    try:
        yield
    finally:
        # While the lock is held: later it might be the file of the next run.
        path.unlink(missing_ok=True)
        os.close(fd)


def lock_journal(journal: Path, folder: Path) -> int:
    """Lock the journal of a rank until the descriptor is closed. Raises ``OutputExists`` while a
    rank of another run holds it."""
    with disk_errors(journal):
        fd = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(fd, folder)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(path: Path, folder: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(fd, folder)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _take(fd: int, folder: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputExists(
            f"another run is writing {folder}",
            next_step="Wait until it is done, or choose another place.",
        ) from error
    except OSError as error:
        # Some network disks have no locks. What is published is compared with the journal anyhow.
        if error.errno not in _NO_LOCKS_HERE:
            raise


def _is_at(fd: int, path: Path) -> bool:
    """Whether the file is still there: the run before deletes it as it ends."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
