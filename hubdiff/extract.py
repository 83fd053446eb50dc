"""Computing a delta: Δ of every tensor, encoded and written as layer files, hashes on the way.

Both models are read once, block by block in the tuned model's file order; memory does not grow with
them. Nothing is published here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from hubdiff import numerics
from hubdiff.encodings import ENCODINGS
from hubdiff.hashing import FileHashes, Lane, tensor_hash
from hubdiff.layers import DenseWriter, LayerWriter, PayloadWriter
from hubdiff.manifest import GROUPS, PROBE_BYTES, FileRecord, Part, TensorRecord
from hubdiff.pair import Pair, TensorPair
from hubdiff.progress import Progress
from hubdiff.stream import (
    Block,
    Range,
    Span,
    blocks,
    read_ranges,
    run_ordered,
    span_range,
    unit_dtype,
    workers_for,
)

_PENDING = "0" * 64  # a hash that is known only when the payload is whole


@dataclass(frozen=True)
class Extracted:
    """What ``extract`` found and wrote. ``weights`` are the tuned shards, ``base_files`` the
    base's, by content."""

    tensors: tuple[TensorRecord, ...]
    layers: dict[str, tuple[FileRecord, ...]]
    weight_map: dict[str, str]
    weights: tuple[FileRecord, ...]
    base_files: tuple[FileRecord, ...]


@dataclass
class _Piece:
    """What a worker made of one span: blobs per group and segment, and sums for the record."""

    span: Span
    pair: TensorPair | None
    tuned: memoryview
    base: memoryview | None
    blobs: list[tuple[str, int, tuple[bytes, ...]]] = field(default_factory=list)
    changed: int = 0
    delta_square: float = 0.0
    base_square: float = 0.0


def extract(
    pair: Pair, folder: Path, *, plain: bool, progress: Progress, hash_base: bool = True
) -> Extracted:
    """Write the layer files of ``pair`` into ``folder``. ``plain`` stores Δ as dense tensors.
    Without ``hash_base`` no more of the base is read than the pair needs, and no file of it is
    known by content."""
    remote = any(
        side.tree.is_remote(file) for side in (pair.tuned, pair.base) for file in side.shards
    )
    total = sum(header.file_size for header in pair.tuned.shards.values())
    progress.start("comparing tuned and base", total)
    worker = _Worker(pair, plain)
    with _Collector(pair, folder, worker.parts, progress) as collector:
        for file, header in pair.tuned.shards.items():
            progress.advance(len(header.raw))
            run_ordered(
                blocks(file, header), worker.work, collector.take, workers_for(remote=remote)
            )
        extracted = collector.finish(hash_base=hash_base)
    progress.finish()
    return extracted


class _Worker:
    """Turns blocks into encoded pieces. Holds no state between blocks, so threads may share it."""

    def __init__(self, pair: Pair, plain: bool) -> None:
        self._pair, self._plain = pair, plain

    def parts(self, pair: TensorPair) -> dict[str, Part]:
        """The parts a tensor may have, by group, before their sizes are known."""
        tuned, base = pair.tuned.entry.dtype, pair.base and pair.base.entry.dtype
        if base is None:
            encoding = "plain" if self._plain else "planes"
            return {"delta": Part("delta", ("raw",), encoding, tuned, 0, _PENDING)}
        if not pair.is_float:
            return {"exact": Part("exact", ("raw",), "planes", tuned, 0, _PENDING)}
        ulp = "packed" if tuned in numerics.HALVES else "planes"
        parts = {"exact": Part("exact", ("ulp",), ulp, tuned, 0, _PENDING)}
        dtype = self._delta_dtype(pair)
        if self._plain:
            parts["delta"] = Part("delta", ("hi",), "plain", dtype, 0, _PENDING)
            parts["tail"] = Part("tail", ("lo",), "packed", dtype, 0, _PENDING)
        else:
            parts["delta"] = Part("delta", ("hi", "lo"), "packed", dtype, 0, _PENDING)
        return parts

    def work(self, block: Block) -> list[_Piece]:
        spans = [(span, self._pair.tensors.get(span.entry.name)) for span in block.spans]
        own = {span: Range(block.file, span.begin, span.begin + span.nbytes) for span, _ in spans}
        bases = {s: span_range(s, p.base) for s, p in spans if p and p.base}
        masters = {s: span_range(s, p.master) for s, p in spans if p and p.master}
        tuned = read_ranges(self._pair.tuned, own.values())
        base = read_ranges(self._pair.base, bases.values())
        master = read_ranges(self._pair.master, masters.values()) if self._pair.master else {}
        pieces = []
        for span, pair in spans:
            piece = _Piece(
                span, pair, tuned[own[span]], base[bases[span]] if span in bases else None
            )
            if pair is not None:
                self._encode(piece, pair, master[masters[span]] if span in masters else None)
            pieces.append(piece)
        return pieces

    def _encode(self, piece: _Piece, pair: TensorPair, master: memoryview | None) -> None:
        dtype = pair.tuned.entry.dtype
        tuned = np.frombuffer(piece.tuned, unit_dtype(dtype))
        if piece.base is None or pair.base is None:
            for segment, part in piece.span.segments():
                piece.blobs.append(("delta", segment, (self._raw(tuned[part]),)))
            piece.changed = len(tuned)
            return
        base = np.frombuffer(piece.base, unit_dtype(pair.base.entry.dtype))
        masters = None
        if master is not None and pair.master is not None:
            masters = _floats(master, pair.master.entry.dtype)
        for segment, part in piece.span.segments():
            if not pair.is_float:
                self._encode_raw(piece, segment, tuned[part], base[part])
            else:
                self._encode_float(
                    piece,
                    pair,
                    segment,
                    numerics.from_bits(tuned[part], dtype),
                    numerics.from_bits(base[part], pair.base.entry.dtype),
                    None if masters is None else masters[part],
                )

    def _raw(self, bits: np.ndarray) -> bytes:
        return ENCODINGS["plain" if self._plain else "planes"].encode(bits)

    def _encode_raw(self, piece: _Piece, segment: int, tuned: np.ndarray, base: np.ndarray) -> None:
        same_type = tuned.dtype == base.dtype
        changed = int(np.count_nonzero(tuned != base)) if same_type else len(tuned)
        piece.changed += changed
        if changed:
            piece.blobs.append(("exact", segment, (ENCODINGS["planes"].encode(tuned),)))

    def _encode_float(
        self,
        piece: _Piece,
        pair: TensorPair,
        segment: int,
        tuned: torch.Tensor,
        base: torch.Tensor,
        master: torch.Tensor | None,
    ) -> None:
        piece.base_square += _square(base)
        same = tuned.dtype == base.dtype and torch.equal(numerics.bits(tuned), numerics.bits(base))
        if same and master is None:
            return
        dtype = self._delta_dtype(pair)
        delta = numerics.difference(tuned if master is None else master, base, dtype)
        piece.delta_square += _square(delta.hi)
        piece.changed += _count_changed(tuned, base)
        self._encode_delta(piece, segment, delta)
        predicted = numerics.add(base, delta, 1.0, tuned.dtype)
        if not torch.equal(numerics.bits(tuned), numerics.bits(predicted)):
            residual = numerics.residual(tuned, predicted)
            encoding = ENCODINGS["packed" if tuned.element_size() == 2 else "planes"]
            piece.blobs.append(("exact", segment, (encoding.encode(numerics.to_bits(residual)),)))

    def _encode_delta(self, piece: _Piece, segment: int, delta: numerics.Difference) -> None:
        unchanged = numerics.bits(delta.hi.new_tensor(numerics.UNCHANGED))
        moved = bool((numerics.bits(delta.hi) != unchanged).any())
        has_tail = delta.lo is not None and bool((delta.lo != 0).any())
        tail = b""
        if has_tail and delta.lo is not None:
            tail = ENCODINGS["packed"].encode(numerics.to_bits(delta.lo))
        if self._plain:
            if moved:
                piece.blobs.append(("delta", segment, (numerics.to_bits(delta.hi).tobytes(),)))
            if tail:
                piece.blobs.append(("tail", segment, (tail,)))
        elif moved:
            hi = ENCODINGS["packed"].encode(numerics.to_bits(delta.hi))
            piece.blobs.append(("delta", segment, (hi, tail)))

    def _delta_dtype(self, pair: TensorPair) -> str:
        source = pair.master or pair.tuned
        assert pair.base is not None
        return numerics.delta_dtype(source.entry.dtype, pair.base.entry.dtype, dense=self._plain)


class _Collector:
    """Takes pieces in order: writes their blobs, feeds the hashes, makes the records."""

    def __init__(self, pair: Pair, folder: Path, parts: PartsOf, progress: Progress) -> None:
        self._pair, self._parts, self._progress = pair, parts, progress
        self._layers = {group: LayerWriter(folder, group) for group in GROUPS}
        self._lanes = (Lane(), Lane())
        self._tuned_hashes = FileHashes(pair.tuned)
        self._base_hashes = FileHashes(pair.base)
        self._records: list[TensorRecord] = []
        self._open: _OpenTensor | None = None

    def __enter__(self) -> _Collector:
        return self

    def __exit__(self, *error: object) -> None:
        for lane in self._lanes:
            lane.__exit__(None, None, None)
        for layer in self._layers.values():
            layer.__exit__(None, None, None)

    def take(self, block: Block, pieces: list[_Piece]) -> None:
        for lane in self._lanes:
            lane.catch_up()
        for piece in pieces:
            self._feed(0, self._tuned_hashes, block.file, piece.span.begin, piece.tuned)
            if piece.pair is not None:
                self._take_piece(piece, piece.pair)
        self._progress.advance(block.nbytes)

    def _take_piece(self, piece: _Piece, pair: TensorPair) -> None:
        if self._open is None:
            self._open = _OpenTensor(pair, self._parts(pair), self._layers)
        self._open.add(piece)
        if piece.base is not None and pair.base is not None:
            where = span_range(piece.span, pair.base)
            self._feed(1, self._base_hashes, where.file, where.begin, piece.base)
        if piece.span.last:
            self._records.append(self._open.finish())
            self._open = None

    def _feed(
        self, lane: int, hashes: FileHashes, file: str, offset: int, data: bytes | memoryview
    ) -> None:
        self._lanes[lane].feed(hashes.stream(file), offset, data)

    def finish(self, *, hash_base: bool) -> Extracted:
        for lane in self._lanes:
            lane.catch_up()
        layers, weight_map = {}, {}
        for group, layer in self._layers.items():
            layers[group], names = layer.finish()
            if group == "delta":
                weight_map = names
        records = tuple(self._records)
        return Extracted(
            records,
            layers,
            weight_map,
            self._tuned_hashes.records({r.tuned_name: r.tuned for r in records if r.tuned}),
            self._base_hashes.records({r.name: r.base for r in records if r.base})
            if hash_base
            else (),
        )


class _OpenTensor:
    """The record of one tensor in the making. Payloads are opened by the first change."""

    def __init__(
        self, pair: TensorPair, parts: dict[str, Part], layers: dict[str, LayerWriter]
    ) -> None:
        self._pair, self._parts, self._layers = pair, parts, layers
        self._writers: dict[str, PayloadWriter | DenseWriter] = {}
        self._tuned, self._base, self._probe = tensor_hash(), tensor_hash(), tensor_hash()
        self._probed = 0
        self._changed, self._delta_square, self._base_square = 0, 0.0, 0.0

    def add(self, piece: _Piece) -> None:
        if self._pair.base is None:
            self._writer("delta")  # also for a tensor of no elements: it must exist in the result
        for group, segment, blobs in piece.blobs:
            self._writer(group).write(segment, blobs)
        self._tuned.update(piece.tuned)
        if piece.base is not None:
            self._base.update(piece.base)
            start = piece.base[: PROBE_BYTES - self._probed]
            self._probe.update(start)
            self._probed += len(start)
        self._changed += piece.changed
        self._delta_square += piece.delta_square
        self._base_square += piece.base_square

    def _writer(self, group: str) -> PayloadWriter | DenseWriter:
        if group not in self._writers:
            part, entry = self._parts[group], self._pair.tuned.entry
            layer = self._layers[group]
            self._writers[group] = (
                layer.dense(self._pair.name, entry.shape, part)
                if part.encoding == "plain"
                else layer.payload(self._pair.name, entry.nbytes // _unit(entry.dtype), part)
            )
        return self._writers[group]

    def finish(self) -> TensorRecord:
        base, entry = self._pair.base, self._pair.tuned.entry
        return TensorRecord(
            name=self._pair.name,
            shape=entry.shape,
            dtype=entry.dtype,
            base_dtype=base.entry.dtype if base else None,
            tuned=self._tuned.hexdigest(),
            base=self._base.hexdigest() if base else None,
            probe=self._probe.hexdigest() if base else None,
            parts=tuple(self._writers[g].finish() for g in GROUPS if g in self._writers),
            changed=self._changed,
            delta_norm=math.sqrt(self._delta_square),
            base_norm=math.sqrt(self._base_square),
            tuned_name=self._pair.tuned_name,
        )


PartsOf = Callable[[TensorPair], dict[str, Part]]


def _floats(data: memoryview, dtype: str) -> torch.Tensor:
    return numerics.from_bits(np.frombuffer(data, unit_dtype(dtype)), dtype)


def _count_changed(tuned: torch.Tensor, base: torch.Tensor) -> int:
    """Elements whose bits differ; across dtypes, whose values do."""
    if tuned.dtype == base.dtype:
        return int((numerics.bits(tuned) != numerics.bits(base)).sum())
    return int((tuned.float() != base.float()).sum())


def _unit(dtype: str) -> int:
    return unit_dtype(dtype).itemsize


def _square(values: torch.Tensor) -> float:
    """‖values‖², elements that are not finite left out."""
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float32))
    if not math.isfinite(norm):
        finite = torch.nan_to_num(values.double(), nan=0.0, posinf=0.0, neginf=0.0)
        norm = min(float(torch.linalg.vector_norm(finite)), 1e150)
    return norm * norm
