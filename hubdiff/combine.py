"""The result of one span: the target's units plus what the terms of its step add, rounded once.

Tensors of bytes in and out, on the device of the work at hand; where they come from and what they
must hash to is not known here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hubdiff import methods, numerics
from hubdiff.device import Layers, Work, difference_of
from hubdiff.encodings import SEGMENT
from hubdiff.errors import CorruptPayload
from hubdiff.payloads import SpanBytes, decode_segments
from hubdiff.plan import Method, Step, Term, float32
from hubdiff.stream import Span, unit_bytes
from hubdiff.trimming import Trims


def combine(
    span: Span,
    step: Step,
    source: Tensor | None,
    payloads: list[list[SpanBytes]],
    work: Work,
    trims: Trims,
) -> Tensor:
    """The bytes of ``span`` in the result (uint8, on the device of ``work``). ``source`` are the
    target's bytes for it, there too; ``payloads`` what each term of ``step`` has for it; ``trims``
    finds the thresholds of TIES. Raises ``CorruptPayload``."""
    if source is not None and step.source is not None:
        if not any(payloads) and step.source.entry.dtype == step.entry.dtype:
            return source
        given = source.view(_unit(step.source.entry.dtype))
    else:
        given = None
    out = torch.empty(span.units, dtype=_unit(span.entry.dtype), device=work.device)
    decoded = [
        decode_segments(span, found, str(term.delta.tree.pin), work)
        for term, found in zip(step.terms, payloads, strict=True)
    ]
    for pieces in zip(*decoded, strict=True):
        units, layers = pieces[0][0], [found for _, found in pieces]
        target = None if given is None else given[units]
        if step.method is None:
            out[units] = _segment(step, step.terms[0], target, layers[0])
        else:
            assert target is not None
            segment = (span.first + units.start) // SEGMENT
            out[units] = _merged(step, step.method, target, layers, segment, trims)
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
    delta = _difference(term, layers)
    if delta is not None:
        result = numerics.add(given, delta, term.factor, dtype)
    else:
        result = numerics.cast(given, dtype)
    ulp = layers.get("ulp")
    if ulp is not None:
        result = numerics.correct(result, ulp)
    return numerics.bits(result)


def _difference(term: Term, layers: Layers) -> numerics.Difference | None:
    carrier = next((part for part in term.parts if {"hi", "lo"} & set(part.layers)), None)
    return difference_of(carrier, layers) if carrier else None


def _merged(
    step: Step,
    method: Method,
    target: Tensor,
    layers: list[Layers],
    segment: int,
    trims: Trims,
) -> Tensor:
    """The bits of one segment of the result where a method merges its terms."""
    found = [
        (term, delta)
        for term, own in zip(step.terms, layers, strict=True)
        if (delta := _difference(term, own)) is not None
    ]
    if not found:
        return target
    dtype = numerics.DTYPES[step.entry.dtype]
    given = target.view(dtype)
    deltas = [_thinned(step, method, term, delta, segment, trims) for term, delta in found]
    factors = [term.factor for term, _ in found]
    if method.name == "ties":
        weights = [float32(term.weight, "a weight") for term, _ in found]
        total = methods.ties(given, deltas, weights, factors)
    else:
        total = methods.linear(given, deltas, factors)
    untouched = torch.stack([delta == 0 for delta in deltas]).all(0)
    return numerics.bits(numerics.settle(total, given, dtype, untouched))


def _thinned(
    step: Step,
    method: Method,
    term: Term,
    delta: numerics.Difference,
    segment: int,
    trims: Trims,
) -> Tensor:
    """Δ of one segment in float32, with what the method takes away from it."""
    whole = numerics.as_float32(delta)
    if method.density == 1:
        return whole
    if method.name == "ties":
        trim = trims.of(term, step.entry, method.density)
        patterns = numerics.bits(delta.hi)
        magnitude = patterns & torch.iinfo(patterns.dtype).max
        return methods.trimmed(whole, magnitude, trim.threshold, int(trim.ties[segment]))
    record, part = term.record, term.ranked
    assert part is not None
    # A product of factors has no tuned tensor: its payload tells it from another's.
    identity = f"{record.name}\0{record.base}\0{record.tuned or part.blake3}"
    kept = methods.drawn(identity, method.seed, segment, len(whole), method.density)
    return methods.dropped(whole, kept.to(whole.device), method.density)
