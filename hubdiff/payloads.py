"""Payloads: the encoded bytes of a tensor's parts, from where they lie to decoded arrays.

A ``SpanPayload`` says which bytes of a part one span needs, ``SpanBytes`` holds them. Every length
in them is checked before it is used; ``PayloadHashes`` checks the whole of each payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from hubdiff.checkpoint import Placed
from hubdiff.encodings import ENCODINGS, SEGMENT, tails
from hubdiff.encodings.payload import BlobRange, index_bytes, parse_index
from hubdiff.encodings.tails import Tail
from hubdiff.errors import CorruptPayload
from hubdiff.hashing import check_hash, tensor_hash
from hubdiff.manifest import Part
from hubdiff.stream import Range, Span, unit_bytes, unit_dtype

if TYPE_CHECKING:
    from blake3 import blake3

DAMAGED = "The delta is damaged: fetch it again, or ask its author to push it again."
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Decoder(Protocol[T_co]):
    """Makes the bit patterns of a layer of a segment: as arrays, or as tensors of a device."""

    def decode(self, part: Part, blob: memoryview, count: int, where: str) -> T_co:
        """A blob of ``count`` units; ``where`` is what to call it in errors."""

    def place(self, bits: np.ndarray) -> T_co:
        """Bit patterns that are made already."""

    def tail(self, part: Part, blob: memoryview, hi: Any, where: str) -> T_co:
        """The blob of the ``lo`` that belongs to ``hi``, which this decoder made."""


@dataclass(frozen=True)
class PlacedPart:
    """A part and where its bytes lie in its layer file."""

    part: Part
    placed: Placed
    shape: tuple[int, ...]  # of the tensor
    count: int  # its units

    @property
    def dense(self) -> bool:
        """One dense tensor, without an index."""
        return self.part.encoding == "plain"

    @property
    def index_range(self) -> Range:
        begin = self.placed.entry.begin
        size = 0 if self.dense else index_bytes(self.count, len(self.part.layers))
        return Range(self.placed.file, begin, begin + size)

    def parse_index(self, raw: memoryview) -> Index:
        layers = len(self.part.layers)
        try:
            blobs = parse_index(raw, self.count, layers, self.part.bytes)
        except CorruptPayload as error:
            name = f"{self.part.group} layer of tensor {self.placed.entry.name}"
            raise CorruptPayload(f"{name}: {error}", next_step=DAMAGED) from error
        return Index(bytes(raw), blobs)


@dataclass(frozen=True)
class Index:
    """The head of a payload: its bytes, and where each blob lies relative to the payload. The
    factors of a low-rank Δ are all head: any element may need them, and they are small."""

    raw: bytes
    blobs: list[BlobRange]


@dataclass(frozen=True)
class SpanPayload:
    """The bytes of a part that one span needs. ``index`` is None when they include it, or when
    there is none (dense)."""

    part: PlacedPart
    range: Range
    index: Index | None

    def blobs(self, view: memoryview, span: Span) -> Iterator[list[memoryview]]:
        """The blobs of each segment of ``span``, layer by layer, out of the bytes at ``range``; of
        a low-rank Δ, whose factors every segment needs, all of the payload."""
        part = self.part
        if part.part.low_rank:
            for _ in span.segments():
                yield [memoryview(self.index.raw) if self.index else view]
            return
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


@dataclass(frozen=True)
class SpanBytes:
    """What was read for a ``SpanPayload``."""

    where: SpanPayload
    view: memoryview


def decode_segments(
    span: Span, payloads: list[SpanBytes], where: str, decoder: Decoder[T]
) -> Iterator[tuple[slice, dict[str, T | None]]]:
    """Per segment of a span: its units as a slice of the span, and its layers as ``decoder``
    makes them; None where a layer changes nothing."""
    blobs = [payload.where.blobs(payload.view, span) for payload in payloads]
    for (segment, units), *found in zip(span.segments(), *blobs, strict=True):
        layers: dict[str, T | None] = {}
        name = f"{where}, tensor {span.entry.name}, segment {segment}"
        for payload, here in zip(payloads, found, strict=True):
            placed = payload.where.part
            count = units.stop - units.start
            if placed.part.low_rank:
                layers["hi"] = decoder.place(_multiply(placed, here[0], segment, count, name))
                continue
            for layer, blob in zip(placed.part.layers, here, strict=True):
                layers[layer] = None
                if len(blob) and layer == "lo":
                    layers[layer] = _tail(placed.part, blob, layers.get("hi"), name, decoder)
                elif len(blob):
                    layers[layer] = decoder.decode(placed.part, blob, count, name)
        yield units, layers


def _tail(part: Part, blob: memoryview, hi: T | None, where: str, decoder: Decoder[T]) -> T:
    if hi is None:
        raise CorruptPayload(f"{where}: a tail of what did not change", next_step=DAMAGED)
    return decoder.tail(part, blob, hi, where)


def _multiply(
    placed: PlacedPart, factors: memoryview, segment: int, count: int, where: str
) -> np.ndarray:
    """The ``hi`` of one segment of a low-rank Δ."""
    assert placed.part.low_rank is not None
    out = np.empty(count, np.float32)
    with blamed(where):
        placed.part.low_rank.product(placed.shape).fill(factors, segment * SEGMENT, out)
    return out.view(unit_dtype("F32"))


class PayloadHashes:
    """The blake3 of payloads whose spans are taken in order, checked when a tensor ends."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._open: dict[str, blake3] = {}

    def take(self, span: Span, payloads: list[SpanBytes]) -> None:
        for payload in payloads:
            part, index = payload.where.part, payload.where.index
            group = part.part.group
            if group not in self._open:
                self._open[group] = tensor_hash()
                self._open[group].update(index.raw if index else b"")
            self._open[group].update(payload.view)
            if span.last:
                name = f"{self._where}, {group} layer of {part.placed.entry.name}"
                check_hash(self._open.pop(group).hexdigest(), part.part.blake3, name)


def decode_blob(part: Part, blob: memoryview, count: int, where: str) -> np.ndarray:
    """One layer of one segment as bit patterns of ``count`` units. Raises ``CorruptPayload`` naming
    ``where``."""
    out = np.empty(count, unit_dtype(part.dtype))
    encoding = ENCODINGS[part.encoding]
    with blamed(where):
        if 8 * out.itemsize not in encoding.widths:
            raise CorruptPayload(f"encoding {part.encoding} can't hold {part.dtype}")
        encoding.decode(blob, out)
    return out


def decode_tail(part: Part, blob: memoryview, hi: np.ndarray, where: str) -> Tail:
    """The ``lo`` that belongs to ``hi``. Raises ``CorruptPayload`` naming ``where``."""
    with blamed(where):
        if part.dtype not in tails.EXPONENTS:
            raise CorruptPayload(f"a tail can't hold {part.dtype}")
        return tails.decode(blob, hi, part.dtype)


class Arrays:
    """Bit patterns as numpy arrays, on the CPU; not to be written to: those of a dense part are
    the payload itself, which is hashed later. A ``lo`` is the two rows of a ``Tail``."""

    def decode(self, part: Part, blob: memoryview, count: int, where: str) -> np.ndarray:
        dtype = unit_dtype(part.dtype)
        if part.encoding == "plain" and len(blob) == count * dtype.itemsize:
            bits = np.frombuffer(blob, dtype)
            if bits.flags.aligned:
                return bits
        return decode_blob(part, blob, count, where)

    def place(self, bits: np.ndarray) -> np.ndarray:
        return bits

    def tail(self, part: Part, blob: memoryview, hi: np.ndarray, where: str) -> np.ndarray:
        return np.stack(decode_tail(part, blob, hi, where))


@contextmanager
def blamed(where: str) -> Iterator[None]:
    """Say in ``CorruptPayload`` which segment is meant."""
    try:
        yield
    except CorruptPayload as error:
        raise CorruptPayload(f"{where}: {error}", next_step=DAMAGED) from error
