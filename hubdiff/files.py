"""A model or a delta as a tree of files, on disk or on the Hub, behind one interface.

``FileTree`` lists files and opens them for random access; ``LocalTree`` is a folder. The Hub's
tree lives in ``hub.py``, the one module that talks to the network. Nothing here knows tensors.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hubdiff.errors import CheckpointError
from hubdiff.refs import PinnedRef


@dataclass(frozen=True)
class FileInfo:
    """One file of a tree: its path inside the tree, its size in bytes, and its sha256 (hex) when
    the place it lives in lists one (the Hub does for large files, a folder does not)."""

    path: str
    size: int
    sha256: str | None = None


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
        """Whether reading this file costs network traffic."""
