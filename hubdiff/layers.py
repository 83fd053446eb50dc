"""Writing the layer files of a delta: ``delta-*``, ``tail-*`` and ``exact-*.safetensors``.

Payloads arrive segment by segment and their sizes are not known before the last one, while a
safetensors header stands first. So the bodies are spooled to a file and each layer file is then
written once, header first, hashed on the way.

Layer files end where the tuned model's files end: each of those is compared alone, so that several
processes can share them and the bytes don't depend on how many there are. Their numbers are known
when all are written, and until then they have names of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from hubdiff.encodings import SEGMENT
from hubdiff.encodings.payload import index_bytes, write_index
from hubdiff.hashing import Lane, StreamHash, tensor_hash
from hubdiff.manifest import FileRecord, Part
from hubdiff.safetensors_io import build_header
from hubdiff.stream import unit_bytes
from hubdiff.writer import begin_writeback, disk_errors, write_all

# What the Hub and its clients handle well in one file.
SHARD_BYTES = 4 << 30
_COPY = 4 << 20


@dataclass(frozen=True)
class _Stored:
    """One tensor in the spool."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class LayerFile:
    """A layer file without its number: ``record.path`` is the name it has until then, ``tensors``
    are those in it."""

    record: FileRecord
    tensors: tuple[str, ...]


def number(group: str, files: Sequence[LayerFile]) -> list[str]:
    """The names of all files of a group, in the order of the tensors in them."""
    count = len(files)
    return [f"{group}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


class LayerWriter:
    """The files of one group for one file of the tuned model, the ``source``-th. Payloads are
    opened one at a time; ``finish`` writes the files."""

    def __init__(self, folder: Path, group: str, source: int) -> None:
        self._folder, self._group, self._source = folder, group, source
        spool = folder / f".{group}-{source}.spool"
        with disk_errors(spool):
            self._spool = spool.open("w+b", buffering=0)
        self._stored: list[_Stored] = []
        self._end = 0

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._spool.close()
        Path(self._spool.name).unlink(missing_ok=True)

    def payload(self, name: str, count: int, part: Part) -> PayloadWriter:
        return PayloadWriter(self, name, count, part)

    def dense(self, name: str, shape: tuple[int, ...], part: Part) -> DenseWriter:
        return DenseWriter(self, name, shape, part)

    def append(self, data: bytes | memoryview) -> int:
        """Write at the end; the position it went to."""
        position = self._end
        self.write_at(position, data)
        self._end += len(data)
        return position

    def write_at(self, position: int, data: bytes | memoryview) -> None:
        with disk_errors(Path(self._spool.name)):
            write_all(self._spool.fileno(), data, position)

    def store(self, name: str, dtype: str, shape: tuple[int, ...], begin: int) -> str:
        """The bytes from ``begin`` to the end are this tensor; their blake3."""
        self._stored.append(_Stored(name, dtype, shape, begin, self._end - begin))
        digest = tensor_hash()
        for piece in self._pieces(begin, self._end):
            digest.update(piece)
        return digest.hexdigest()

    def finish(self) -> tuple[LayerFile, ...]:
        """Write the files."""
        return tuple(
            LayerFile(
                self._write(f".{self._group}-{self._source}-{i}.part", stored),
                tuple(tensor.name for tensor in stored),
            )
            for i, stored in enumerate(self._cut())
        )

    def _cut(self) -> Iterator[list[_Stored]]:
        shard: list[_Stored] = []
        for stored in self._stored:
            if shard and stored.begin + stored.nbytes - shard[0].begin > SHARD_BYTES:
                yield shard
                shard = []
            shard.append(stored)
        if shard:
            yield shard

    def _write(self, name: str, shard: list[_Stored]) -> FileRecord:
        header = build_header(
            ((s.name, s.dtype, s.shape, s.nbytes) for s in shard),
            {"format": "hubdiff", "layer": self._group},
        )
        body = sum(stored.nbytes for stored in shard)
        digest, size = StreamHash(len(header) + body), len(header)
        digest.update(0, header)
        path = self._folder / name
        with disk_errors(path), path.open("wb", buffering=0) as file, Lane() as lane:
            write_all(file.fileno(), header, 0)
            for piece in self._pieces(shard[0].begin, shard[0].begin + body):
                lane.catch_up()
                lane.feed(digest, size, piece)
                write_all(file.fileno(), piece, size)
                begin_writeback(file.fileno(), size, len(piece))
                size += len(piece)
            lane.catch_up()
            # A folder that is published holds nothing that a power cut could still take.
            os.fsync(file.fileno())
        return FileRecord(name, size, digest.digest() or "")

    def _pieces(self, begin: int, end: int) -> Iterator[bytes]:
        for position in range(begin, end, _COPY):
            yield os.pread(self._spool.fileno(), min(_COPY, end - position), position)


class PayloadWriter:
    """Index and blobs of one tensor. A blob of no bytes says that nothing changes in its
    segment."""

    def __init__(self, layer: LayerWriter, name: str, count: int, part: Part) -> None:
        self._layer, self._name, self._count, self._part = layer, name, count, part
        layers = len(part.layers)
        self._sizes = [0] * (-(-count // SEGMENT) * layers)
        self._begin = layer.append(bytes(index_bytes(count, layers)))

    def write(self, segment: int, blobs: tuple[bytes, ...]) -> None:
        for number, blob in enumerate(blobs):
            self._sizes[segment * len(blobs) + number] = len(blob)
            self._layer.append(blob)

    def finish(self) -> Part:
        index = write_index(self._sizes)
        self._layer.write_at(self._begin, index)
        nbytes = len(index) + sum(self._sizes)
        digest = self._layer.store(self._name, "U8", (nbytes,), self._begin)
        return replace(self._part, bytes=nbytes, blake3=digest)


class DenseWriter:
    """A dense tensor any tool reads. Segments that are not written hold "no change"."""

    def __init__(self, layer: LayerWriter, name: str, shape: tuple[int, ...], part: Part) -> None:
        self._layer, self._name, self._shape, self._part = layer, name, shape, part
        self._begin = layer.append(b"")
        self._count = int(np.prod(shape, dtype=np.int64))
        self._done = 0

    def write(self, segment: int, blobs: tuple[bytes, ...]) -> None:
        self._fill(segment * SEGMENT)
        (blob,) = blobs
        self._layer.append(blob)
        self._done += len(blob) // unit_bytes(self._part.dtype)

    def finish(self) -> Part:
        self._fill(self._count)
        size = unit_bytes(self._part.dtype)
        digest = self._layer.store(self._name, self._part.dtype, self._shape, self._begin)
        return replace(self._part, bytes=self._count * size, blake3=digest)

    def _fill(self, until: int) -> None:
        unchanged = (1 << (8 * unit_bytes(self._part.dtype) - 1)).to_bytes(
            unit_bytes(self._part.dtype), "little"
        )
        while self._done < until:
            count = min(SEGMENT, until - self._done)
            self._layer.append(unchanged * count)
            self._done += count
