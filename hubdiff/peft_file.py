"""Adapters written from deltas, for PEFT to load.

Two kinds. A delta that was made from an adapter has every bit of its file: factors, whole tensors
as differences, and the header they stood under. A delta of truncated matrices becomes an adapter of
its own: the factors as they are, under the names that the base's modules have.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hubdiff.adapter import WEIGHTS
from hubdiff.checkpoint import Checkpoint
from hubdiff.delta import Delta
from hubdiff.errors import BadManifest, WrongBase
from hubdiff.hashing import check_hash, tensor_hash
from hubdiff.manifest import GROUPS, AdapterTensor, FileRecord, LowRank, TensorRecord, TunedFile
from hubdiff.merge import make_span
from hubdiff.names import match_names
from hubdiff.plan import Step, Term
from hubdiff.progress import Progress
from hubdiff.safetensors_io import TensorEntry, build_header, parse_header
from hubdiff.stream import Range, read_ranges, span_range, spans_of, unit_dtype
from hubdiff.trimming import Trims
from hubdiff.writer import Sink

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = Iterator[tuple[TensorEntry, Iterator[bytes | memoryview]]]


def needs_base(delta: Delta) -> bool:
    """Whether the adapter's file has tensors that only the base and the delta make together."""
    return any(
        tensor.role == "base" or (tensor.role == "whole" and not _record(delta, tensor).added)
        for tensor in delta.manifest.adapter or ()
    )


def write_again(
    delta: Delta, file: TunedFile, base: Checkpoint | None, sink: Sink, progress: Progress
) -> FileRecord:
    """The file that an adapter's delta was made from, byte for byte. Raises ``WrongBase`` where the
    base is another, ``IntegrityError``."""
    header = parse_header(file.header or b"", file.size, file.path)
    again = _Again(delta, base)
    tensors = ((entry, again.pieces(entry)) for entry in header.tensors)
    record = _write(file.path, header.raw, file.size, tensors, sink, progress)
    check_hash(record.sha256, file.sha256, f"the rebuilt {file.path}")
    return record


class _Again:
    """The tensors of an adapter's file."""

    def __init__(self, delta: Delta, base: Checkpoint | None) -> None:
        self._delta, self._base = delta, base
        self._said = {tensor.name: tensor for tensor in delta.manifest.adapter or ()}
        self._factors = _FactorReader(delta)

    def pieces(self, entry: TensorEntry) -> Iterator[bytes | memoryview]:
        said = self._said.get(entry.name)
        if said is None:
            raise _bad(self._delta, f"says nothing of the adapter's tensor {entry.name!r}")
        record = _record(self._delta, said)
        if said.role in ("left", "right"):
            data = self._factors.read(record, said.role, transposed=said.transposed)
            if len(data) != entry.nbytes:
                raise _bad(self._delta, f"gives {entry.name!r} factors of another size")
            yield data
        elif said.role == "base":
            yield from self._of_base(record, entry, ())
        else:
            if (record.dtype, record.shape) != (entry.dtype, entry.shape):
                raise _bad(self._delta, f"has another {entry.name!r} than the adapter's header")
            yield from self._of_base(record, entry, (Term(self._delta, record, GROUPS),))

    def _of_base(
        self, record: TensorRecord, entry: TensorEntry, terms: tuple[Term, ...]
    ) -> Iterator[bytes | memoryview]:
        """A tensor of the base, with what ``terms`` add to it."""
        source = None if record.added or self._base is None else self._base.tensors.get(record.name)
        if source is None and not record.added:
            raise self._wrong_base(record)
        if source is not None and source.entry.shape != entry.shape:
            raise self._wrong_base(record)
        step, digest = Step(entry, source, terms), tensor_hash()
        for span in spans_of(entry):
            view = None
            if source is not None and self._base is not None:
                place = span_range(span, source)
                view = read_ranges(self._base, [place])[place]
                digest.update(view)
            found = [self._delta.read([(span, t.record, t.groups)])[span] for t in terms]
            if not terms:
                assert view is not None
                yield view
            else:
                yield make_span(span, step, view, found, Trims())
        if source is not None and digest.hexdigest() != record.base:
            raise self._wrong_base(record)

    def _wrong_base(self, record: TensorRecord) -> WrongBase:
        where = self._base.tree.pin if self._base else "the base"
        return WrongBase(
            f"{record.name} of {where} is not that of the delta's base "
            f"{self._delta.manifest.base.name}",
            next_step="Give the very base that the delta was made from with --base.",
        )


class _FactorReader:
    """The factors of one tensor after the other: each payload is read once."""

    def __init__(self, delta: Delta) -> None:
        self._delta = delta
        self._last: tuple[str, memoryview] | None = None

    def read(self, record: TensorRecord, role: str, *, transposed: bool) -> bytes:
        part = self._delta.placed(record, "delta")
        if part is None or part.part.low_rank is None:
            raise _bad(self._delta, f"has no factors for {record.name!r}")
        if self._last is None or self._last[0] != record.name:
            entry = part.placed.entry
            where = Range(part.placed.file, entry.begin, entry.end)
            payload = read_ranges(self._delta.layer("delta"), [where])[where]
            digest = tensor_hash()
            digest.update(payload)
            what = f"{self._delta.tree.pin}, delta layer of {record.name}"
            check_hash(digest.hexdigest(), part.part.blake3, what)
            part.part.low_rank.product(record.shape).require_numbers(payload)
            self._last = (record.name, payload)
        left, right = part.part.low_rank.product(record.shape).factors(self._last[1])
        factor = left if role == "left" else right
        return (factor.T if transposed else factor).tobytes()


# --- an adapter of its own ---


@dataclass(frozen=True)
class LeftOut:
    """A tensor that changed and is not in the adapter: its share of ‖Δ‖², and why."""

    name: str
    share: float
    reason: str


@dataclass(frozen=True)
class _Entry:
    """One tensor of the adapter's file: the factor of a record that it is, and its shape."""

    name: str
    shape: tuple[int, ...]
    record: TensorRecord
    role: str
    transposed: bool


@dataclass
class Lora:
    """The adapter that a delta's factors make for ``model``, the base's modules without weights.
    ``modules`` maps the modules that get factors to rank and scale; ``notes`` are for people."""

    delta: Delta
    model: PreTrainedModel
    modules: dict[str, LowRank] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _entries: list[_Entry] = field(default_factory=list)
    _transposed: bool = False

    def __post_init__(self) -> None:
        records = [r for r in self.delta.manifest.tensors if r.parts]
        total = sum(record.delta_norm**2 for record in records) or 1.0
        weights = {f"{n}.weight": m for n, m in self.model.named_modules() if hasattr(m, "weight")}
        pairs = match_names([record.name for record in records], weights).pairs
        for record in records:
            name = pairs.get(record.name, "")
            reason = self._add(record, name.removesuffix(".weight"), weights.get(name))
            if reason is not None:
                share = record.delta_norm**2 / total
                self.left_out.append(LeftOut(record.name, share, reason))

    def _add(self, record: TensorRecord, name: str, module: Any) -> str | None:
        """Take a tensor into the adapter, or say why not."""
        part = record.part("delta")
        if part is None or part.low_rank is None:
            return "stored exactly, not as factors"
        if module is None or tuple(module.weight.shape) != record.shape:
            return "no module of the base has this weight"
        entries = list(_entries(record, name, module, part.low_rank.rank))
        if not entries:
            return f"PEFT has no LoRA for a {type(module).__name__}"
        self._entries += entries
        self.modules[name] = part.low_rank
        self._transposed |= type(module).__name__ == "Conv1D"
        self._follow_tie(record, name, module, part.low_rank)
        return None

    def _follow_tie(self, record: TensorRecord, name: str, module: Any, said: LowRank) -> None:
        """The output head of a model that ties it is another module to PEFT."""
        config: Any = self.model.config
        if module is not self.model.get_input_embeddings() or not config.tie_word_embeddings:
            return
        head = self.model.get_output_embeddings()
        found = next((n for n, m in self.model.named_modules() if m is head), None)
        if found is None or head is None or f"{found}.weight" in self.delta.records:
            return
        self._entries += _entries(record, found, head, said.rank)
        self.modules[found] = said
        self.notes.append(
            f"{found} is tied to {name}: both get the same factors, for use without merging"
        )

    def config(self) -> dict[str, Any]:
        base = self.delta.manifest.base
        ranks = {name: said.rank for name, said in self.modules.items()}
        alphas = {name: said.rank * said.scale for name, said in self.modules.items()}
        rank = max(ranks.values())
        kind = type(self.model).__name__
        return {
            "peft_type": "LORA",
            "task_type": next((t for end, t in _TASKS.items() if kind.endswith(end)), None),
            "base_model_name_or_path": base.repo or base.name,
            "revision": base.commit,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "fan_in_fan_out": self._transposed,
            "bias": "none",
            "target_modules": sorted(self.modules),
            "rank_pattern": {_exactly(n): r for n, r in sorted(ranks.items()) if r != rank},
            "alpha_pattern": {_exactly(n): a for n, a in sorted(alphas.items()) if a != rank},
        }

    def write(self, sink: Sink, progress: Progress) -> FileRecord:
        """``adapter_model.safetensors``, its tensors in the order of the delta."""
        layout = []
        for entry in self._entries:
            part = entry.record.part("delta")
            assert part is not None
            assert part.low_rank is not None
            size = unit_dtype(part.low_rank.dtype).itemsize
            nbytes = int(np.prod(entry.shape)) * size
            layout.append((entry.name, part.low_rank.dtype, entry.shape, nbytes))
        # Wide elements first: every tensor is then aligned, as safetensors lays files out.
        order = sorted(range(len(layout)), key=lambda i: layout[i][1] != "F32")
        raw = build_header([layout[i] for i in order], {"format": "pt"})
        header = parse_header(raw, len(raw) + sum(item[3] for item in layout), WEIGHTS)
        made, factors = {entry.name: entry for entry in self._entries}, _FactorReader(self.delta)

        def tensors() -> Tensors:
            for entry in header.tensors:
                e = made[entry.name]
                yield entry, iter([factors.read(e.record, e.role, transposed=e.transposed)])

        return _write(WEIGHTS, raw, header.file_size, tensors(), sink, progress)


_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}


def _exactly(module: str) -> str:
    """A pattern of PEFT that matches this module alone."""
    return "^" + re.escape(module)


def _entries(record: TensorRecord, name: str, module: Any, rank: int) -> Iterator[_Entry]:
    """The two factors of a module as PEFT names and shapes them."""
    nn, prefix = torch.nn, f"base_model.model.{name}"
    rows, columns = record.shape[0], record.shape[1:]
    if isinstance(module, nn.Linear):
        yield _Entry(f"{prefix}.lora_A.weight", (rank, *columns), record, "right", False)
        yield _Entry(f"{prefix}.lora_B.weight", (rows, rank), record, "left", False)
    elif type(module).__name__ == "Conv1D":  # transformers' own: a Linear stored transposed
        yield _Entry(f"{prefix}.lora_A.weight", (rank, rows), record, "left", True)
        yield _Entry(f"{prefix}.lora_B.weight", (*columns, rank), record, "right", True)
    elif isinstance(module, nn.Embedding):
        yield _Entry(f"{prefix}.lora_embedding_A", (rank, rows), record, "left", True)
        yield _Entry(f"{prefix}.lora_embedding_B", (*columns, rank), record, "right", True)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
        ones = (1,) * (len(columns) - 1)
        yield _Entry(f"{prefix}.lora_A.weight", (rank, *columns), record, "right", False)
        yield _Entry(f"{prefix}.lora_B.weight", (rows, rank, *ones), record, "left", False)


# --- writing ---


def _write(
    path: str, raw: bytes, size: int, tensors: Tensors, sink: Sink, progress: Progress
) -> FileRecord:
    output, digest = sink.open(path, size), hashlib.sha256(raw)
    progress.start("exporting", size)
    try:
        output.write_at(0, raw)
        progress.advance(len(raw))
        for entry, pieces in tensors:
            position = entry.begin
            for piece in pieces:
                output.write_at(position, piece)
                digest.update(piece)
                position += len(piece)
            progress.advance(entry.nbytes)
    finally:
        output.close()
    progress.finish()
    record = FileRecord(path, size, digest.hexdigest())
    sink.finish(record)
    return record


def _record(delta: Delta, tensor: AdapterTensor) -> TensorRecord:
    record = delta.records.get(tensor.tensor)
    if record is None:
        raise _bad(delta, f"gives {tensor.name!r} to a tensor that it does not list")
    return record


def _bad(delta: Delta, what: str) -> BadManifest:
    return BadManifest(
        f"{delta.tree.pin}/hubdiff.json {what}",
        next_step="The delta is damaged; ask its author to push it again.",
    )


__all__ = ["WEIGHTS", "LeftOut", "Lora", "needs_base", "write_again"]
