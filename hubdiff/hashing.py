"""Hashes of streams: sha256 for whole files (what the Hub lists), blake3 for tensors and payloads,
and for files of which no sha256 is known.

sha256 costs as much as all the rest of the work together, so each file's runs on a lane of its own
while blocks are computed; a lane is never more than one block behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

from blake3 import blake3

from hubdiff.checkpoint import Checkpoint
from hubdiff.errors import IntegrityError
from hubdiff.files import ByteReader
from hubdiff.manifest import FileRecord, MadeFile, WrittenFile
from hubdiff.stream import Range, blocks, read_ranges

_PIECE = 4 << 20


class Hasher(Protocol):
    """What hashlib and blake3 have in common."""

    def update(self, data: bytes | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


class Lane:
    """One thread that hashes in the order it is fed, one block behind at most."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hubdiff-hash")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def feed(self, stream: StreamHash, offset: int, data: bytes | memoryview) -> None:
        self._pending.append(self._pool.submit(stream.update, offset, data))

    def catch_up(self) -> None:
        for future in self._pending:
            future.result()
        self._pending.clear()


class StreamHash:
    """The hash of a file that is fed in pieces, sha256 unless another ``hasher`` is given. Pieces
    that don't follow each other leave it incomplete, which ``digest`` says with None."""

    def __init__(self, size: int, hasher: Hasher | None = None) -> None:
        self._size = size
        self._position = 0
        self._hash = hasher or hashlib.sha256()

    def update(self, offset: int, data: bytes | memoryview) -> None:
        if offset == self._position:
            self._hash.update(data)
            self._position += len(data)

    def digest(self) -> str | None:
        return self._hash.hexdigest() if self._position == self._size else None


class ResultHash(StreamHash):
    """The hash of a file of a result: ``sha256`` where it is known and must come out, else
    blake3."""

    def __init__(self, path: str, size: int, sha256: str | None) -> None:
        super().__init__(size, None if sha256 else blake3())
        self._path, self._sha256 = path, sha256

    def record(self, where: str) -> WrittenFile:
        """The file by content. Raises ``IntegrityError`` where it is not the known one."""
        digest = self.digest() or ""
        if self._sha256 is None:
            return MadeFile(self._path, self._size, digest)
        check_hash(digest, self._sha256, where)
        return FileRecord(self._path, self._size, digest)


class FileHashes:
    """The sha256 of a checkpoint's shards from the ranges that the work reads anyway."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._streams: dict[str, StreamHash] = {}

    def stream(self, file: str) -> StreamHash:
        if file not in self._streams:
            header = self._checkpoint.shards[file]
            self._streams[file] = StreamHash(header.file_size)
            self._streams[file].update(0, header.raw)
        return self._streams[file]

    def whole(self) -> dict[str, str]:
        """The sha256 of the files that were read whole and in order."""
        found = {file: stream.digest() for file, stream in self._streams.items()}
        return {file: digest for file, digest in found.items() if digest}

    def check(self, file: str, tensor_hashes: Mapping[str, str]) -> FileRecord:
        """One shard by content. One that was not read in order, or not whole, is read once more.
        Raises ``IntegrityError`` where a hash is not the listed one."""
        return self.record(file, self.stream(file).digest() or self.read(file, tensor_hashes))

    def record(self, file: str, digest: str) -> FileRecord:
        """A shard of that sha256, compared with the listed one."""
        info = self._checkpoint.tree.files()[file]
        check_hash(digest, info.sha256, self._checkpoint.where(file))
        return FileRecord(file, info.size, digest)

    def read(self, file: str, tensor_hashes: Mapping[str, str]) -> str:
        """The sha256 of a shard, read for it alone; its tensors must have the hashes (blake3 by
        name) they had when they were read for the work."""
        header = self._checkpoint.shards[file]
        whole = hashlib.sha256(header.raw)
        tensor = tensor_hash()
        for block in blocks(file, header):
            ranges = {s: Range(file, s.begin, s.begin + s.nbytes) for s in block.spans}
            views = read_ranges(self._checkpoint, ranges.values())
            for span, piece in ranges.items():
                whole.update(views[piece])
                tensor.update(views[piece])
                if span.last:
                    name = span.entry.name
                    where = f"{self._checkpoint.where(file)}, tensor {name}"
                    check_hash(tensor.hexdigest(), tensor_hashes.get(name), where)
                    tensor = tensor_hash()
        return whole.hexdigest()


def check_hash(actual: str, expected: str | None, where: str) -> None:
    """Raise ``IntegrityError`` unless the hash is the expected one, or none is known."""
    if expected is not None and actual != expected:
        raise IntegrityError(
            f"{where}: the bytes read have the hash {actual[:16]}…, expected {expected[:16]}…",
            next_step="Run it again; if it happens again, the stored file is damaged.",
        )


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_reader(reader: ByteReader, hasher: Hasher | None = None) -> str:
    """The hash of an open file, sha256 unless another ``hasher`` is given."""
    digest = hasher or hashlib.sha256()
    buffer = memoryview(bytearray(min(_PIECE, max(reader.size, 1))))
    for offset in range(0, reader.size, _PIECE):
        view = buffer[: min(_PIECE, reader.size - offset)]
        reader.read_into(offset, view)
        digest.update(view)
    return digest.hexdigest()


def tensor_hash() -> blake3:
    return blake3()
