"""A delta, opened: manifest, layer files, and the Δ of any segment of any tensor.

Opening reads the manifest and the headers of the portable layer. Every length in a payload is
checked against what the manifest declares before it is used; the whole payload's hash is checked by
whoever reads all of it (``merge``, ``verify``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hubdiff.checkpoint import MANIFEST, Checkpoint, Placed
from hubdiff.encodings import ENCODINGS, SEGMENT
from hubdiff.encodings.payload import BlobRange, index_bytes, parse_index
from hubdiff.errors import BadManifest, CorruptPayload, NotADelta
from hubdiff.files import FileTree
from hubdiff.manifest import Manifest, Part, TensorRecord, parse_manifest
from hubdiff.safetensors_io import read_header, tensor_bytes
from hubdiff.stream import Range, Span, unit_bytes, unit_dtype

if TYPE_CHECKING:
    from hubdiff.numerics import Difference


@dataclass(frozen=True)
class PlacedPart:
    """A part and where its bytes lie in its layer file."""

    part: Part
    placed: Placed
    count: int  # units of the tensor

    @property
    def dense(self) -> bool:
        """One dense tensor, without an index."""
        return self.part.encoding == "plain"

    @property
    def index_range(self) -> Range:
        begin = self.placed.entry.begin
        size = 0 if self.dense else index_bytes(self.count, len(self.part.layers))
        return Range(self.placed.file, begin, begin + size)

    def parse_index(self, raw: memoryview) -> _Index:
        layers = len(self.part.layers)
        return _Index(bytes(raw), parse_index(raw, self.count, layers, self.part.bytes))


@dataclass(frozen=True)
class _Index:
    """The head of a payload: its bytes, and where each blob lies relative to the payload."""

    raw: bytes
    blobs: list[BlobRange]


@dataclass(frozen=True)
class SpanPayload:
    """The bytes of a part that one span needs. ``index`` is None when they include it, or when
    there is none (dense)."""

    part: PlacedPart
    range: Range
    index: _Index | None

    def blobs(self, view: memoryview, span: Span) -> Iterator[list[memoryview]]:
        """The blobs of each segment of ``span``, layer by layer, out of the bytes at ``range``."""
        part = self.part
        if part.dense:
            size = unit_bytes(part.part.dtype)
            for _, where in span.segments():
                yield [view[where.start * size : where.stop * size]]
            return
        index = self.index or part.parse_index(view[: part.index_range.nbytes])
        layers, origin = len(part.part.layers), self.range.begin - part.placed.entry.begin
        for segment, _ in span.segments():
            here = index.blobs[segment * layers : (segment + 1) * layers]
            yield [view[b.offset - origin : b.offset - origin + b.size] for b in here]


@dataclass
class Delta:
    """An open delta. ``layer(group)`` gives a group's files as a checkpoint of payloads."""

    tree: FileTree
    manifest: Manifest
    _layers: dict[str, Checkpoint] = field(default_factory=dict)
    _indices: dict[tuple[str, str], _Index] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @cached_property
    def records(self) -> dict[str, TensorRecord]:
        return {record.name: record for record in self.manifest.tensors}

    def layer(self, group: str) -> Checkpoint:
        """The files of a group; headers are read at first use."""
        with self._lock:
            if group not in self._layers:
                self._layers[group] = self._open_layer(group)
            return self._layers[group]

    def _open_layer(self, group: str) -> Checkpoint:
        checkpoint = Checkpoint(self.tree, {}, {}, {}, None)
        self._stack.callback(checkpoint.close)
        for file in self.manifest.layers[group]:
            where = f"{self.tree.pin}/{file.path}"
            info = self.tree.files().get(file.path)
            if info is None:
                raise BadManifest(
                    f"{where} is missing, the manifest lists it",
                    next_step="The delta was not uploaded whole; ask its author to push it again.",
                )
            if info.size != file.size:
                raise CorruptPayload(
                    f"{where} has {info.size:,} bytes, the manifest says {file.size:,}",
                    next_step="Fetch the delta again, or ask its author to push it again.",
                )
            header = read_header(checkpoint.reader(file.path), where)
            checkpoint.shards[file.path] = header
            checkpoint.tensors.update({e.name: Placed(file.path, e) for e in header.tensors})
        return checkpoint

    def placed(self, record: TensorRecord, group: str) -> PlacedPart | None:
        """Where the part of a tensor lies; None when it has none in this group."""
        part = record.part(group)
        if part is None:
            return None
        count = tensor_bytes(record.dtype, record.shape) // unit_bytes(record.dtype)
        placed = self.layer(group).tensors.get(record.name)
        if placed is None or placed.entry.nbytes != part.bytes:
            raise CorruptPayload(
                f"{self.tree.pin}: the {group} layer of tensor {record.name!r} is "
                + ("missing" if placed is None else f"not the {part.bytes:,} bytes declared"),
                next_step="The delta is damaged; ask its author to push it again.",
            )
        if part.encoding not in ENCODINGS:
            raise CorruptPayload(
                f"{self.tree.pin}: tensor {record.name!r} has the unknown encoding "
                f"{part.encoding!r}",
                next_step="Upgrade hubdiff: pip install --upgrade hubdiff.",
            )
        if part.encoding == "plain" and tensor_bytes(part.dtype, record.shape) != part.bytes:
            raise CorruptPayload(
                f"{self.tree.pin}: tensor {record.name!r} is not the dense tensor declared",
                next_step="The delta is damaged; ask its author to push it again.",
            )
        return PlacedPart(part, placed, count)

    def payload(
        self, part: PlacedPart, span: Span, read: Callable[[Range], memoryview]
    ) -> SpanPayload:
        """What to read for a span of the tensor. The index of a tensor that has several spans is
        read here, once, through ``read``; that of any other comes with its payload."""
        entry = part.placed.entry
        if part.dense:
            size = unit_bytes(part.part.dtype)
            begin = entry.begin + span.first * size
            return SpanPayload(
                part, Range(part.placed.file, begin, begin + span.units * size), None
            )
        if span.units == part.count:
            return SpanPayload(part, Range(part.placed.file, entry.begin, entry.end), None)
        index = self._index(part, read)
        blobs, layers = index.blobs, len(part.part.layers)
        head = blobs[span.first // SEGMENT * layers]
        tail = blobs[-(-(span.first + span.units) // SEGMENT) * layers - 1]
        begin, end = entry.begin + head.offset, entry.begin + tail.offset + tail.size
        return SpanPayload(part, Range(part.placed.file, begin, end), index)

    def _index(self, part: PlacedPart, read: Callable[[Range], memoryview]) -> _Index:
        key = (part.part.group, part.placed.entry.name)
        with self._lock:  # also while reading: no index is fetched twice
            if key not in self._indices:
                self._indices[key] = part.parse_index(read(part.index_range))
            return self._indices[key]

    def close(self) -> None:
        self._stack.close()


@contextmanager
def open_delta_tree(tree: FileTree) -> Iterator[Delta]:
    """Open the delta in ``tree``. Raises ``NotADelta``, ``NewerFormat``, ``BadManifest``."""
    if MANIFEST not in tree.files():
        raise NotADelta(
            f"{tree.pin} has no {MANIFEST}: it is not a delta",
            next_step="A delta is made with: hubdiff push-delta TUNED REPO --base BASE.",
        )
    manifest = parse_manifest(tree.read_bytes(MANIFEST), f"{tree.pin}/{MANIFEST}")
    delta = Delta(tree, manifest)
    try:
        yield delta
    finally:
        delta.close()


# --- decoding: blobs of one segment to arrays ---


def decode_layers(
    part: Part, blobs: list[memoryview], count: int, where: str
) -> dict[str, np.ndarray | None]:
    """The layers of one segment as bit patterns of ``count`` units; None where a layer changes
    nothing. Raises ``CorruptPayload`` naming ``where``."""
    decoded: dict[str, np.ndarray | None] = {}
    for layer, blob in zip(part.layers, blobs, strict=True):
        if not len(blob):
            decoded[layer] = None
            continue
        out = np.empty(count, unit_dtype(part.dtype))
        encoding = ENCODINGS[part.encoding]
        if 8 * out.itemsize not in encoding.widths:
            raise CorruptPayload(f"{where}: encoding {part.encoding} can't hold {part.dtype}")
        try:
            encoding.decode(blob, out)
        except CorruptPayload as error:
            raise CorruptPayload(
                f"{where}: {error}", next_step="Fetch the delta again; it is damaged."
            ) from error
        decoded[layer] = out
    return decoded


def difference_of(part: Part, layers: dict[str, np.ndarray | None]) -> Difference | None:
    """Δ of a segment out of its decoded ``hi`` and ``lo``; None when nothing changes."""
    from hubdiff import numerics

    hi, lo = layers.get("hi"), layers.get("lo")
    if hi is None and lo is None:
        return None
    if hi is None:
        assert lo is not None
        hi = np.full(lo.shape, 1 << (8 * lo.itemsize - 1), lo.dtype)
    high = numerics.from_bits(hi, part.dtype)
    low = None if lo is None else numerics.from_bits(lo, part.dtype)
    return numerics.Difference(high, low)
