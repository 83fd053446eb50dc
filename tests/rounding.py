"""Rounding done the slow and obvious way, to check the fast way by: no torch arithmetic here.

``round_exact`` works on exact fractions, for any values; ``round_float64`` on arrays whose sums are
exact in float64. Neither passes through float32 on the way to 16 bits, which would round twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch


@dataclass(frozen=True)
class Format:
    """A binary float format: ``precision`` bits with the hidden one, exponents of normal numbers
    from ``least`` to ``most``, ``width`` bits in all."""

    precision: int
    least: int
    most: int
    width: int

    @property
    def infinity(self) -> int:
        return (self.most - self.least + 2) << (self.precision - 1)


FORMATS = {
    torch.bfloat16: Format(8, -126, 127, 16),
    torch.float16: Format(11, -14, 15, 16),
    torch.float32: Format(24, -126, 127, 32),
}
_PATTERNS = {2: torch.int16, 4: torch.int32}


def patterns(tensor: torch.Tensor) -> np.ndarray:
    """Bit patterns as unsigned integers of 64 bits."""
    signed = tensor.reshape(-1).view(_PATTERNS[tensor.element_size()]).numpy()
    return signed.view(f"u{signed.itemsize}").astype(np.uint64)


def fractions(tensor: torch.Tensor) -> list[Fraction]:
    """Every (finite) value, exactly."""
    return [Fraction(value) for value in tensor.reshape(-1).double().tolist()]


def round_exact(value: Fraction, dtype: torch.dtype) -> int:
    """The pattern of the nearest number of the format, ties to even, overflow to infinity. Zero is
    +0.0."""
    form = FORMATS[dtype]
    size = abs(value)
    if not size:
        return 0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    exponent = max(exponent, form.least)
    # round() of a Fraction goes to the nearest integer, ties to even.
    steps = round(size / Fraction(2) ** (exponent - form.precision + 1))
    pattern = ((exponent - form.least) << (form.precision - 1)) + steps
    sign = (1 << (form.width - 1)) if value < 0 else 0
    return sign | min(pattern, form.infinity)


def round_float64(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """As ``round_exact``, for values that are zero or in the format's normal range."""
    if dtype == torch.float16:
        return values.astype(np.float16).view(np.uint16).astype(np.uint64)
    if dtype == torch.float32:
        return values.astype(np.float32).view(np.uint32).astype(np.uint64)
    assert dtype == torch.bfloat16
    assert np.all((values == 0) | (np.abs(values) >= 2.0**-126))
    raw = values.view(np.uint64)
    dropped = np.uint64(52 - 7)
    half = np.uint64((1 << 44) - 1)
    rounded = (raw + half + ((raw >> dropped) & np.uint64(1))) >> dropped << dropped
    return rounded.view(np.float64).astype(np.float32).view(np.uint32).astype(np.uint64) >> 16


def exact_in_float64(*tensors: torch.Tensor) -> bool:
    """Whether sums of these are exact in float64: all are multiples of 2⁻⁴⁴ below 16."""
    arrays = [tensor.double().numpy() for tensor in tensors]
    return all(
        np.array_equal(a * 2.0**44, np.rint(a * 2.0**44)) and np.abs(a).max() < 16 for a in arrays
    )


def ulps_apart(one: np.ndarray, other: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """How many numbers of the format lie between two patterns."""
    sign = 1 << (FORMATS[dtype].width - 1)

    def ordered(raw: np.ndarray) -> np.ndarray:
        magnitude = (raw & np.uint64(sign - 1)).astype(np.int64)
        return np.where(raw & np.uint64(sign), -magnitude, magnitude)

    return np.abs(ordered(one) - ordered(other))
