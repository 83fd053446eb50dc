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

import math
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
_QUIET_NAN = {
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
    torch.float32: 0x7FC00000,
    torch.float64: 0x7FF8000000000000,
}
_NARROW = frozenset({torch.bfloat16, torch.float16})
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# What holds the bit patterns of units of so many bytes.
UNITS = {1: torch.uint8, **_BITS}

_PIECE = 1 << 17

# "No change": x + (−0.0) is x for every x but NaN, +0.0 would turn −0.0 into +0.0.
UNCHANGED = -0.0


class Difference(NamedTuple):
    """Δ of one segment. ``lo`` holds +0.0 where ``hi`` is already exact; None where no exactness is
    claimed (models that are not 16-bit on both sides)."""

    hi: Tensor
    lo: Tensor | None


def difference(tuned: Tensor, base: Tensor, dtype: str) -> Difference:
    """Δ = tuned − base as ``hi`` in ``dtype`` and, for equal 16-bit dtypes, its exact tail."""
    exact = tuned.dtype == base.dtype == DTYPES[dtype] and tuned.element_size() == 2
    hi = torch.empty(len(tuned), dtype=DTYPES[dtype])
    lo = torch.empty_like(hi) if exact else None
    # In pieces whose temporaries stay in the cache, and the same ones for every piece: four times
    # as fast as a segment at once.
    room = torch.empty(4, min(len(tuned), _PIECE))
    for start in range(0, len(tuned), _PIECE):
        here = slice(start, start + _PIECE)
        x, y, total, spare = room[:, : len(hi[here])]
        x.copy_(tuned[here])
        y.copy_(base[here])
        # The negated reverse: equal numbers give −0.0, which is "no change", without a mask.
        torch.sub(y, x, out=total).neg_()
        hi[here] = total
        if lo is not None:
            lo[here] = _tail(x, y, total, hi[here], spare)
    if not _all_finite(hi):
        _mend_infinite(hi, lo, tuned, base)
    return Difference(hi, lo)


def _tail(x: Tensor, y: Tensor, total: Tensor, hi: Tensor, back: Tensor) -> Tensor:
    """What ``hi`` lacks of x − y: its own rounding error, and that of ``total`` (Knuth's TwoSum).
    Both are exact in float32, and so is their sum. All but ``hi`` are used up."""
    torch.sub(total, x, out=back)
    error = x.sub_(total - back).sub_(back.add_(y))
    return total.sub_(y.copy_(hi)).add_(error)


def _mend_infinite(hi: Tensor, lo: Tensor | None, tuned: Tensor, base: Tensor) -> None:
    """Where ``hi`` is Inf or NaN: "no change" for equal bits, a pair that can be written when two
    huge numbers only overflowed, else left, since the sum is that on every target."""
    _quieten(hi)
    odd = ~torch.isfinite(hi)
    if lo is not None:
        lo[odd] = 0.0
        overflow = odd & torch.isfinite(tuned) & torch.isfinite(base)
        hi[overflow], lo[overflow] = tuned[overflow], -base[overflow]
    if tuned.dtype != base.dtype:
        tuned, base = tuned.float(), base.float()
    hi[odd & (bits(tuned) == bits(base))] = UNCHANGED


def _all_finite(values: Tensor) -> bool:
    """A quick yes; a slow answer only where the norm overflows."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    if math.isfinite(torch.linalg.vector_norm(values, dtype=wide)):
        return True
    return bool(torch.isfinite(values).all())


def add(target: Tensor, delta: Difference, scale: float, dtype: torch.dtype) -> Tensor:
    """round(target + scale · Δ) in ``dtype``, rounded once. ``scale`` counts as a float32 number.

    Elements whose Δ is "no change" keep the target's bits, NaN payloads included.
    """
    if scale == 1.0:
        return _add_whole(target, delta, dtype)
    if not {target.dtype, delta.hi.dtype, dtype} <= _NARROW:
        return _add_scaled(target, delta, scale, dtype)
    result = torch.empty(len(target), dtype=dtype, device=target.device)
    # On the CPU in pieces whose temporaries stay in the cache.
    size = _PIECE if target.device.type == "cpu" else max(1, len(target))
    for start in range(0, len(target), size):
        here = slice(start, start + size)
        lo = None if delta.lo is None else delta.lo[here]
        _add_mostly(target[here], Difference(delta.hi[here], lo), scale, result[here])
    return result


def _add_mostly(target: Tensor, delta: Difference, scale: float, out: Tensor) -> None:
    """Exact sums cost ten times what sums in float32 do, and nearly never differ once they are
    rounded to 16 bits. So these are taken where all numbers around them, as far as float32 can be
    off, round alike; NaN and Inf never do, nor do the two zeros."""
    factor = torch.tensor(scale, dtype=torch.float32).item()
    wide = target.float()
    change = delta.hi.float().mul_(factor)
    off = wide.abs().add_(change.abs())
    if delta.lo is not None:
        tail = delta.lo.float().mul_(factor)
        off.add_(tail.abs())
        change.add_(tail)
    # Five roundings, each off by 2⁻²⁴ of ``off`` at most, or by 2⁻¹⁵⁰ where float32 is subnormal.
    off.mul_(2.0**-20).add_(2.0**-140)
    wide.add_(change)
    above, below = (wide + off).to(out.dtype), wide.sub_(off).to(out.dtype)
    out.copy_(above)
    doubtful = torch.nonzero((bits(above) != bits(below)) | torch.isnan(above)).view(-1)
    if len(doubtful):
        lo = None if delta.lo is None else delta.lo[doubtful]
        these = Difference(delta.hi[doubtful], lo)
        bits(out)[doubtful] = bits(_add_scaled(target[doubtful], these, scale, out.dtype))


def _add_whole(target: Tensor, delta: Difference, dtype: torch.dtype) -> Tensor:
    result = _add_rounded_once(target, delta.hi, dtype)
    if delta.lo is not None:
        tail = _nonzero(delta.lo)
        if len(tail):
            terms = (target[tail], delta.hi[tail], delta.lo[tail])
            exact = _exact_sum(*map(_wide, terms)).to_dtype(dtype)
            result[tail] = exact.to(result.device)
    if not _all_finite(result):
        _quieten(result)
        unchanged = bits(delta.hi) == bits(delta.hi.new_tensor(UNCHANGED))
        _keep(result, target, unchanged & torch.isnan(target))
    return result


def _nonzero(lo: Tensor) -> Tensor:
    """The indices of the tail. On the CPU by numpy, ten times faster here; a −0.0 that it finds too
    adds nothing."""
    if lo.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(to_bits(lo) != 0))
    return torch.nonzero(lo).view(-1)


def _keep(result: Tensor, target: Tensor, where: Tensor) -> None:
    # As integers: moving a signalling NaN as a float may quieten it.
    bits(result)[where] = bits(cast(target, result.dtype))[where]


def as_float32(delta: Difference) -> Tensor:
    """Δ in float32: ``hi + lo``, rounded once where they need more than its 24 bits."""
    wide = delta.hi.float()
    return wide if delta.lo is None else wide + delta.lo.float()


def settle(total: Tensor, target: Tensor, dtype: torch.dtype, untouched: Tensor) -> Tensor:
    """``total``, a sum that starts from ``target``, rounded once to ``dtype``; the target's bits
    where it is ``untouched``. ``total`` may be overwritten."""
    result = total.to(dtype)
    if not _all_finite(result):
        _quieten(result)
    _keep(result, target, untouched)
    return result


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``, the same bits on every machine."""
    if values.dtype == dtype:
        return values
    result = values.to(dtype)
    if not _all_finite(result):
        _quieten(result)
    return result


def _quieten(values: Tensor) -> None:
    """Give every NaN the payload of the format's quiet NaN. What a sum or a conversion leaves there
    differs between processors, and on one processor between vector and scalar code."""
    bits(values)[torch.isnan(values)] = _QUIET_NAN[values.dtype]


def _add_rounded_once(target: Tensor, hi: Tensor, dtype: torch.dtype) -> Tensor:
    """target + hi with one rounding."""
    if target.dtype == hi.dtype == dtype:
        return target + hi
    narrow = {target.dtype, hi.dtype} <= _NARROW
    if dtype == torch.float32 and torch.float64 not in (target.dtype, hi.dtype):
        return target.float() + hi.float()
    if dtype == torch.float16 and narrow:
        # Not for bfloat16: a float16 operand may itself lie halfway between two bfloat16 numbers,
        # and then what float32 cuts off decides.
        return (target.float() + hi.float()).to(dtype)
    return _exact_sum(_wide(target), _wide(hi)).to_dtype(dtype).to(target.device)


def _wide(values: Tensor) -> Tensor:
    """As float64, on the CPU where the device (Apple's) has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _add_scaled(target: Tensor, delta: Difference, scale: float, dtype: torch.dtype) -> Tensor:
    # A float32 scale has 24 bits, hi at most 24: their product is exact in float64.
    factor = torch.tensor(scale, dtype=torch.float32).double().item()
    terms = [_wide(target), _wide(delta.hi) * factor]
    nothing = delta.hi == 0
    if delta.lo is not None and bool((delta.lo != 0).any()):
        terms.append(_wide(delta.lo) * factor)
        nothing &= delta.lo == 0
    result = _exact_sum(*terms).to_dtype(dtype).to(target.device)
    if not _all_finite(result):
        _quieten(result)
    _keep(result, target, nothing if factor else torch.ones_like(nothing))
    return result


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
    """Knuth's TwoSum: a + b == sum + error exactly; no error is claimed where sum is not finite.
    No error is −0.0, which leaves a sum of −0.0 its sign."""
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    return total, torch.where(torch.isfinite(total) & (error != 0), error, -0.0)


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
