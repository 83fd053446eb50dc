"""Large objects on disk, named by their sha256. An object is there whole and checked, or not."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .refusal import bad_request

SHA256 = re.compile(r"[0-9a-f]{64}")
READ_BYTES = 1 << 20


class Objects:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "objects"
        self._temporary = folder / "tmp"
        for place in (self._folder, self._temporary):
            place.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256[2:4] / sha256

    def has(self, sha256: str) -> bool:
        return SHA256.fullmatch(sha256) is not None and self.path(sha256).is_file()

    def size(self, sha256: str) -> int:
        return self.path(sha256).stat().st_size

    def temporary_file(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self._temporary)
        os.close(handle)
        return Path(name)

    def write(self, pieces: Iterable[bytes], expected: str | None) -> tuple[str, int]:
        """Store what ``pieces`` yields and say its sha256 and size; refuse any other sha256."""
        temporary, digest, size = self.temporary_file(), hashlib.sha256(), 0
        try:
            with temporary.open("wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    size += file.write(piece)
            sha256 = digest.hexdigest()
            if expected is not None and sha256 != expected:
                raise bad_request(f"sha256 mismatch: {expected} announced, {sha256} received")
            self.path(sha256).parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(self.path(sha256))
        finally:
            temporary.unlink(missing_ok=True)
        return sha256, size


def pieces_of(*paths: Path) -> Iterable[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(READ_BYTES):
                yield piece
