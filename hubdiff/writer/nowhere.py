"""No place at all: for work that is done for its checks alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hubdiff.hashing import hash_bytes
from hubdiff.manifest import FileRecord, WrittenFile
from hubdiff.refs import PinnedRef
from hubdiff.writer.output import OutputFile
from hubdiff.writer.sink import Published


class Nowhere:
    """A sink that keeps nothing: the work is done for its checks alone."""

    staging = Path(os.devnull)

    def done(self, path: str) -> WrittenFile | None:
        return None

    def open(self, path: str, size: int) -> OutputFile:
        return _Discarded()

    def finish(self, record: WrittenFile) -> None:
        pass

    def put(self, path: str, data: bytes) -> FileRecord:
        return FileRecord(path, len(data), hash_bytes(data))

    def copy(self, path: str, pin: PinnedRef, source: str) -> bool:
        return False  # the bytes are what is checked

    def deposit(self) -> list[dict[str, Any]]:
        return []

    def accept(self, deposit: list[dict[str, Any]]) -> None:
        pass

    def publish(self, message: str) -> Published:
        return Published("nowhere")


class _Discarded(OutputFile):
    def __init__(self) -> None:
        pass

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        pass

    def close(self) -> None:
        pass
