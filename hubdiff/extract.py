"""Computing a delta: Δ of every tensor, encoded and written as layer files, hashes on the way.

Both models are read once, block by block in the tuned model's file order; memory does not grow with
them. Each file of the tuned model is compared alone, by the rank in whose share it is. Nothing is
published here.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hubdiff.encodings import ENCODINGS, tails
from hubdiff.floats import bf16, floats
from hubdiff.hashing import FileHashes, Lane, tensor_hash
from hubdiff.layers import (
    DenseWriter,
    LayerFile,
    LayerWriter,
    PayloadWriter,
    header_room,
    number,
)
from hubdiff.manifest import GROUPS, PROBE_BYTES, FileRecord, Part, TensorRecord
from hubdiff.memory import fits_in_cache
from hubdiff.pair import Pair, TensorPair
from hubdiff.progress import Progress
from hubdiff.ranks import ALONE, Ranks
from hubdiff.safetensors_io import Header
from hubdiff.sample import BLOCK, Sample
from hubdiff.segment_delta import HALVES, Comparison, Floats, compare, delta_dtype
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
from hubdiff.writer import disk_errors

# Units of each tensor that tell how far the tuned model itself can be compressed.
_SAMPLE = 1 << 15
_PENDING = "0" * 64  # a hash that is known only when the payload is whole


@dataclass(frozen=True)
class Sampled:
    """The values at a tensor's blocks of the sample: patterns of the base in the sample's dtype, of
    Δ in BF16, in base64 so that ranks can tell each other."""

    base: str
    delta: str

    @classmethod
    def of(cls, base: bytes, delta: bytes) -> Sampled:
        return cls(*(base64.b64encode(data).decode() for data in (base, delta)))


@dataclass(frozen=True)
class Extracted:
    """What ``extract`` found and wrote. ``weights`` are the tuned shards, ``base_files`` the
    base's, by content; ``compressed`` is about how many bytes the tuned tensors themselves would
    take in the encodings of deltas; ``sampled`` is by the base's names. Of the ``layers``, the
    files that are ``here`` were written by this rank; all the rest is the same on every rank."""

    tensors: tuple[TensorRecord, ...]
    layers: dict[str, tuple[FileRecord, ...]]
    weight_map: dict[str, str]
    weights: tuple[FileRecord, ...]
    base_files: tuple[FileRecord, ...]
    here: frozenset[str]
    compressed: int
    sampled: dict[str, Sampled]


Layers = dict[str, tuple[LayerFile, ...]]  # by group


@dataclass(frozen=True)
class _Compared:
    """One file of the tuned model: by content, its tensors, and their layers once these are
    finished."""

    weights: FileRecord
    tensors: tuple[TensorRecord, ...]
    compressed: int
    sampled: dict[str, Sampled]
    layers: Layers = field(default_factory=dict)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> _Compared:
        return cls(
            FileRecord(**document["weights"]),
            tuple(_tensor(record) for record in document["tensors"]),
            document["compressed"],
            {name: Sampled(**values) for name, values in document["sampled"].items()},
            {
                group: tuple(
                    LayerFile(FileRecord(**file["record"]), tuple(file["tensors"]))
                    for file in files
                )
                for group, files in document["layers"].items()
            },
        )


def _tensor(document: dict[str, Any]) -> TensorRecord:
    parts = tuple(Part(**{**p, "layers": tuple(p["layers"])}) for p in document["parts"])
    return TensorRecord(**{**document, "shape": tuple(document["shape"]), "parts": parts})


@dataclass
class _Piece:
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


def extract(
    pair: Pair,
    folder: Path,
    *,
    plain: bool,
    sample: Sample,
    progress: Progress,
    hash_base: bool = True,
    ranks: Ranks = ALONE,
    meanwhile: Callable[[Sequence[TensorRecord]], None] | None = None,
) -> Extracted:
    """Write the layer files of ``pair`` into ``folder``, of several ranks each its share. ``plain``
    stores Δ as dense tensors. Without ``hash_base`` no more of the base is read than the pair
    needs, and no file of it is known by content. ``meanwhile`` is called with what this rank
    compared while its last layers are hashed, which leaves a core idle."""
    shards = pair.tuned.shards
    mine = ranks.share(list(shards), lambda file: shards[file].file_size)
    if any(needs_torch(item) for item in pair.tensors.values()):
        import torch  # noqa: F401 - before the threads that use it begin
    sides = [side for side in (pair.tuned, pair.base, pair.master) if side]
    if not fits_in_cache(sum(h.file_size for side in sides for h in side.shards.values())):
        for side in sides:
            side.once = True
    progress.start("comparing tuned and base", sum(shards[file].file_size for file in mine))
    base_hashes = FileHashes(pair.base)
    worker = _Worker(pair, plain, sample)
    done = _compare(pair, folder, mine, worker, base_hashes, progress, meanwhile)
    progress.finish()
    given = ranks.gather({file: asdict(one) for file, one in done.items()}, "comparing")
    everyone = {file: one for rank in given for file, one in rank.items()}
    compared = [_Compared.from_json(everyone[file]) for file in shards]
    base_files = _base_files(pair, compared, base_hashes, ranks) if hash_base else ()
    return _number(folder, compared, mine, base_files)


def _compare(
    pair: Pair,
    folder: Path,
    mine: list[str],
    worker: _Worker,
    base_hashes: FileHashes,
    progress: Progress,
    meanwhile: Callable[[Sequence[TensorRecord]], None] | None,
) -> dict[str, _Compared]:
    """The files of the tuned model that are ``mine``. While one is compared, the layers of the one
    before are hashed and get to the disk."""
    shards = pair.tuned.shards
    remote = any(
        side.tree.is_remote(file) for side in (pair.tuned, pair.base) for file in side.shards
    )
    workers = workers_for(remote=remote)
    found: dict[str, _Compared] = {}
    layers: dict[str, Future[Layers]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="hubdiff-finish") as finishing:
        for source, (file, header) in enumerate(shards.items()):
            if file not in mine:
                continue
            with ExitStack() as opened:
                collector = opened.enter_context(
                    _Collector(pair, source, header, folder, worker.parts, base_hashes, progress)
                )
                progress.advance(len(header.raw))
                run_ordered(blocks(file, header), worker.work, collector.take, workers)
                found[file] = collector.compared(file)
                for earlier in layers.values():
                    earlier.result()  # an error isn't held back, and no more than one file waits
                opened.pop_all()  # `finish` closes it, and nobody may twice
                layers[file] = finishing.submit(collector.finish)
        if meanwhile is not None:
            meanwhile([record for one in found.values() for record in one.tensors])
        return {file: replace(one, layers=layers[file].result()) for file, one in found.items()}


def _number(
    folder: Path, compared: list[_Compared], mine: list[str], base_files: tuple[FileRecord, ...]
) -> Extracted:
    """Give the layer files their names; those that are here get them on the disk too."""
    layers: dict[str, tuple[FileRecord, ...]] = {}
    weight_map: dict[str, str] = {}
    here = set()
    for group in GROUPS:
        files = [(one, file) for one in compared for file in one.layers[group]]
        names = number(group, [file for _, file in files])
        for name, (one, file) in zip(names, files, strict=True):
            if one.weights.path in mine:
                with disk_errors(folder / name):
                    os.rename(folder / file.record.path, folder / name)
                here.add(name)
            if group == "delta":
                weight_map.update(dict.fromkeys(file.tensors, name))
        layers[group] = tuple(
            replace(file.record, path=name) for name, (_, file) in zip(names, files, strict=True)
        )
    return Extracted(
        tuple(record for one in compared for record in one.tensors),
        layers,
        weight_map,
        tuple(one.weights for one in compared),
        base_files,
        frozenset(here),
        sum(one.compressed for one in compared),
        {name: values for one in compared for name, values in one.sampled.items()},
    )


def _base_files(
    pair: Pair, compared: list[_Compared], hashes: FileHashes, ranks: Ranks
) -> tuple[FileRecord, ...]:
    """The base's shards by content. What no rank read whole and in order is read once more, by the
    rank in whose share it is then."""
    known = _united(ranks.gather(hashes.whole(), "hashing the base"))
    shards = pair.base.shards
    unread = [file for file in shards if file not in known]
    tensors = {r.name: r.base for one in compared for r in one.tensors if r.base}
    mine = ranks.share(unread, lambda file: shards[file].file_size)
    again = {file: hashes.read(file, tensors) for file in mine}
    known |= _united(ranks.gather(again, "hashing the base"))
    return tuple(hashes.record(file, known[file]) for file in shards)


def _united(given: list[dict[str, str]]) -> dict[str, str]:
    return {file: digest for rank in given for file, digest in rank.items()}


class _Worker:
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
        self, piece: _Piece, pair: TensorPair, source: Floats, base: np.ndarray
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

    def _encode_raw(self, piece: _Piece, segment: int, tuned: np.ndarray, base: np.ndarray) -> None:
        same_type = tuned.dtype == base.dtype
        changed = int(np.count_nonzero(tuned != base)) if same_type else len(tuned)
        piece.changed += changed
        if changed:
            piece.blobs.append(("exact", segment, (ENCODINGS["planes"].encode(tuned),)))

    def _encode_float(self, piece: _Piece, segment: int, compared: Comparison, dtype: str) -> None:
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


class _Collector:
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

    def compared(self, file: str) -> _Compared:
        """What there is to say about the file when all of it is taken."""
        for lane in self._lanes:
            lane.catch_up()
        hashes = {record.tuned_name: record.tuned for record in self._records if record.tuned}
        return _Compared(
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
        self.sampled += piece.sampled
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


def base_patterns(base: np.ndarray, dtype: str, wanted: str) -> bytes:
    """A block of the base in the sample's dtype."""
    return (base if dtype == wanted else floats(base, dtype)).tobytes()


def _delta_patterns(tuned: np.ndarray, base: np.ndarray) -> bytes:
    """A block of Δ, in BF16. Where nothing changes it is −0.0."""
    with np.errstate(all="ignore"):  # what is infinite or no number is left out when it is read
        return bf16(-(base - tuned)).tobytes()


def needs_torch(pair: TensorPair) -> bool:
    """Whether Δ of this tensor is not left to the kernels for bf16."""
    sides = {side.entry.dtype for side in (pair.tuned, pair.base, pair.master) if side}
    return pair.is_float and sides != {"BF16"}


PartsOf = Callable[[TensorPair], dict[str, Part]]


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


def _unit(dtype: str) -> int:
    return unit_dtype(dtype).itemsize
