"""What a plan is made of: every tensor's step, every file of the result, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.delta import Delta
from hubdiff.errors import BadManifest
from hubdiff.manifest import Part, TensorRecord
from hubdiff.safetensors_io import Header, TensorEntry
from hubdiff.sidecars import LeftOut
from hubdiff.stream import BLOCK_BYTES, workers_for

OWN_BASE, TRANSFER = "own base", "transfer"
PORTABLE_GROUPS = ("delta", "tail")
CARD = "README.md"


@dataclass(frozen=True)
class Term:
    """What one delta has for one tensor: the parts of ``record`` in ``groups``, times ``scale``."""

    delta: Delta
    record: TensorRecord
    groups: tuple[str, ...]
    scale: float = 1.0

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for part in self.record.parts if part.group in self.groups)


@dataclass(frozen=True)
class Step:
    """How one tensor of a result comes about: ``source`` (the target's tensor, None when all of it
    comes from the delta) plus its ``terms``. No terms, or none with a part: a plain copy."""

    entry: TensorEntry
    source: Placed | None
    terms: tuple[Term, ...] = ()

    @property
    def copies(self) -> bool:
        return not any(term.parts for term in self.terms)

    @property
    def delta_bytes(self) -> int:
        return sum(part.bytes for term in self.terms for part in term.parts)


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
    """A file of the result that is taken as it is: from ``origin`` (``"target"`` or ``"delta"``) at
    ``source``, or ``data`` made here. ``note`` says what a reader should know of the choice."""

    path: str
    size: int
    origin: str
    source: str | None = None
    sha256: str | None = None
    data: bytes | None = None
    note: str | None = None


@dataclass(frozen=True)
class MergePlan:
    case: str
    reason: str
    scale: float
    delta: Delta
    target: Checkpoint
    weights: tuple[WeightsFile, ...]
    files: tuple[WholeFile, ...]
    notes: tuple[str, ...]
    proved: bool = True
    left_out: tuple[LeftOut, ...] = ()
    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def reads(self) -> dict[str, int]:
        """Bytes of weights and side files to read, by source. Headers and manifest, which planning
        itself reads, are not among them."""
        target = sum(s.source.entry.nbytes for s in self._steps() if s.source)
        delta = sum(step.delta_bytes for step in self._steps())
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
        for step in self._steps():
            for term in step.terms:
                for part in term.parts:
                    placed = term.delta.placed(term.record, part.group)
                    if placed and term.delta.tree.is_remote(placed.placed.file):
                        total += part.bytes
        trees = {"target": self.target.tree, "delta": self.delta.tree}
        for file in self.files:
            if file.source and trees[file.origin].is_remote(file.source):
                total += file.size
        return total

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
        runtime, per_block = 300 << 20, 8 * BLOCK_BYTES
        return runtime + (workers_for(remote=self.remote) + 2) * per_block

    def _steps(self) -> Iterator[Step]:
        for file in self.weights:
            yield from file.steps.values()

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "reason": self.reason,
            "scale": self.scale,
            "delta": str(self.delta.tree.pin),
            "target": str(self.target.tree.pin),
            "read": {**self.reads, "network": self.network},
            "write": self.writes,
            "peak_memory": self.peak_memory,
            "files": [_weights_json(file) for file in self.weights]
            + [_whole_json(file) for file in self.files],
            "added": list(self.added),
            "kept": list(self.kept),
            "left_out": [vars(item) for item in self.left_out],
            "notes": list(self.notes),
        }


def _weights_json(file: WeightsFile) -> dict[str, Any]:
    steps = file.steps.values()
    return {
        "path": file.path,
        "bytes": file.header.file_size,
        "action": "merge",
        "tensors": len(steps),
        "changed": sum(not step.copies for step in steps),
    }


def _whole_json(file: WholeFile) -> dict[str, Any]:
    action = {"target": "copy from target", "delta": "copy from delta"}.get(file.origin, "write")
    note = {"note": file.note} if file.note else {}
    return {"path": file.path, "bytes": file.size, "action": action, **note}


def require_file(delta: Delta, path: str) -> None:
    """Raise unless the delta holds the file its manifest lists."""
    if path not in delta.tree.files():
        raise BadManifest(
            f"{delta.tree.pin}/{path} is missing, the manifest lists it",
            next_step="The delta was not uploaded whole; ask its author to push it again.",
        )
