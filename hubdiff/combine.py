"""The result of one span: the target's units plus what the terms of its step add, rounded once.

Bytes in, bytes out; where they come from and what they must hash to is not known here.
"""

from __future__ import annotations

import numpy as np

from hubdiff import kernels
from hubdiff.errors import CorruptPayload
from hubdiff.payloads import Layers, SpanBytes, decode_segments, difference_of
from hubdiff.plan import Step, Term
from hubdiff.stream import Span, unit_dtype


def combine(
    span: Span,
    step: Step,
    source: memoryview | None,
    payloads: list[list[SpanBytes]],
    device: str,
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
    step: Step, term: Term, target: np.ndarray | None, layers: Layers, device: str
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
    if not needs_torch(step, device):
        quick = _add_bf16(target, layers)
        if quick is not None:
            return quick
    return _add(step, term, target, layers, device)


def needs_torch(step: Step, device: str) -> bool:
    """Whether more is needed than what the kernels for bf16 on the CPU can do."""
    dtypes = {step.entry.dtype, *(part.dtype for term in step.terms for part in term.parts)}
    if step.source is None or all(p.layers == ("raw",) for t in step.terms for p in t.parts):
        return step.source is not None and step.source.entry.dtype != step.entry.dtype
    plain = len(step.terms) == 1 and step.terms[0].scale == 1.0
    return not (device == "cpu" and plain and dtypes | {step.source.entry.dtype} == {"BF16"})


def _add_bf16(target: np.ndarray, layers: Layers) -> np.ndarray | None:
    """None where ``_add`` has to decide: what came out is no number, or there are exact bits."""
    hi, lo = layers.get("hi"), layers.get("lo")
    if layers.get("ulp") is not None or (hi is None and lo is not None):
        return None
    if hi is None:
        return target
    out = np.empty_like(target)
    numbers = kernels.add(target, hi, out)
    if lo is not None:
        numbers &= kernels.add_tail(target, hi, lo, np.flatnonzero(lo != 0), out)
    return out if numbers else None


def _add(step: Step, term: Term, target: np.ndarray, layers: Layers, device: str) -> np.ndarray:
    """Any dtypes, any scale, any device."""
    from hubdiff import numerics

    assert step.source is not None
    dtype = numerics.DTYPES[step.entry.dtype]
    result = numerics.from_bits(target, step.source.entry.dtype)
    carrier = next((part for part in term.parts if {"hi", "lo"} & set(part.layers)), None)
    delta = difference_of(carrier, layers) if carrier else None
    if delta is None:
        result = numerics.cast(result, dtype)
    else:
        hi, lo = (None if part is None else part.to(device) for part in delta)
        assert hi is not None
        moved = numerics.Difference(hi, lo)
        result = numerics.add(result.to(device), moved, term.scale, dtype).cpu()
    ulp = layers.get("ulp")
    if ulp is not None:
        import torch

        zigzagged = torch.from_numpy(ulp.view(f"<i{ulp.itemsize}"))
        result = numerics.correct(result, zigzagged)
    return numerics.to_bits(result)
