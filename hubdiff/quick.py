"""The result of one span without torch: copies, raw bits, and Δ added to bf16 on the CPU.

The bits are those of ``combine``, which does everything else; where a sum is no number it is asked
too.
"""

from __future__ import annotations

import numpy as np

from hubdiff import kernels
from hubdiff.errors import CorruptPayload
from hubdiff.payloads import Arrays, SpanBytes, decode_segments
from hubdiff.plan import Step
from hubdiff.stream import Span, unit_dtype


def needs_torch(step: Step, device: str) -> bool:
    """Whether the tensor of this step is one for ``combine``."""
    parts = [part for term in step.terms for part in term.parts]
    if step.source is None or all(part.layers == ("raw",) for part in parts):
        return step.source is not None and step.source.entry.dtype != step.entry.dtype
    dtypes = {step.entry.dtype, step.source.entry.dtype, *(part.dtype for part in parts)}
    exact = step.method is None and step.terms[0].factor == 1.0
    return not (device == "cpu" and exact and dtypes == {"BF16"})


def combine_quick(
    span: Span, step: Step, source: memoryview | None, payloads: list[list[SpanBytes]]
) -> memoryview | None:
    """The bytes of ``span`` in the result, as ``combine``, or None where that has to be asked.
    Raises ``CorruptPayload``."""
    if source is not None and not any(payloads):
        return source
    (term,), (found,) = step.terms, payloads
    dtype, where = unit_dtype(span.entry.dtype), str(term.delta.tree.pin)
    given = None if source is None else np.frombuffer(source, dtype)
    out = np.empty(span.units, dtype)
    for units, layers in decode_segments(span, found, where, Arrays()):
        target = None if given is None else given[units]
        if "raw" in layers:
            bits = target if layers["raw"] is None else layers["raw"]
            if bits is None:
                raise CorruptPayload(f"{where}: a segment has no bytes at all")
            out[units] = bits
        elif target is None or not _add(target, layers, out[units]):
            return None
    return out.view(np.uint8).data


def _add(target: np.ndarray, layers: dict[str, np.ndarray | None], out: np.ndarray) -> bool:
    """Fill ``out``; False: not all of it are numbers, or there are exact bits to look at."""
    hi, lo = layers.get("hi"), layers.get("lo")
    if layers.get("ulp") is not None:
        return False
    if hi is None:
        out[:] = target
        return True
    numbers = bool(kernels.add(target, hi, out))
    if lo is not None:
        elements, patterns = lo
        numbers &= bool(kernels.add_tail(target, hi, elements, patterns.astype(np.uint16), out))
    return numbers
