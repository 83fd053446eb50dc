"""Layer files of deltas that hold factors: an adapter's own, or those of a truncated Δ.

What has no factors goes through ``extract`` as in any delta, into a scratch folder, and is copied
from there bit for bit.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from hubdiff import numerics
from hubdiff.adapter import Adapter, Factors
from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.encodings import low_rank
from hubdiff.errors import CannotDiff
from hubdiff.extract import Extracted, Sampled, base_patterns, extract
from hubdiff.files import LocalTree
from hubdiff.floats import bf16
from hubdiff.hashing import FileHashes, Lane, tensor_hash
from hubdiff.layers import LayerWriter, header_room, number
from hubdiff.manifest import (
    GROUPS,
    LOW_RANK,
    PROBE_BYTES,
    FileRecord,
    Lossy,
    LowRank,
    Part,
    TensorRecord,
)
from hubdiff.pair import Pair, TensorPair
from hubdiff.progress import Progress
from hubdiff.refs import ModelRef
from hubdiff.safetensors_io import TensorEntry, read_header
from hubdiff.sample import BLOCK, Sample
from hubdiff.stream import (
    Block,
    Range,
    Span,
    blocks,
    read_ranges,
    run_ordered,
    spans_of,
    unit_dtype,
    workers_for,
)
from hubdiff.truncate import Truncation, truncate

SCRATCH = ".scratch"
_COPY = 8 << 20


# --- an adapter ---


def extract_adapter(
    adapter: Adapter, folder: Path, sample: Sample, progress: Progress
) -> Extracted:
    """Write the layer files of an adapter's delta into ``folder``. The base is read once, for its
    fingerprints and norms. Raises ``CannotDiff`` for factors that are not finite, or a copy of a
    base's tensor that is none."""
    with _scratch(folder) as scratch:
        # The result on the own base should be the tuned tensor: not with a Δ rounded to BF16.
        plain = any(_has_float32(pair) for pair in adapter.pair.tensors.values())
        whole = extract(
            adapter.pair, scratch, plain=plain, sample=sample, progress=progress, hash_base=False
        )
        seen = _survey(adapter.pair.base, set(adapter.factors), sample, progress)
        _check_copies(adapter, seen)
        shapes = [(name, one.base.entry.shape) for name, one in adapter.factors.items()]
        with _Layers(folder, scratch, whole, shapes) as layers:
            made = [
                _adapter_record(adapter, name, layers, sample, seen.tensors[name])
                for name in adapter.factors
            ]
            records = [record for record, _ in made]
            records += [layers.keep(record) for record in whole.tensors]
            files, weight_map = layers.finish()
    return replace(
        whole,
        tensors=tuple(records),
        layers=files,
        weight_map=weight_map,
        base_files=seen.files,
        here=_paths(files),
        sampled={**whole.sampled, **{record.name: values for record, values in made}},
    )


def _paths(layers: dict[str, tuple[FileRecord, ...]]) -> frozenset[str]:
    return frozenset(file.path for files in layers.values() for file in files)


def _has_float32(pair: TensorPair) -> bool:
    return "F32" in {placed.entry.dtype for placed in (pair.tuned, pair.base) if placed}


def _adapter_record(
    adapter: Adapter, name: str, layers: _Layers, sample: Sample, seen: _SeenTensor
) -> tuple[TensorRecord, Sampled]:
    factors, source = adapter.factors[name], adapter.pair.tuned
    payload = factor_bytes(source, factors.left, factors) + factor_bytes(
        source, factors.right, factors
    )
    said = LowRank(factors.rank, factors.alpha, factors.scale, factors.dtype, 0.0, None)
    entry = factors.base.entry
    product = said.product(entry.shape)
    norm = _product_norm(product, payload, f"{source.tree.pin}, {name}")
    record = TensorRecord(
        name=name,
        shape=entry.shape,
        dtype=entry.dtype,
        base_dtype=entry.dtype,
        tuned=None,
        base=seen.blake3,
        probe=seen.probe,
        parts=(layers.low_rank(name, payload, said),),
        changed=entry.count if norm else 0,
        delta_norm=norm,
        base_norm=math.sqrt(seen.square),
        tuned_name=name,
    )
    return record, Sampled.of(seen.sampled, _sampled_product(product, payload, sample, name))


def _sampled_product(product: low_rank.Product, payload: bytes, sample: Sample, name: str) -> bytes:
    """Δ at the blocks of the sample, patterns of BF16."""
    pieces = list(sample.pieces_of(name))
    found = [np.empty(piece.count, np.float32) for piece in pieces]
    for piece, values in zip(pieces, found, strict=True):
        product.fill(payload, piece.first, values)
    return b"".join(bf16(values).tobytes() for values in found)


def factor_bytes(source: Checkpoint, placed: Placed, factors: Factors) -> bytes:
    """A factor as a payload holds it: a matrix of its own, turned where the file has it turned."""
    view = _read(source, placed)
    return turned(view, placed.entry) if factors.transposed else bytes(view)


def turned(data: bytes | memoryview, entry: TensorEntry) -> bytes:
    """The bytes of a matrix of ``entry``'s shape, transposed."""
    bits = np.frombuffer(data, unit_dtype(entry.dtype)).reshape(entry.shape)
    return bits.T.tobytes()


def _product_norm(product: low_rank.Product, payload: bytes, where: str) -> float:
    """‖scale · L · R‖ from the Gram matrices of the factors, without the product."""
    left, right = (
        numerics.from_bits(bits.copy().reshape(-1), product.dtype).double().view(bits.shape)
        for bits in product.factors(payload)
    )
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise CannotDiff(
            f"{where}: a factor holds Inf or NaN",
            next_step="The training went wrong there; publish an earlier checkpoint.",
        )
    square = float(((left.T @ left) * (right @ right.T)).sum())
    return abs(product.scale) * math.sqrt(max(square, 0.0))


def _check_copies(adapter: Adapter, seen: _Seen) -> None:
    """PEFT saves an embedding's matrix beside its factors: it must be the base's own."""
    for name, base in adapter.copies.items():
        placed = adapter.pair.tuned.tensors[name]
        same = placed.entry.dtype == base.entry.dtype and placed.entry.shape == base.entry.shape
        digest = tensor_hash()
        for span in spans_of(placed.entry):
            where = Range(placed.file, span.begin, span.begin + span.nbytes)
            digest.update(read_ranges(adapter.pair.tuned, [where])[where])
        if not same or digest.hexdigest() != seen.tensors[base.entry.name].blake3:
            raise CannotDiff(
                f"{name} of {adapter.pair.tuned.tree.pin} is not {base.entry.name} of the base "
                f"{adapter.pair.base.tree.pin}: it was resized or trained besides its factors",
                next_step="Check --base; or merge the adapter into its base and give the merged "
                "model.",
            )


@dataclass(frozen=True)
class _SeenTensor:
    blake3: str
    probe: str
    square: float
    sampled: bytes


@dataclass(frozen=True)
class _Seen:
    """The base by content: its files, and the tensors asked for."""

    files: tuple[FileRecord, ...]
    tensors: dict[str, _SeenTensor]


def _survey(base: Checkpoint, wanted: set[str], sample: Sample, progress: Progress) -> _Seen:
    """Read a model once, file by file."""
    hashes = FileHashes(base)
    tensors: dict[str, _SeenTensor] = {}
    digest, start, square, values = tensor_hash(), bytearray(), 0.0, bytearray()

    def read(block: Block) -> list[tuple[Span, memoryview, float]]:
        where = {s: Range(block.file, s.begin, s.begin + s.nbytes) for s in block.spans}
        views = read_ranges(base, where.values())
        return [
            (span, views[r], _square(views[r], span.entry) if span.entry.name in wanted else 0.0)
            for span, r in where.items()
        ]

    def take(block: Block, read: list[tuple[Span, memoryview, float]]) -> None:
        nonlocal digest, start, square, values
        lane.catch_up()
        for span, view, piece in read:
            lane.feed(hashes.stream(block.file), span.begin, view)
            digest.update(view)
            start += view[: PROBE_BYTES - len(start)]
            square += piece
            if span.entry.name in wanted:
                values += _sampled(view, span, sample)
            if span.last:
                probe = tensor_hash()
                probe.update(start)
                tensors[span.entry.name] = _SeenTensor(
                    digest.hexdigest(), probe.hexdigest(), square, bytes(values)
                )
                digest, start, square, values = tensor_hash(), bytearray(), 0.0, bytearray()
        progress.advance(block.nbytes)

    progress.start("reading the base", sum(header.file_size for header in base.shards.values()))
    remote = any(base.tree.is_remote(file) for file in base.shards)
    with Lane() as lane:
        for file, header in base.shards.items():
            run_ordered(blocks(file, header), read, take, workers_for(remote=remote))
            lane.catch_up()
            progress.advance(len(header.raw))
    progress.finish()
    digests = {name: seen.blake3 for name, seen in tensors.items()}
    return _Seen(tuple(hashes.check(file, digests) for file in base.shards), tensors)


def _sampled(view: memoryview, span: Span, sample: Sample) -> bytes:
    """The base at the blocks of the sample that lie in a span."""
    patterns = np.frombuffer(view, unit_dtype(span.entry.dtype))
    blocks = sample.within(span.entry.name, span.first, span.units)
    starts = [number * BLOCK - span.first for number in blocks]
    parts = [patterns[start : start + BLOCK] for start in starts]
    return b"".join(base_patterns(part, span.entry.dtype, sample.dtype) for part in parts)


def _square(view: memoryview, entry: TensorEntry) -> float:
    """‖values‖², those that are not finite left out."""
    values = numerics.from_bits(np.frombuffer(view, unit_dtype(entry.dtype)), entry.dtype).double()
    return float(torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).square().sum())


# --- a truncated Δ ---


def extract_truncated(
    pair: Pair, folder: Path, wanted: Truncation, sample: Sample, progress: Progress
) -> tuple[Extracted, Lossy]:
    """Write the layer files of ``pair`` into ``folder``, every matrix that is smaller as factors
    as factors. One whole matrix is in memory at a time. Raises ``CannotDiff`` where there is
    none."""
    with _scratch(folder) as scratch:
        packed = extract(pair, scratch, plain=False, sample=sample, progress=progress)
        progress.start("factorising", sum(_matrix_bytes(record) for record in packed.tensors))
        with _Layers(folder, scratch, packed, []) as layers:
            records = []
            for record in packed.tensors:
                records.append(_truncated_record(pair, record, layers, wanted))
                progress.advance(_matrix_bytes(record))
            files, weight_map = layers.finish()
        progress.finish()
    if not any(part.low_rank for record in records for part in record.parts):
        asked = f"rank {wanted.rank}" if wanted.rank else f"an energy of {wanted.energy}"
        raise CannotDiff(
            f"no matrix of {pair.tuned.tree.pin} is smaller as factors of {asked} than packed",
            next_step="Ask for less, or for neither: the packed delta is smaller, and exact.",
        )
    extracted = replace(
        packed, tensors=tuple(records), layers=files, weight_map=weight_map, here=_paths(files)
    )
    return extracted, Lossy(wanted.rank, wanted.energy, _overall_error(records))


def _is_matrix(record: TensorRecord) -> bool:
    part = record.part("delta")
    return part is not None and "hi" in part.layers and len(record.shape) >= 2


def _matrix_bytes(record: TensorRecord) -> int:
    return math.prod(record.shape) * 4 if _is_matrix(record) else 0


def _truncated_record(
    pair: Pair, record: TensorRecord, layers: _Layers, wanted: Truncation
) -> TensorRecord:
    part = record.part("delta")
    if part is not None and _is_matrix(record):
        delta = _delta(pair, pair.tensors[record.tuned_name])
        made = truncate(delta, wanted, part.bytes)
        if made is not None:
            norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
            stored = layers.low_rank(record.name, made.payload, made.low_rank)
            return replace(record, parts=(stored,), delta_norm=norm)
    # What turns base + Δ into tuned is of no use to a delta that rebuilds nothing.
    return layers.keep(
        replace(record, parts=tuple(p for p in record.parts if "ulp" not in p.layers))
    )


def _delta(pair: Pair, tensor: TensorPair) -> torch.Tensor:
    """Δ of a whole tensor as a float32 matrix, tuned − base rounded once."""
    assert tensor.base is not None
    source = (pair.master, tensor.master) if tensor.master else (pair.tuned, tensor.tuned)
    (tuned, base), shape = (source, (pair.base, tensor.base)), tensor.base.entry.shape
    values = _floats(*tuned).float()
    values -= _floats(*base).float()
    return values.view(shape[0], -1)


def _floats(checkpoint: Checkpoint | None, placed: Placed) -> torch.Tensor:
    assert checkpoint is not None
    bits = np.frombuffer(_read(checkpoint, placed), unit_dtype(placed.entry.dtype))
    return numerics.from_bits(bits, placed.entry.dtype)


def _overall_error(records: list[TensorRecord]) -> float:
    missing = sum(
        (part.low_rank.error * record.delta_norm) ** 2
        for record in records
        for part in record.parts
        if part.low_rank
    )
    total = sum(record.delta_norm**2 for record in records)
    return math.sqrt(missing / total) if total else 0.0


# --- writing ---


def _read(checkpoint: Checkpoint, placed: Placed) -> memoryview:
    where = Range(placed.file, placed.entry.begin, placed.entry.end)
    return read_ranges(checkpoint, [where])[where]


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    scratch = folder / SCRATCH
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


@dataclass
class _Layers:
    """The layer files in the making: factors, and parts copied from what ``extract`` wrote.
    ``shapes`` are of the tensors, by name, that it did not write."""

    folder: Path
    scratch: Path
    extracted: Extracted
    shapes: list[tuple[str, tuple[int, ...]]]
    _writers: dict[str, LayerWriter] = field(default_factory=dict)
    _sources: dict[str, Checkpoint] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> _Layers:
        tree = LocalTree(ModelRef(repo=None, revision=None, path=self.scratch))
        shapes = [*self.shapes, *((r.name, r.shape) for r in self.extracted.tensors)]
        room = header_room(shapes)
        for group in GROUPS:
            writer = LayerWriter(self.folder, group, 0, room)
            self._writers[group] = self._stack.enter_context(writer)
            source = Checkpoint(tree, {}, {}, {}, None)
            self._stack.callback(source.close)
            for file in self.extracted.layers[group]:
                header = read_header(source.reader(file.path), file.path)
                source.tensors.update({e.name: Placed(file.path, e) for e in header.tensors})
            self._sources[group] = source
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def low_rank(self, name: str, payload: bytes, said: LowRank) -> Part:
        layer = self._writers["delta"]
        begin = layer.begin()
        layer.append(payload)
        digest = layer.store(name, "U8", (len(payload),), begin)
        return Part("delta", ("hi",), LOW_RANK, "F32", len(payload), digest, said)

    def keep(self, record: TensorRecord) -> TensorRecord:
        """Copy every part of a record."""
        for part in record.parts:
            layer, source = self._writers[part.group], self._sources[part.group]
            placed = source.tensors[record.name]
            entry, begin = placed.entry, layer.begin()
            for offset in range(entry.begin, entry.end, _COPY):
                where = Range(placed.file, offset, min(offset + _COPY, entry.end))
                layer.append(read_ranges(source, [where])[where])
            layer.store(record.name, entry.dtype, entry.shape, begin)
        return record

    def finish(self) -> tuple[dict[str, tuple[FileRecord, ...]], dict[str, str]]:
        """Write the files; which tensor of the delta group lies in which."""
        layers, weight_map = {}, {}
        for group, writer in self._writers.items():
            files = writer.finish()
            names = number(group, files)
            for name, file in zip(names, files, strict=True):
                os.rename(self.folder / file.record.path, self.folder / name)
                if group == "delta":
                    weight_map.update(dict.fromkeys(file.tensors, name))
            layers[group] = tuple(
                replace(file.record, path=name) for name, file in zip(names, files, strict=True)
            )
        return layers, weight_map
