"""What a plan is made of: every tensor's step, every file of the result, and what they cost."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.delta import Delta
from hubdiff.encodings.payload import index_bytes
from hubdiff.errors import CannotApply
from hubdiff.forecast import Look
from hubdiff.manifest import Part, TensorRecord
from hubdiff.plan.alignment import Alignment
from hubdiff.rows import Run, whole_name
from hubdiff.safetensors_io import Header, TensorEntry
from hubdiff.scales import LARGEST_FLOAT32, Scales
from hubdiff.sidecars import LeftOut
from hubdiff.stream import BLOCK_BYTES, spans_of, unit_bytes, workers_for

OWN_BASE, TRANSFER = "own base", "transfer"
PORTABLE_GROUPS = ("delta", "tail")
CARD = "README.md"


@dataclass(frozen=True)
class Method:
    """How several deltas, or parts of one, are merged. ``linear``: the weighted sum. ``ties``: each
    Δ trimmed to the share ``density`` of its largest elements, signs elected, the weighted mean of
    those that agree (Yadav et al. 2023). ``dare``: each element of Δ kept with the chance
    ``density`` and divided by it, drawn from ``seed``, then the weighted sum (Yu et al. 2024)."""

    name: str
    density: float = 1.0
    seed: int = 0

    @property
    def trims(self) -> bool:
        return self.name == "ties" and self.density < 1

    def as_json(self) -> dict[str, Any]:
        settings = {"density": self.density, "seed": self.seed}
        return {"name": self.name, **{key: settings[key] for key in METHODS[self.name]}}

    def __str__(self) -> str:
        said = self.as_json()
        return ", ".join([said.pop("name"), *(f"{key} {value}" for key, value in said.items())])


# Each method with the settings that it takes.
METHODS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ties": ("density",),
    "dare": ("density", "seed"),
}


@dataclass(frozen=True)
class Weighted:
    """A delta and its weight in the merge."""

    delta: Delta
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What people call it: the repo, with the revision asked for, or the folder's name."""
        pin = self.delta.tree.pin
        if pin.path is not None:
            return pin.path.resolve().name
        return f"{pin.repo}@{pin.ref.revision}" if pin.ref.revision else f"{pin.repo}"


@dataclass(frozen=True)
class Term:
    """What one delta has for one tensor: the parts of ``record`` in ``groups``, times ``scale``
    (that of the tensor) and ``weight`` (that of the delta). ``laid`` says which of its rows are
    laid out where before they act; empty: they are where they belong. ``rows``: how many of the
    tensor's rows have a Δ at all; None: every one."""

    delta: Delta
    record: TensorRecord
    groups: tuple[str, ...]
    scale: float = 1.0
    weight: float = 1.0
    laid: tuple[Run, ...] = ()
    rows: int | None = None

    @property
    def laid_rows(self) -> int:
        """How many rows are laid out."""
        return sum(run.count for run in self.laid)

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for part in self.record.parts if part.group in self.groups)

    @property
    def factor(self) -> float:
        """What Δ is multiplied with, a float32 number. Raises ``CannotApply`` where it is none."""
        return float32(self.weight * self.scale, f"weight times scale of {self.record.name}")

    @property
    def ranked(self) -> Part | None:
        """The part whose ``hi`` says how large each element of Δ is."""
        return next((part for part in self.parts if "hi" in part.layers), None)


def float32(value: float, what: str) -> float:
    """``value`` rounded to float32. Raises ``CannotApply`` where that is not finite."""
    if not abs(value) <= LARGEST_FLOAT32:
        raise CannotApply(
            f"{what} is {value:g}, which is not a finite float32 number",
            next_step="Give weights and scales that float32 can hold.",
        )
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


@dataclass(frozen=True)
class Step:
    """How one tensor of a result comes about: ``source`` (the target's tensor, None when all of it
    comes from the delta) plus its ``terms``. No terms, or none with a part: a plain copy.
    ``method`` merges the terms; None: there is at most one, and the sum is exact."""

    entry: TensorEntry
    source: Placed | None
    terms: tuple[Term, ...] = ()
    method: Method | None = None

    @property
    def copies(self) -> bool:
        return not any(term.parts for term in self.terms)

    @property
    def delta_bytes(self) -> int:
        """What is read of the deltas while the tensor is merged."""
        return sum(part.bytes for term in self.terms if not term.laid for part in term.parts)


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file of the result that is written tensor by tensor. ``sha256`` is what it must
    come to, where that is known beforehand."""

    path: str
    header: Header
    steps: dict[str, Step]
    sha256: str | None = None


@dataclass(frozen=True)
class WholeFile:
    """A file of the result that is taken as it is: from ``origin`` (``"target"`` or ``"delta"``,
    then ``delta`` is which) at ``source``, or ``data`` made here. ``note`` says what a reader
    should know of the choice."""

    path: str
    size: int
    origin: str
    source: str | None = None
    sha256: str | None = None
    data: bytes | None = None
    note: str | None = None
    delta: Delta | None = None


@dataclass(frozen=True)
class MergePlan:
    """``method`` None: one delta, added exactly. ``looks`` are read before the run, to tell how far
    the target lies from the base of each delta. ``alignments``, one for each delta, say where its
    rows of the vocabulary go; None: where they are."""

    case: str
    reason: str
    scale: Scales
    deltas: tuple[Weighted, ...]
    target: Checkpoint
    weights: tuple[WeightsFile, ...]
    files: tuple[WholeFile, ...]
    notes: tuple[str, ...]
    proved: bool = True
    left_out: tuple[LeftOut, ...] = ()
    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    method: Method | None = None
    looks: tuple[Look, ...] = ()
    alignments: tuple[Alignment | None, ...] = ()

    @property
    def reads(self) -> dict[str, int]:
        """Bytes of weights, samples and side files to read, by source. Headers and manifest, which
        planning itself reads, are not among them; what is read twice counts twice."""
        target = sum(s.source.entry.nbytes for s in self._steps() if s.source)
        target += sum(look.target_bytes for look in self.looks)
        delta = sum(step.delta_bytes for step in self._steps())
        delta += sum(look.delta_bytes for look in self.looks)
        delta += sum(nbytes for _, _, nbytes in (*self._trimmed(), *self._laid()))
        for file in self.files:
            target += file.size if file.origin == "target" else 0
            delta += file.size if file.origin == "delta" else 0
        return {"target": target, "delta": delta}

    @property
    def network(self) -> int:
        """How many of those bytes cost traffic."""
        total = sum(
            step.source.entry.nbytes
            for step in self._steps()
            if step.source and self.target.tree.is_remote(step.source.file)
        )
        terms = [term for step in self._steps() for term in step.terms if not term.laid]
        parts = [(term, part, part.bytes) for term in terms for part in term.parts]
        for term, part, nbytes in [*parts, *self._trimmed(), *self._laid()]:
            placed = term.delta.placed(term.record, part.group)
            if placed and term.delta.tree.is_remote(placed.placed.file):
                total += nbytes
        for file in self.files:
            tree = file.delta.tree if file.delta else self.target.tree
            if file.source and tree.is_remote(file.source):
                total += file.size
        return total + sum(look.network for look in self.looks)

    def alignment_of(self, delta: Delta) -> Alignment | None:
        """Where a delta's rows of the vocabulary go; None: they stay where they are."""
        found = zip(self.deltas, self.alignments, strict=False)
        return next((one for item, one in found if item.delta is delta), None)

    def _trimmed(self) -> Iterator[tuple[Term, Part, int]]:
        """What is read of each tensor to find the threshold of its Δ, before it is merged."""
        if self.method is None or not self.method.trims:
            return
        steps = [(s, term) for s in self._steps() for term in s.terms if not term.laid]
        first = {(term.delta, term.record.name): (step, term) for step, term in reversed(steps)}
        for step, term in first.values():
            part = term.ranked
            if part is not None:
                yield term, part, _pass_bytes(step.entry, part) * trim_passes(part)

    def _laid(self) -> Iterator[tuple[Term, Part, int]]:
        """What is read of each tensor whose rows are laid out anew: once, wherever they go."""
        terms = [term for step in self._steps() for term in step.terms if term.laid]
        for term in {(term.delta, term.record.name): term for term in terms}.values():
            for part in term.parts:
                yield term, part, part.bytes

    @property
    def scratch(self) -> int:
        """Bytes of temporary files at most: rows that are laid out anew."""
        steps = [(s.entry, term) for s in self._steps() for term in s.terms if term.laid]
        return sum(
            entry.count * (unit_bytes(term.parts[0].dtype) + 4 * ("lo" in _layers(term)))
            for entry, term in steps
        )

    @property
    def writes(self) -> int:
        return sum(f.header.file_size for f in self.weights) + sum(f.size for f in self.files)

    @property
    def remote(self) -> bool:
        return any(self.target.tree.is_remote(file) for file in self.target.shards)

    @property
    def peak_memory(self) -> int:
        """An upper estimate in bytes: torch and Python, and the blocks in flight, each with what is
        read, decoded and written."""
        # A method holds Δ of each term in float32, and about as much again while it computes.
        blocks = 8 if self.method is None else 8 + 6 * len(self.deltas)
        runtime, per_block = 300 << 20, blocks * BLOCK_BYTES
        return runtime + (workers_for(remote=self.remote) + 3) * per_block

    def _steps(self) -> Iterator[Step]:
        for file in self.weights:
            yield from file.steps.values()

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "reason": self.reason,
            "scale": self.scale.as_json(),
            "method": self.method and self.method.as_json(),
            "deltas": [
                {"delta": str(item.delta.tree.pin), "weight": item.weight} for item in self.deltas
            ],
            "target": str(self.target.tree.pin),
            "read": {**self.reads, "network": self.network},
            "write": self.writes,
            "scratch": self.scratch,
            "peak_memory": self.peak_memory,
            "files": [_weights_json(file) for file in self.weights]
            + [_whole_json(file) for file in self.files],
            "added": list(self.added),
            "kept": list(self.kept),
            "left_out": [vars(item) for item in self.left_out],
            "notes": list(self.notes),
            "vocabulary": [item and item.as_json() for item in self.alignments],
        }


def _layers(term: Term) -> set[str]:
    return {layer for part in term.parts for layer in part.layers}


def trim_passes(part: Part) -> int:
    """How often a part is read to find the threshold of a trim: 16 bits of magnitude at a time."""
    return unit_bytes(part.dtype) // 2


def _pass_bytes(entry: TensorEntry, part: Part) -> int:
    """What one more pass over a part reads. The index of a tensor of several spans is read once."""
    spans = sum(1 for _ in spans_of(entry))
    if part.low_rank and spans > 1:
        return 0  # factors are kept in memory while their tensor is worked on
    if part.encoding == "plain" or spans == 1:
        return part.bytes
    return part.bytes - index_bytes(entry.nbytes // unit_bytes(entry.dtype), len(part.layers))


def _weights_json(file: WeightsFile) -> dict[str, Any]:
    steps = file.steps.values()
    return {
        "path": file.path,
        "bytes": file.header.file_size,
        "action": "merge",
        "tensors": len({whole_name(step.entry.name) for step in steps}),
        "changed": len({whole_name(step.entry.name) for step in steps if not step.copies}),
    }


def _whole_json(file: WholeFile) -> dict[str, Any]:
    action = {"target": "copy from target", "delta": "copy from delta"}.get(file.origin, "write")
    note = {"note": file.note} if file.note else {}
    return {"path": file.path, "bytes": file.size, "action": action, **note}
