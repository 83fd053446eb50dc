"""Δ as dense tensors: decoded, nothing added to anything."""

from __future__ import annotations

import numpy as np
import torch

from hubdiff import numerics
from hubdiff.delta import Delta
from hubdiff.device import Cpu, Layers, difference_of
from hubdiff.errors import NotPortable
from hubdiff.hashing import StreamHash
from hubdiff.manifest import Part, TensorRecord
from hubdiff.payloads import PayloadHashes, SpanBytes, decode_segments
from hubdiff.plan import PORTABLE_GROUPS
from hubdiff.progress import Progress
from hubdiff.safetensors_io import Header, TensorEntry, tensor_bytes
from hubdiff.stream import Block, Span, spans_of, unit_bytes, unit_dtype
from hubdiff.writer import OutputFile


def dense_dtype(record: TensorRecord) -> str:
    """The dtype of a tensor's dense Δ: that of ``hi``, or its own for an added tensor."""
    part = record.part("delta")
    assert part is not None
    return part.dtype


def dense_span(span: Span, payloads: list[SpanBytes], dtype: str, where: str) -> np.ndarray:
    """The bits of Δ for one span in ``dtype``, ``hi + lo`` rounded once."""
    out = np.empty(span.units, unit_dtype(dtype))
    parts = [payload.where.part.part for payload in payloads]
    for units, layers in decode_segments(span, payloads, where, Cpu()):
        out[units] = _segment(parts, layers, units.stop - units.start, dtype)
    return out


def _segment(parts: list[Part], layers: Layers, count: int, dtype: str) -> np.ndarray:
    raw = layers.get("raw")
    if raw is not None:
        return numerics.to_bits(raw)
    delta, wanted = difference_of(parts[0], layers), numerics.torch_dtype(dtype)
    if delta is None:
        return numerics.to_bits(torch.full((count,), numerics.UNCHANGED, dtype=wanted))
    nothing = torch.full_like(delta.hi, numerics.UNCHANGED)
    return numerics.to_bits(numerics.add(nothing, delta, 1.0, wanted))


def dense_tensor(delta: Delta, record: TensorRecord) -> torch.Tensor:
    """Δ of a tensor in float32, or an added tensor in its own dtype. Raises ``NotPortable`` for one
    whose change is no number to add."""
    if not record.portable:
        return _unmoved(delta, record)
    dtype = record.dtype if record.added else "F32"
    entry = TensorEntry(
        record.name, record.dtype, record.shape, 0, tensor_bytes(record.dtype, record.shape)
    )
    where = str(delta.tree.pin)
    hashes = PayloadHashes(where)
    pieces = []
    for span in spans_of(entry):
        payloads = delta.read([(span, record, PORTABLE_GROUPS)])[span]
        hashes.take(span, payloads)
        pieces.append(dense_span(span, payloads, dtype, where))
    units = torch.from_numpy(np.concatenate(pieces).view(f"<i{unit_bytes(dtype)}"))
    return units.view(numerics.torch_dtype(dtype)).reshape(record.shape)


def _unmoved(delta: Delta, record: TensorRecord) -> torch.Tensor:
    """Δ of a tensor that has none: it did not change, or its full-precision master did not."""
    if record.parts and delta.manifest.master is None:
        raise NotPortable(
            f"{delta.tree.pin}: tensor {record.name!r} is stored for the own base only, it has no "
            "difference in numbers",
            next_step="hubdiff apply to the delta's own base gives the tuned tensor.",
        )
    return torch.full(record.shape, numerics.UNCHANGED)


class DenseFile:
    """Writes the dense Δ of every record under ``header``, block by block."""

    def __init__(
        self,
        delta: Delta,
        records: dict[str, TensorRecord],
        header: Header,
        output: OutputFile,
        progress: Progress,
    ) -> None:
        self._delta, self._records, self._output = delta, records, output
        self._where, self._progress = str(delta.tree.pin), progress
        self._hashes = PayloadHashes(self._where)
        self._result = StreamHash(header.file_size)
        self._result.update(0, header.raw)
        output.write_at(0, header.raw)

    def make(self, block: Block) -> list[tuple[Span, list[SpanBytes], memoryview]]:
        found = self._delta.read(
            (span, self._records[span.entry.name], PORTABLE_GROUPS) for span in block.spans
        )
        made = []
        for span in block.spans:
            dense = dense_span(span, found[span], span.entry.dtype, self._where)
            data = dense.view(np.uint8).data
            self._output.write_at(span.begin, data)
            made.append((span, found[span], data))
        return made

    def take(self, block: Block, made: list[tuple[Span, list[SpanBytes], memoryview]]) -> None:
        for span, payloads, data in made:
            self._hashes.take(span, payloads)
            self._result.update(span.begin, data)
        self._progress.advance(block.nbytes)

    def digest(self) -> str:
        """The sha256 of the file, once every block was taken."""
        return self._result.digest() or ""
