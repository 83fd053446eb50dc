"""How much memory this process keeps. What the first and the last function set holds for the whole
process, so they are the command line's to call, not the library's."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable

# Parameters of glibc's mallopt(3), and the largest threshold that it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 32 << 20
_MOST_KEPT = 256 << 20
_FEW_COLLECTIONS = 100_000  # new objects before the next one; Python's own are 700 to 10,000


def seldom_collect_garbage() -> None:
    """Start-up makes objects by the hundred thousand, which live as long as the process, and the
    work makes hardly any that refer to each other. Looking through all of them again and again for
    garbage took a tenth of the time of a short ``apply``."""
    gc.set_threshold(_FEW_COLLECTIONS)


def leave_garbage() -> None:
    """Let the process end without a last search for garbage, which takes longer than all else that
    is left to do: a tenth of the time of a ``push-delta`` of two gigabytes. The system takes
    everything back; exit handlers still run."""
    gc.freeze()


def keep_freed_memory() -> None:
    """Let freed arrays be used again at once, by any thread that begins later. A run makes and
    drops arrays of some megabytes by the thousand; glibc gives each back to the system, and its
    pages then come back one fault at a time, zeroed and cold: a fifth of the time of ``apply``. And
    it keeps what a thread freed in an arena that other threads mostly don't use: an eighth of the
    peak of a ``push-delta`` from folders, more than a quarter of one from the Hub (452 MB instead
    of 319 with models of 0.9 GB). Elsewhere than on glibc nothing happens."""
    mallopt = _glibc("mallopt")
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
        mallopt(_M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """The opposite, once: before something else begins that needs memory of its own."""
    trim = _glibc("malloc_trim")
    if trim:
        trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
    return function


def fits_in_cache(nbytes: int) -> bool:
    """Whether files of so many bytes, read and written, may stay in the system's cache. A stream
    that is larger pushes out what it is about to read itself, and everybody else's files."""
    try:
        return nbytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # not on every system
        return True


def upload_in_small_blocks() -> None:
    """Let the Hub's uploader read files a megabyte at a time, unless the user chose a size. With
    the 8 MB of its own it holds a gigabyte by the end of a file of two, and is slower. It reads
    this when it is first used."""
    os.environ.setdefault("HF_XET_DATA_INGESTION_BLOCK_SIZE", "1mb")
