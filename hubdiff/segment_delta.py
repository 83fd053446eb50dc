"""Δ of one segment: two arrays of bit patterns in, the layers of a delta out, as bit patterns.

bf16 goes through ``kernels``; everything else, and bf16 that holds Inf or NaN or does not add up
again, through ``numerics``. Both give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubdiff import kernels
from hubdiff.encodings import dense
from hubdiff.encodings.tails import Tail
from hubdiff.safetensors_io import DTYPE_BITS

HALVES = ("BF16", "F16")
_FIRST = 1 << 12


def delta_dtype(tuned: str, base: str, *, dense: bool = False) -> str:
    """The dtype of ``hi`` for a pair of float dtypes; ``dense`` asks for all of a float32 Δ."""
    if tuned == base and tuned in HALVES:
        return tuned
    return "F32" if dense and "F32" in (tuned, base) else "BF16"


@dataclass(frozen=True)
class Floats:
    """Bit patterns of floats of a safetensors dtype, 1-D."""

    bits: np.ndarray
    dtype: str

    def __getitem__(self, part: slice) -> Floats:
        return Floats(self.bits[part], self.dtype)


@dataclass(frozen=True)
class Comparison:
    """``hi`` and ``lo`` in the delta's dtype (None where no element has any), ``residual`` what
    base + Δ lacks to be tuned bit by bit (None: nothing). ``changed`` counts elements whose bits
    differ (across dtypes: values); the squares are ‖Δ‖² and ‖base‖²."""

    hi: np.ndarray | None
    lo: Tail | None
    residual: np.ndarray | None
    changed: int
    delta_square: float
    base_square: float


def compare(tuned: Floats, base: Floats, master: Floats | None, dtype: str) -> Comparison:
    """Compare a segment. ``master``, if given, stands for tuned in Δ, whose ``hi`` is ``dtype``."""
    if master is None and tuned.dtype == base.dtype and _same(tuned.bits, base.bits):
        return Comparison(None, None, None, 0, 0.0, _square(base))
    if {tuned.dtype, base.dtype, dtype} == {"BF16"} and master is None:
        quick = _compare_bf16(tuned.bits, base.bits)
        if quick is not None:
            return quick
    return _compare_any(tuned, base, master, dtype)


def _same(tuned: np.ndarray, base: np.ndarray) -> bool:
    """Where training changed anything, the first elements nearly always tell."""
    first = slice(_FIRST)
    return np.array_equal(tuned[first], base[first]) and np.array_equal(tuned, base)


def _compare_bf16(tuned: np.ndarray, base: np.ndarray) -> Comparison | None:
    """None where the general way is needed."""
    hi, tails = np.empty_like(tuned), np.empty(tuned.size, np.bool_)
    found = kernels.difference(tuned, base, hi, tails.view(np.uint8))
    changed, numbers, restored, *squares = found
    if not (numbers and restored):  # a NaN, an Inf, a zero that changed its sign
        return None
    elements = dense.where(tails)
    tail = Tail(elements, np.empty(elements.size, np.uint16))
    if not kernels.tail(tuned, base, *tail):
        return None
    return Comparison(hi, tail if elements.size else None, None, changed, *squares)


def _compare_any(tuned: Floats, base: Floats, master: Floats | None, dtype: str) -> Comparison:
    from hubdiff import numerics

    here, there = (numerics.from_bits(side.bits, side.dtype) for side in (tuned, base))
    source = here if master is None else numerics.from_bits(master.bits, master.dtype)
    delta = numerics.difference(source, there, dtype)
    hi, lo = numerics.to_bits(delta.hi), None if delta.lo is None else numerics.to_bits(delta.lo)
    predicted = numerics.add(there, delta, 1.0, here.dtype)
    residual = None
    if not np.array_equal(numerics.to_bits(predicted), tuned.bits):
        residual = numerics.to_bits(numerics.residual(here, predicted))
    return Comparison(
        hi if (hi != _unchanged(dtype)).any() else None,
        Tail.of(lo) if lo is not None and lo.any() else None,
        residual,
        _count_changed(tuned, base),
        _square(Floats(hi, dtype)),
        _square(base),
    )


def _unchanged(dtype: str) -> int:
    """The pattern of −0.0."""
    return 1 << (DTYPE_BITS[dtype] - 1)


def _count_changed(tuned: Floats, base: Floats) -> int:
    if tuned.dtype == base.dtype:
        return int(np.count_nonzero(tuned.bits != base.bits))
    from hubdiff import numerics

    here, there = (numerics.from_bits(s.bits, s.dtype).float() for s in (tuned, base))
    return int((here != there).sum())


def _square(values: Floats) -> float:
    """‖values‖², elements that are not finite left out."""
    if values.dtype == "BF16":
        return float(kernels.square(values.bits))
    floats = values.bits.view({"F16": np.float16, "F32": np.float32}[values.dtype])
    finite = np.where(np.isfinite(floats), floats, 0).astype(np.float64)
    return float(np.dot(finite, finite))
