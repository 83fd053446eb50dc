"""Writing the layer files of a delta: ``delta-*``, ``tail-*`` and ``exact-*.safetensors``.

Payloads arrive segment by segment and their sizes are not known before the last one, while a
safetensors header stands first. So as much room is left for the header as it can need. Where it
needs less, spaces fill it if that is next to nothing; else the tensors move down, in place.

Layer files end where the tuned model's files end: each of those is compared alone, so that several
processes can share them and the bytes don't depend on how many there are. Their numbers are known
when all are written, and until then they have names of their own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from hubdiff.encodings import SEGMENT
from hubdiff.encodings.payload import index_bytes, write_index
from hubdiff.hashing import tensor_hash
from hubdiff.manifest import FileRecord, Part
from hubdiff.safetensors_io import DTYPE_BITS, build_header, tensor_bytes
from hubdiff.stream import unit_bytes
from hubdiff.writer import begin_writeback, disk_errors, write_all

# From this size on a file takes no more tensors: what the Hub and its clients handle well in one.
SHARD_BYTES = 4 << 30
_COPY = 8 << 20
_FILLED = 1000  # spaces after a header may be this part of the file
# For the header's room: a dtype and a size that no other takes more letters to write than.
_LONGEST_DTYPE, _LARGEST_SIZE = max(DTYPE_BITS, key=len), 1 << 50


@dataclass(frozen=True)
class _Stored:
    """One tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass
class _Body:
    """A file in the making: its tensors begin at ``begin`` and end, so far, at ``end``."""

    path: Path
    fd: int
    begin: int
    end: int
    stored: list[_Stored] = field(default_factory=list)


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


def header_room(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes that the header of a layer file needs at most when it holds no more than these tensors,
    given by name and shape."""
    largest = (
        (name, _LONGEST_DTYPE, (*shape, _LARGEST_SIZE), _LARGEST_SIZE) for name, shape in tensors
    )
    return len(build_header(largest, _metadata("delta")))


def _metadata(group: str) -> dict[str, str]:
    return {"format": "hubdiff", "layer": group}


class LayerWriter:
    """The files of one group for one file of the tuned model, the ``source``-th. Tensors are
    written one at a time; ``room`` is that for the header (``header_room``)."""

    def __init__(self, folder: Path, group: str, source: int, room: int) -> None:
        self._folder, self._group, self._source, self._room = folder, group, source, room
        self._bodies: list[_Body] = []

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for body in self._bodies:
            os.close(body.fd)

    def payload(self, name: str, count: int, part: Part) -> PayloadWriter:
        return PayloadWriter(self, name, count, part)

    def dense(self, name: str, shape: tuple[int, ...], part: Part) -> DenseWriter:
        return DenseWriter(self, name, shape, part)

    def begin(self) -> int:
        """The position at which the next tensor begins."""
        if not self._bodies or self._bodies[-1].end - self._room >= SHARD_BYTES:
            self._bodies.append(self._new_body())
        return self._bodies[-1].end

    def _new_body(self) -> _Body:
        path = self._folder / f".{self._group}-{self._source}-{len(self._bodies)}.part"
        with disk_errors(path):
            # open() honours the umask; the file is read too, for its hashes.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        return _Body(path, fd, self._room, self._room)

    def append(self, data: bytes | memoryview) -> None:
        body = self._bodies[-1]
        self.write_at(body.end, data)
        body.end += len(data)

    def write_at(self, position: int, data: bytes | memoryview) -> None:
        body = self._bodies[-1]
        with disk_errors(body.path):
            write_all(body.fd, data, position)

    def store(self, name: str, dtype: str, shape: tuple[int, ...], begin: int) -> str:
        """The bytes from ``begin`` to the end are this tensor; their blake3."""
        body, digest = self._bodies[-1], tensor_hash()
        body.stored.append(_Stored(name, dtype, shape, body.end - begin))
        for position, piece in _pieces(body.fd, begin, body.end):
            digest.update(piece)
            begin_writeback(body.fd, position, len(piece))
        return digest.hexdigest()

    def finish(self) -> tuple[LayerFile, ...]:
        """Finish the files."""
        return tuple(
            LayerFile(self._finish(body), tuple(tensor.name for tensor in body.stored))
            for body in self._bodies
        )

    def _finish(self, body: _Body) -> FileRecord:
        tensors = [(s.name, s.dtype, s.shape, s.nbytes) for s in body.stored]
        header = build_header(tensors, _metadata(self._group))
        if (self._room - len(header)) * _FILLED <= body.end:
            header = build_header(tensors, _metadata(self._group), room=self._room)
        down = self._room - len(header)
        size = body.end - down
        with disk_errors(body.path):
            write_all(body.fd, header, 0)
            if down:
                _move(body.fd, body.begin, body.end, down)
            os.ftruncate(body.fd, size)
            digest = hashlib.sha256()
            for _, piece in _pieces(body.fd, 0, size):
                digest.update(piece)
            # A folder that is published holds nothing that a power cut could still take.
            os.fsync(body.fd)
        return FileRecord(body.path.name, size, digest.hexdigest())


def _move(fd: int, begin: int, end: int, down: int) -> None:
    """Move the bytes from ``begin`` to ``end`` so many places down."""
    for position, piece in _pieces(fd, begin, end):
        write_all(fd, piece, position - down)
        begin_writeback(fd, position - down, len(piece))


def _pieces(fd: int, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The bytes from ``begin`` to ``end``, with where each piece begins."""
    for position in range(begin, end, _COPY):
        yield position, os.pread(fd, min(_COPY, end - position), position)


class PayloadWriter:
    """Index and blobs of one tensor. A blob of no bytes says that nothing changes in its
    segment."""

    def __init__(self, layer: LayerWriter, name: str, count: int, part: Part) -> None:
        self._layer, self._name, self._part = layer, name, part
        layers = len(part.layers)
        self._sizes = [0] * (-(-count // SEGMENT) * layers)
        self._begin = layer.begin()
        layer.append(bytes(index_bytes(count, layers)))

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
        self._begin = layer.begin()
        self._count = tensor_bytes(part.dtype, shape) // unit_bytes(part.dtype)
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
