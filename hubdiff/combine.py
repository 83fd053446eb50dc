"""The result of one span: the target's units plus what the terms of its step add, rounded once.

Tensors of bytes in and out, on the device of the work at hand; where they come from and what they
must hash to is not known here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hubdiff import numerics
from hubdiff.device import Layers, Work, difference_of
from hubdiff.errors import CorruptPayload
from hubdiff.payloads import SpanBytes, decode_segments
from hubdiff.plan import Step, Term
from hubdiff.stream import Span, unit_bytes


def combine(
    span: Span,
    step: Step,
    source: Tensor | None,
    payloads: list[list[SpanBytes]],
    work: Work,
) -> Tensor:
    """The bytes of ``span`` in the result (uint8, on the device of ``work``). ``source`` are the
    target's bytes for it, there too; ``payloads`` what each term of ``step`` has for it. Raises
    ``CorruptPayload``."""
    if source is not None and step.source is not None:
        if not any(payloads) and step.source.entry.dtype == step.entry.dtype:
            return source
        given = source.view(_unit(step.source.entry.dtype))
    else:
        given = None
    (term,) = step.terms
    out = torch.empty(span.units, dtype=_unit(span.entry.dtype), device=work.device)
    where = str(term.delta.tree.pin)
    for units, layers in decode_segments(span, payloads[0], where, work.decode):
        target = None if given is None else given[units]
        out[units] = _segment(step, term, target, layers)
    return out.view(torch.uint8)


def _unit(dtype: str) -> torch.dtype:
    return numerics.UNITS[unit_bytes(dtype)]


def _segment(step: Step, term: Term, target: Tensor | None, layers: Layers) -> Tensor:
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
    given = target.view(numerics.DTYPES[step.source.entry.dtype])
    carrier = next((part for part in term.parts if {"hi", "lo"} & set(part.layers)), None)
    delta = difference_of(carrier, layers) if carrier else None
    if delta is not None:
        result = numerics.add(given, delta, term.scale, dtype)
    else:
        result = numerics.cast(given, dtype)
    ulp = layers.get("ulp")
    if ulp is not None:
        result = numerics.correct(result, ulp)
    return numerics.bits(result)
