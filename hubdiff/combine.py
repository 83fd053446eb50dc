"""The result of one span: the target's units plus what the terms of its step add, rounded once.

Bytes in, bytes out; where they come from and what they must hash to is not known here.
"""

from __future__ import annotations

import numpy as np
import torch

from hubdiff import numerics
from hubdiff.errors import CorruptPayload
from hubdiff.payloads import Layers, SpanBytes, decode_segments, difference_of
from hubdiff.plan import Step, Term
from hubdiff.stream import Span, unit_dtype


def combine(
    span: Span,
    step: Step,
    source: memoryview | None,
    payloads: list[list[SpanBytes]],
    device: torch.device,
) -> memoryview:
    """The bytes of ``span`` in the result. ``source`` are the target's bytes for it, ``payloads``
    what each term of ``step`` has for it. Raises ``CorruptPayload``."""
    if source is not None and step.source is not None:
        if not any(payloads) and step.source.entry.dtype == step.entry.dtype:
            return source
        given = np.frombuffer(source, unit_dtype(step.source.entry.dtype))
    else:
        given = None
    (term,) = step.terms
    out = np.empty(span.units, unit_dtype(span.entry.dtype))
    for units, layers in decode_segments(span, payloads[0], str(term.delta.tree.pin)):
        target = None if given is None else given[units]
        out[units] = _segment(step, term, target, layers, device)
    return out.view(np.uint8).data


def _segment(
    step: Step, term: Term, target: np.ndarray | None, layers: Layers, device: torch.device
) -> np.ndarray:
    """The bits of one segment of the result."""
    if "raw" in layers:
        raw = layers["raw"]
        if raw is None and target is None:
            raise CorruptPayload(f"{term.delta.tree.pin}: a segment has no bytes at all")
        chosen = target if raw is None else raw
        assert chosen is not None
        return chosen
    assert target is not None
    assert step.source is not None
    dtype = numerics.DTYPES[step.entry.dtype]
    given = numerics.from_bits(target, step.source.entry.dtype)
    carrier = next((part for part in term.parts if {"hi", "lo"} & set(part.layers)), None)
    delta = difference_of(carrier, layers) if carrier else None
    if delta is not None:
        result = _add(given, delta, term.scale, dtype, device)
    else:
        result = numerics.cast(given, dtype)
    ulp = layers.get("ulp")
    if ulp is not None:
        zigzagged = torch.from_numpy(ulp.view(f"<i{ulp.itemsize}"))
        result = numerics.correct(result, zigzagged)
    return numerics.to_bits(result)


def _add(
    given: torch.Tensor,
    delta: numerics.Difference,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    moved = numerics.Difference(
        delta.hi.to(device), None if delta.lo is None else delta.lo.to(device)
    )
    return numerics.add(given.to(device), moved, scale, dtype).cpu()
