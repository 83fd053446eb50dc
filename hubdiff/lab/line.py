"""The straight line between two models, point by point: (1 − t)·A + t·B, in float32, and with a Δ
on it where one is given. Read span by span: of all that is read, only the point itself is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hubdiff import numerics
from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.delta import Delta
from hubdiff.dense import dense_span
from hubdiff.errors import NamesMismatch, NotPortable, ShapeMismatch
from hubdiff.manifest import TensorRecord
from hubdiff.names import match_names
from hubdiff.pair import FLOATS, check_shapes
from hubdiff.payloads import PayloadHashes
from hubdiff.plan import PORTABLE_GROUPS
from hubdiff.safetensors_io import TensorEntry, tensor_bytes
from hubdiff.stream import Span, read_ranges, span_range, spans_of, unit_dtype


@dataclass(frozen=True)
class Line:
    """Two models of one shape. ``partners``: of each tensor of ``first`` the one of ``last``;
    ``records``: what ``delta`` has for it."""

    first: Checkpoint
    last: Checkpoint
    partners: Mapping[str, str]
    delta: Delta | None = None
    records: Mapping[str, TensorRecord] | None = None

    @classmethod
    def between(cls, first: Checkpoint, last: Checkpoint, delta: Delta | None = None) -> Line:
        """Raises ``NamesMismatch``, ``ShapeMismatch`` or ``NotPortable`` for models that no line
        joins, or a delta that is not of their shape."""
        pairs = match_names(first.tensors, last.tensors).pairs
        alone = next((name for name in first.tensors if name not in pairs), None)
        if alone is not None or len(pairs) != len(last.tensors):
            found = alone or next(n for n in last.tensors if n not in set(pairs.values()))
            raise NamesMismatch(
                f"{found} is a tensor of one of {first.tree.pin} and {last.tree.pin} only",
                next_step="A line joins models of one architecture and size; check the refs.",
            )
        for name, other in pairs.items():
            check_shapes(name, first.tensors[name], last.tensors[other], "first", "last")
        records = None if delta is None else _records(first, delta)
        return cls(first, last, pairs, delta, records)

    def at(self, t: float) -> dict[str, torch.Tensor]:
        """The weights at ``t``: those of the first model at 0, of the last at 1. Tensors that are
        no floats are the first one's."""
        return {name: self._tensor(name, placed, t) for name, placed in self.first.tensors.items()}

    def _tensor(self, name: str, placed: Placed, t: float) -> torch.Tensor:
        entry, other = placed.entry, self.last.tensors[self.partners[name]]
        numbers = entry.dtype in FLOATS and other.entry.dtype in FLOATS
        dtype = torch.float32 if numbers else numerics.torch_dtype(entry.dtype)
        out = torch.empty(entry.shape, dtype=dtype)
        flat = out.view(-1)
        record = (self.records or {}).get(name)
        hashes = PayloadHashes(str(self.delta.tree.pin)) if self.delta is not None else None
        for span in spans_of(entry):
            here = slice(span.first, span.first + span.units)
            point = _numbers(self.first, span, placed)
            if numbers:
                point = torch.lerp(point.float(), _numbers(self.last, span, other).float(), t)
                if record is not None and self.delta is not None and hashes is not None:
                    point += self._difference(span, record, hashes)
            flat[here] = point
        return out

    def _difference(self, span: Span, record: TensorRecord, hashes: PayloadHashes) -> torch.Tensor:
        assert self.delta is not None
        nbytes = tensor_bytes(record.dtype, record.shape)
        own = Span(
            TensorEntry(record.name, record.dtype, record.shape, 0, nbytes), span.first, span.units
        )
        payloads = self.delta.read([(own, record, PORTABLE_GROUPS)])[own]
        hashes.take(own, payloads)
        bits = dense_span(own, payloads, "F32", str(self.delta.tree.pin))
        return torch.from_numpy(bits.view(np.float32))


def _numbers(checkpoint: Checkpoint, span: Span, placed: Placed) -> torch.Tensor:
    place = span_range(span, placed)
    bits = np.frombuffer(read_ranges(checkpoint, [place])[place], unit_dtype(placed.entry.dtype))
    signed = torch.from_numpy(bits.view(f"<i{bits.itemsize}"))
    return signed.view(numerics.torch_dtype(placed.entry.dtype))


def _records(first: Checkpoint, delta: Delta) -> dict[str, TensorRecord]:
    changed = {record.name: record for record in delta.manifest.tensors if record.portable}
    pairs = match_names(list(changed), first.tensors).pairs
    for name, record in changed.items():
        other = pairs.get(name)
        if other is None or record.added:
            raise NamesMismatch(
                f"the delta {'adds' if record.added else 'changes'} {name}, which "
                f"{first.tree.pin} does not have",
                next_step="Give the delta's own base, or a base of its family.",
            )
        shape = first.tensors[other].entry.shape
        if shape != record.shape:
            raise ShapeMismatch(
                f"{name} is {list(record.shape)} in the delta and {list(shape)} in "
                f"{first.tree.pin}",
                next_step="Give the delta's own base, or a base of its family.",
            )
    if delta.manifest.not_portable_reason:
        raise NotPortable(
            f"{delta.tree.pin} can't be added: {delta.manifest.not_portable_reason}",
            next_step="Make a delta from unquantised weights.",
        )
    return {pairs[name]: record for name, record in changed.items()}
