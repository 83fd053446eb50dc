"""Blocks of both models → encoded pieces of Δ, on any thread."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hubdiff.encodings import ENCODINGS, tails
from hubdiff.floats import bf16, floats
from hubdiff.manifest import Part
from hubdiff.pair import Pair, TensorPair
from hubdiff.sample import BLOCK, Sample
from hubdiff.segment_delta import HALVES, Comparison, Floats, compare, delta_dtype
from hubdiff.stream import Block, Range, Span, read_ranges, span_range, unit_dtype

# Units of each tensor that tell how far the tuned model itself can be compressed.
_SAMPLE = 1 << 15
_PENDING = "0" * 64  # a hash that is known only when the payload is whole


@dataclass
class Piece:
    """What a worker made of one span: blobs per group and segment, and sums for the record."""

    span: Span
    pair: TensorPair | None
    tuned: memoryview
    base: memoryview | None
    blobs: list[tuple[str, int, tuple[bytes, ...]]] = field(default_factory=list)
    sampled: list[tuple[bytes, bytes]] = field(default_factory=list)
    compressed: int = 0
    changed: int = 0
    delta_square: float = 0.0
    base_square: float = 0.0


class Worker:
    """Turns blocks into encoded pieces. Holds no state between blocks, so threads may share it."""

    def __init__(self, pair: Pair, plain: bool, sample: Sample) -> None:
        self._pair, self._plain, self._sample = pair, plain, sample

    def parts(self, pair: TensorPair) -> dict[str, Part]:
        """The parts a tensor may have, by group, before their sizes are known."""
        tuned, base = pair.tuned.entry.dtype, pair.base and pair.base.entry.dtype
        if base is None:
            encoding = "plain" if self._plain else "planes"
            return {"delta": Part("delta", ("raw",), encoding, tuned, 0, _PENDING)}
        if not pair.is_float:
            return {"exact": Part("exact", ("raw",), "planes", tuned, 0, _PENDING)}
        ulp = "packed" if tuned in HALVES else "planes"
        parts = {"exact": Part("exact", ("ulp",), ulp, tuned, 0, _PENDING)}
        dtype = self._delta_dtype(pair)
        if self._plain:
            parts["delta"] = Part("delta", ("hi",), "plain", dtype, 0, _PENDING)
            parts["tail"] = Part("tail", ("lo",), "packed", dtype, 0, _PENDING)
        else:
            parts["delta"] = Part("delta", ("hi", "lo"), "packed", dtype, 0, _PENDING)
        return parts

    def work(self, block: Block) -> list[Piece]:
        spans = [(span, self._pair.tensors.get(span.entry.name)) for span in block.spans]
        own = {span: Range(block.file, span.begin, span.begin + span.nbytes) for span, _ in spans}
        bases = {s: span_range(s, p.base) for s, p in spans if p and p.base}
        masters = {s: span_range(s, p.master) for s, p in spans if p and p.master}
        tuned = read_ranges(self._pair.tuned, own.values())
        base = read_ranges(self._pair.base, bases.values())
        master = read_ranges(self._pair.master, masters.values()) if self._pair.master else {}
        pieces = []
        for span, pair in spans:
            piece = Piece(
                span, pair, tuned[own[span]], base[bases[span]] if span in bases else None
            )
            if pair is not None:
                self._encode(piece, pair, master[masters[span]] if span in masters else None)
            pieces.append(piece)
        return pieces

    def _encode(self, piece: Piece, pair: TensorPair, master: memoryview | None) -> None:
        dtype = pair.tuned.entry.dtype
        tuned = np.frombuffer(piece.tuned, unit_dtype(dtype))
        if piece.span.first == 0:
            piece.compressed = _compressed(tuned, pair.tuned.entry.nbytes)
        if piece.base is None or pair.base is None:
            for segment, part in piece.span.segments():
                piece.blobs.append(("delta", segment, (self._raw(tuned[part]),)))
            piece.changed = len(tuned)
            return
        base = np.frombuffer(piece.base, unit_dtype(pair.base.entry.dtype))
        delta = self._delta_dtype(pair)
        if pair.is_float:
            source = _master_part(pair, master, slice(None)) or Floats(tuned, dtype)
            self._take_sample(piece, pair, source, base)
        for segment, part in piece.span.segments():
            if not pair.is_float:
                self._encode_raw(piece, segment, tuned[part], base[part])
                continue
            compared = compare(
                Floats(tuned[part], dtype),
                Floats(base[part], pair.base.entry.dtype),
                _master_part(pair, master, part),
                delta,
            )
            self._encode_float(piece, segment, compared, delta)

    def _take_sample(
        self, piece: Piece, pair: TensorPair, source: Floats, base: np.ndarray
    ) -> None:
        """The blocks of the sample that lie in this span, which is cut at segments: at blocks
        too."""
        assert pair.base is not None
        for block in self._sample.within(pair.name, piece.span.first, piece.span.units):
            first = block * BLOCK - piece.span.first
            here = slice(first, first + BLOCK)
            values = floats(base[here], pair.base.entry.dtype)
            piece.sampled.append(
                (
                    base_patterns(base[here], pair.base.entry.dtype, self._sample.dtype),
                    _delta_patterns(floats(source.bits[here], source.dtype), values),
                )
            )

    def _raw(self, bits: np.ndarray) -> bytes:
        return ENCODINGS["plain" if self._plain else "planes"].encode(bits)

    def _encode_raw(self, piece: Piece, segment: int, tuned: np.ndarray, base: np.ndarray) -> None:
        same_type = tuned.dtype == base.dtype
        changed = int(np.count_nonzero(tuned != base)) if same_type else len(tuned)
        piece.changed += changed
        if changed:
            piece.blobs.append(("exact", segment, (ENCODINGS["planes"].encode(tuned),)))

    def _encode_float(self, piece: Piece, segment: int, compared: Comparison, dtype: str) -> None:
        piece.base_square += compared.base_square
        piece.delta_square += compared.delta_square
        piece.changed += compared.changed
        hi, residual = compared.hi, compared.residual
        if hi is not None:
            blob = hi.tobytes() if self._plain else ENCODINGS["packed"].encode(hi)
            tail = b""
            if compared.lo is not None:
                tail = tails.encode(compared.lo, hi, dtype, len(blob))
            if not self._plain:
                piece.blobs.append(("delta", segment, (blob, tail)))
            else:
                piece.blobs.append(("delta", segment, (blob,)))
                if tail:
                    piece.blobs.append(("tail", segment, (tail,)))
        if residual is not None:
            encoding = ENCODINGS["packed" if residual.itemsize == 2 else "planes"]
            piece.blobs.append(("exact", segment, (encoding.encode(residual),)))

    def _delta_dtype(self, pair: TensorPair) -> str:
        source = pair.master or pair.tuned
        assert pair.base is not None
        return delta_dtype(source.entry.dtype, pair.base.entry.dtype, dense=self._plain)


def base_patterns(base: np.ndarray, dtype: str, wanted: str) -> bytes:
    """A block of the base in the sample's dtype."""
    return (base if dtype == wanted else floats(base, dtype)).tobytes()


def _delta_patterns(tuned: np.ndarray, base: np.ndarray) -> bytes:
    """A block of Δ, in BF16. Where nothing changes it is −0.0."""
    with np.errstate(all="ignore"):  # what is infinite or no number is left out when it is read
        return bf16(-(base - tuned)).tobytes()


def _compressed(start: np.ndarray, nbytes: int) -> int:
    """About how many bytes a tensor of ``nbytes`` compresses to, by the units at its start."""
    sample = start[:_SAMPLE]
    if not len(sample):
        return 0
    blob = ENCODINGS["packed" if sample.itemsize == 2 else "planes"].encode(sample)
    return len(blob) * nbytes // sample.nbytes


def _master_part(pair: TensorPair, data: memoryview | None, part: slice) -> Floats | None:
    if data is None or pair.master is None:
        return None
    dtype = pair.master.entry.dtype
    return Floats(np.frombuffer(data, unit_dtype(dtype))[part], dtype)
