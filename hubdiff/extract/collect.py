"""Encoded pieces, in order → layer files, hashes and records, on one thread."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from hubdiff.extract.found import Compared, Layers, Sampled
from hubdiff.extract.pieces import Piece
from hubdiff.hashing import FileHashes, Lane, tensor_hash
from hubdiff.layers import DenseWriter, LayerWriter, PayloadWriter, header_room
from hubdiff.manifest import GROUPS, PROBE_BYTES, Part, TensorRecord
from hubdiff.pair import Pair, TensorPair
from hubdiff.progress import Progress
from hubdiff.safetensors_io import Header
from hubdiff.stream import Block, span_range, unit_dtype

PartsOf = Callable[[TensorPair], dict[str, Part]]


class Collector:
    """Takes the pieces of the ``source``-th file in order: writes their blobs, feeds the hashes,
    makes the records."""

    def __init__(
        self,
        pair: Pair,
        source: int,
        header: Header,
        folder: Path,
        parts: PartsOf,
        base_hashes: FileHashes,
        progress: Progress,
    ) -> None:
        self._parts, self._progress = parts, progress
        here = (pair.tensors.get(entry.name) for entry in header.tensors)
        room = header_room((one.name, one.tuned.entry.shape) for one in here if one)
        self._layers = {group: LayerWriter(folder, group, source, room) for group in GROUPS}
        self._lanes = (Lane(), Lane())
        self._tuned_hashes = FileHashes(pair.tuned)
        self._base_hashes = base_hashes
        self._records: list[TensorRecord] = []
        self._sampled: dict[str, Sampled] = {}
        self._open: _OpenTensor | None = None
        self._compressed = 0

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *error: object) -> None:
        for lane in self._lanes:
            lane.__exit__(None, None, None)
        for layer in self._layers.values():
            layer.__exit__(None, None, None)

    def take(self, block: Block, pieces: list[Piece]) -> None:
        for lane in self._lanes:
            lane.catch_up()
        for piece in pieces:
            self._feed(0, self._tuned_hashes, block.file, piece.span.begin, piece.tuned)
            if piece.pair is not None:
                self._take_piece(piece, piece.pair)
        self._progress.advance(block.nbytes)

    def _take_piece(self, piece: Piece, pair: TensorPair) -> None:
        if self._open is None:
            self._open = _OpenTensor(pair, self._parts(pair), self._layers)
        self._open.add(piece)
        self._compressed += piece.compressed
        if piece.base is not None and pair.base is not None:
            where = span_range(piece.span, pair.base)
            self._feed(1, self._base_hashes, where.file, where.begin, piece.base)
        if piece.span.last:
            self._records.append(self._open.finish())
            if self._open.sampled:
                both = zip(*self._open.sampled, strict=True)
                self._sampled[pair.name] = Sampled.of(*(b"".join(side) for side in both))
            self._open = None

    def _feed(
        self, lane: int, hashes: FileHashes, file: str, offset: int, data: bytes | memoryview
    ) -> None:
        self._lanes[lane].feed(hashes.stream(file), offset, data)

    def compared(self, file: str) -> Compared:
        """What there is to say about the file when all of it is taken."""
        for lane in self._lanes:
            lane.catch_up()
        hashes = {record.tuned_name: record.tuned for record in self._records if record.tuned}
        return Compared(
            self._tuned_hashes.check(file, hashes),
            tuple(self._records),
            self._compressed,
            self._sampled,
        )

    def finish(self) -> Layers:
        """Finish the layers, and close them."""
        with self:
            return {group: layer.finish() for group, layer in self._layers.items()}


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
        self.sampled: list[tuple[bytes, bytes]] = []

    def add(self, piece: Piece) -> None:
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
        self.sampled += piece.sampled
        self._changed += piece.changed
        self._delta_square += piece.delta_square
        self._base_square += piece.base_square

    def _writer(self, group: str) -> PayloadWriter | DenseWriter:
        if group not in self._writers:
            part, entry = self._parts[group], self._pair.tuned.entry
            layer, unit = self._layers[group], unit_dtype(entry.dtype).itemsize
            self._writers[group] = (
                layer.dense(self._pair.name, entry.shape, part)
                if part.encoding == "plain"
                else layer.payload(self._pair.name, entry.nbytes // unit, part)
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
