"""The result of one span: the target's units plus what the terms of its step add, rounded once.

Bytes in, bytes out; where they come from and what they must hash to is not known here.
"""

from __future__ import annotations

import numpy as np
import torch

from hubdiff import methods, numerics
from hubdiff.encodings import SEGMENT
from hubdiff.errors import CorruptPayload
from hubdiff.payloads import Layers, SpanBytes, decode_segments, difference_of
from hubdiff.plan import Method, Step, Term, float32
from hubdiff.stream import Span, unit_dtype
from hubdiff.trimming import Trims


def combine(
    span: Span,
    step: Step,
    source: memoryview | None,
    payloads: list[list[SpanBytes]],
    device: torch.device,
    trims: Trims,
) -> memoryview:
    """The bytes of ``span`` in the result. ``source`` are the target's bytes for it, ``payloads``
    what each term of ``step`` has for it; ``trims`` finds the thresholds of TIES. Raises
    ``CorruptPayload``."""
    if source is not None and step.source is not None:
        if not any(payloads) and step.source.entry.dtype == step.entry.dtype:
            return source
        given = np.frombuffer(source, unit_dtype(step.source.entry.dtype))
    else:
        given = None
    out = np.empty(span.units, unit_dtype(span.entry.dtype))
    decoded = [
        decode_segments(span, found, str(term.delta.tree.pin))
        for term, found in zip(step.terms, payloads, strict=True)
    ]
    for pieces in zip(*decoded, strict=True):
        units, layers = pieces[0][0], [found for _, found in pieces]
        target = None if given is None else given[units]
        if step.method is None:
            out[units] = _segment(step, step.terms[0], target, layers[0], device)
        else:
            assert target is not None
            segment = (span.first + units.start) // SEGMENT
            out[units] = _merged(step, step.method, target, layers, segment, device, trims)
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
    delta = _difference(term, layers)
    if delta is not None:
        moved = _moved(delta, device)
        result = numerics.add(given.to(device), moved, term.factor, dtype).cpu()
    else:
        result = numerics.cast(given, dtype)
    ulp = layers.get("ulp")
    if ulp is not None:
        zigzagged = torch.from_numpy(ulp.view(f"<i{ulp.itemsize}"))
        result = numerics.correct(result, zigzagged)
    return numerics.to_bits(result)


def _difference(term: Term, layers: Layers) -> numerics.Difference | None:
    carrier = next((part for part in term.parts if {"hi", "lo"} & set(part.layers)), None)
    return difference_of(carrier, layers) if carrier else None


def _moved(delta: numerics.Difference, device: torch.device) -> numerics.Difference:
    return numerics.Difference(
        delta.hi.to(device), None if delta.lo is None else delta.lo.to(device)
    )


def _merged(
    step: Step,
    method: Method,
    target: np.ndarray,
    layers: list[Layers],
    segment: int,
    device: torch.device,
    trims: Trims,
) -> np.ndarray:
    """The bits of one segment of the result where a method merges its terms."""
    found = [
        (term, _moved(delta, device))
        for term, own in zip(step.terms, layers, strict=True)
        if (delta := _difference(term, own)) is not None
    ]
    if not found:
        return target
    given = numerics.from_bits(target, step.entry.dtype).to(device)
    deltas = [_thinned(step, method, term, delta, segment, trims) for term, delta in found]
    factors = [term.factor for term, _ in found]
    if method.name == "ties":
        weights = [float32(term.weight, "a weight") for term, _ in found]
        total = methods.ties(given, deltas, weights, factors)
    else:
        total = methods.linear(given, deltas, factors)
    untouched = torch.stack([delta == 0 for delta in deltas]).all(0)
    dtype = numerics.DTYPES[step.entry.dtype]
    return numerics.to_bits(numerics.settle(total, given, dtype, untouched).cpu())


def _thinned(
    step: Step,
    method: Method,
    term: Term,
    delta: numerics.Difference,
    segment: int,
    trims: Trims,
) -> torch.Tensor:
    """Δ of one segment in float32, with what the method takes away from it."""
    whole = numerics.as_float32(delta)
    if method.density == 1:
        return whole
    if method.name == "ties":
        trim = trims.of(term, step.entry, method.density)
        patterns = numerics.bits(delta.hi)
        magnitude = patterns & torch.iinfo(patterns.dtype).max
        return methods.trimmed(whole, magnitude, trim.threshold, int(trim.ties[segment]))
    record = term.record
    identity = f"{record.name}\0{record.base}\0{record.tuned}"
    kept = methods.drawn(identity, method.seed, segment, len(whole), method.density)
    return methods.dropped(whole, kept.to(whole.device), method.density)
