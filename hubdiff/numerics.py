"""The arithmetic of deltas, exact to the bit, on torch tensors of one dimension.

For 16-bit models Δ = tuned − base is kept as ``hi + lo``: ``hi`` is Δ rounded to the model's own
dtype and ``lo`` what the rounding lost. That rest always fits the same dtype, because the error of
one rounded addition is a number of its format (Dekker 1971), so the pair *is* Δ. Adding it to a
target and rounding once then needs care only where ``lo`` is not zero.

Double rounding is harmless where the wider format has 2p + 2 bits (Figueroa 1995): two 16-bit
numbers may be added in float32. Everything else goes through sums rounded to odd
(Boldo & Melquiond 2008), which lose no information that a later rounding needs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_OTHERS = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
HALVES = ("BF16", "F16")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# "No change": x + (−0.0) is x for every x but NaN, +0.0 would turn −0.0 into +0.0.
UNCHANGED = -0.0


class Difference(NamedTuple):
    """Δ of one segment. ``lo`` holds +0.0 where ``hi`` is already exact; None where no exactness is
    claimed (models that are not 16-bit on both sides)."""

    hi: Tensor
    lo: Tensor | None


def delta_dtype(tuned: str, base: str, *, dense: bool = False) -> str:
    """The dtype of ``hi`` for a pair of float dtypes; ``dense`` asks for all of a float32 Δ."""
    if tuned == base and tuned in HALVES:
        return tuned
    return "F32" if dense and "F32" in (tuned, base) else "BF16"


def difference(tuned: Tensor, base: Tensor, dtype: str) -> Difference:
    """Δ = tuned − base as ``hi`` in ``dtype`` and, for equal 16-bit dtypes, its exact tail."""
    x, y = tuned.float(), base.float()
    hi = (x - y).to(DTYPES[dtype])
    hi[bits(x) == bits(y)] = UNCHANGED
    if tuned.dtype == base.dtype == hi.dtype and dtype in HALVES:
        return _with_tail(hi, x, y, tuned, base)
    return Difference(hi, None)


def _with_tail(hi: Tensor, x: Tensor, y: Tensor, tuned: Tensor, base: Tensor) -> Difference:
    # Fast2Sum: with the larger operand first, large − hi and then − small are exact.
    first_is_larger = x.abs() >= y.abs()
    large = torch.where(first_is_larger, x, -y)
    small = torch.where(first_is_larger, -y, x)
    rest = small - (hi.float() - large)
    rest[~torch.isfinite(rest)] = 0.0
    lo = rest.to(hi.dtype)
    # The difference of two huge numbers of opposite sign overflows; the pair itself still says it.
    overflow = torch.isinf(hi) & torch.isfinite(x) & torch.isfinite(y)
    if overflow.any():
        hi[overflow], lo[overflow] = tuned[overflow], -base[overflow]
    lo[lo == 0] = 0.0
    return Difference(hi, lo)


def add(target: Tensor, delta: Difference, scale: float, dtype: torch.dtype) -> Tensor:
    """round(target + scale · Δ) in ``dtype``, rounded once. ``scale`` counts as a float32 number.

    Elements whose Δ is "no change" keep the target's bits, NaN payloads included.
    """
    if scale == 1.0:
        result = _add_rounded_once(target, delta.hi, dtype)
        if delta.lo is not None:
            (tail,) = torch.nonzero(delta.lo, as_tuple=True)
            if len(tail):
                terms = (target[tail], delta.hi[tail], delta.lo[tail])
                result[tail] = _exact_sum(*(term.double() for term in terms)).to_dtype(dtype)
        keep = (result != result) & (bits(delta.hi) == bits(delta.hi.new_tensor(UNCHANGED)))
    else:
        result = _add_scaled(target, delta, scale, dtype)
        keep = delta.hi == 0 if scale else torch.ones_like(delta.hi, dtype=torch.bool)
        if delta.lo is not None and scale:
            keep &= delta.lo == 0
    if keep.any():
        # As integers: moving a signalling NaN as a float may quieten it.
        bits(result)[keep] = bits(target.to(dtype))[keep]
    return result


def _add_rounded_once(target: Tensor, hi: Tensor, dtype: torch.dtype) -> Tensor:
    """target + hi with one rounding."""
    if target.dtype == hi.dtype == dtype:
        return target + hi
    if dtype == torch.float64 or target.dtype == torch.float64:
        return _exact_sum(target.double(), hi.double()).to_dtype(dtype)
    halves = (torch.bfloat16, torch.float16)
    if dtype == torch.float32 or (target.dtype in halves and hi.dtype in halves):
        return (target.float() + hi.float()).to(dtype)
    return _exact_sum(target.double(), hi.double()).to_dtype(dtype)


def _add_scaled(target: Tensor, delta: Difference, scale: float, dtype: torch.dtype) -> Tensor:
    # A float32 scale has 24 bits, hi at most 24: their product is exact in float64.
    factor = torch.tensor(scale, dtype=torch.float32).double().item()
    terms = [target.double(), delta.hi.double() * factor]
    if delta.lo is not None and bool((delta.lo != 0).any()):
        terms.append(delta.lo.double() * factor)
    return _exact_sum(*terms).to_dtype(dtype)


class _Sum(NamedTuple):
    """An exact sum as a float64 and what is still missing from it, rounded to odd."""

    high: Tensor
    low: Tensor

    def to_dtype(self, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float64:
            return self.high + self.low
        odd = _add_to_odd(self.high, self.low)
        return odd.float() if dtype == torch.float32 else _float32_to_odd(odd).to(dtype)


def _exact_sum(*terms: Tensor) -> _Sum:
    high, low = _two_sum(terms[0], terms[1])
    if len(terms) == 3:
        # Boldo & Melquiond: emulated sum of three with one rounding to odd in the middle.
        upper, lower = _two_sum(terms[1], terms[2])
        high, rest = _two_sum(terms[0], upper)
        low = _add_to_odd(rest, lower)
    return _Sum(high, low)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Knuth's TwoSum: a + b == sum + error exactly; no error is claimed where sum is not finite."""
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    return total, torch.where(torch.isfinite(total), error, 0.0)


def _add_to_odd(a: Tensor, b: Tensor) -> Tensor:
    total, error = _two_sum(a, b)
    return _to_odd(total, error)


def _float32_to_odd(value: Tensor) -> Tensor:
    nearest = value.float()
    error = value - nearest.double()
    return _to_odd(nearest, torch.where(torch.isfinite(value), error, 0.0))


def _to_odd(nearest: Tensor, error: Tensor) -> Tensor:
    """The truncation of nearest + error with its last bit set when anything was cut off."""
    pattern = bits(nearest)
    overshot = torch.signbit(nearest) != torch.signbit(error)
    odd = (pattern - overshot.to(pattern.dtype)) | 1
    return torch.where(error != 0, odd, pattern).view(nearest.dtype)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of any whole-byte safetensors dtype."""
    found: torch.dtype = DTYPES[name] if name in DTYPES else getattr(torch, _OTHERS[name])
    return found


def from_bits(patterns: np.ndarray, dtype: str) -> Tensor:
    """Floats of the safetensors dtype ``dtype`` out of unsigned bit patterns; shares memory."""
    signed = patterns.view(f"<i{patterns.itemsize}")
    return torch.from_numpy(signed).view(DTYPES[dtype])


def to_bits(values: Tensor) -> np.ndarray:
    """Unsigned bit patterns of floats or integers; shares memory."""
    signed = values if not values.is_floating_point() else bits(values)
    array: np.ndarray = signed.contiguous().numpy()
    return array.view(f"<u{array.itemsize}")


def bits(values: Tensor) -> Tensor:
    """The bit patterns as signed integers of the same width; shares memory."""
    return values.view(_BITS[values.element_size()])


def residual(actual: Tensor, predicted: Tensor) -> Tensor:
    """What turns ``predicted`` into ``actual`` bit by bit: the distance of the two patterns in the
    order of floats, zig-zagged, as integers of the same width. 0 where they are equal."""
    distance = _ordered(bits(actual)) - _ordered(bits(predicted))
    width = 8 * distance.element_size()
    return (distance << 1) ^ (distance >> (width - 1))


def correct(predicted: Tensor, zigzagged: Tensor) -> Tensor:
    """The inverse of ``residual``: the actual values, in the dtype of ``predicted``."""
    half = (zigzagged >> 1) & torch.iinfo(zigzagged.dtype).max
    distance = half ^ -(zigzagged & 1)
    return _ordered(_ordered(bits(predicted)) + distance).view(predicted.dtype)


def _ordered(pattern: Tensor) -> Tensor:
    """Sign-magnitude → two's complement in the order of floats, −0.0 just below +0.0. Its own
    inverse."""
    magnitude_mask = torch.iinfo(pattern.dtype).max
    return torch.where(pattern < 0, pattern ^ magnitude_mask, pattern)
