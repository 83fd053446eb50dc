"""What a transfer must give, in exact fractions: slow, obvious, and without any code of hubdiff."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    precision: int  # bits of the significand, the implicit one included
    lowest: int  # exponent of the smallest normal number
    highest: int


FORMATS = {
    torch.bfloat16: Format(8, -126, 127),
    torch.float16: Format(11, -14, 15),
    torch.float32: Format(24, -126, 127),
    torch.float64: Format(53, -1022, 1023),
}


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """The number of ``dtype`` nearest to ``value``, ties to even. 0.0 for zero of either sign."""
    precision, lowest, highest = FORMATS[dtype]
    size = abs(value)
    if size == 0:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    nearest = round(size / quantum) * quantum
    result = math.inf if nearest >= Fraction(2) ** (highest + 1) else float(nearest)
    return math.copysign(result, value)


def difference(tuned: Tensor, base: Tensor) -> list[Fraction | float]:
    """tuned − base, element by element; 0 for equal infinities and for a NaN that stayed the same,
    else a float where it is not a finite number."""
    pairs = zip(_numbers(tuned), _numbers(base), _same(tuned, base), strict=True)
    return [
        Fraction(0) if same else Fraction(t) - Fraction(b) if _finite(t, b) else t - b
        for t, b, same in pairs
    ]


def _same(tuned: Tensor, base: Tensor) -> list[bool]:
    if tuned.dtype == base.dtype:
        equal = (bits(tuned) == bits(base)).all(dim=1)
    else:
        equal = tuned.reshape(-1).double() == base.reshape(-1).double()
    found: list[bool] = equal.tolist()
    return found


def added(
    target: Tensor, delta: list[Fraction | float], scale: float, dtype: torch.dtype
) -> list[float]:
    """round(target + scale · delta), element by element; ``scale`` as a float32 number. A scale of
    0 is the target, whatever delta is."""
    factor = torch.tensor(scale, dtype=torch.float32).item()
    result = []
    for number, step in zip(_numbers(target), delta, strict=True):
        if factor == 0 or step == 0:
            step = Fraction(0)
        if isinstance(step, Fraction) and math.isfinite(number):
            result.append(rounded(Fraction(number) + Fraction(factor) * step, dtype))
        else:
            result.append(number + factor * float(step))
    return result


def same_numbers(actual: Tensor, expected: list[float]) -> bool:
    """Equal as numbers: the sign of zero and the payload of NaN are no part of a number."""
    numbers = _numbers(actual)
    return len(numbers) == len(expected) and all(
        a == e or (math.isnan(a) and math.isnan(e)) for a, e in zip(numbers, expected, strict=True)
    )


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, a row per element."""
    if not tensor.numel():  # torch may give it strides that can't be viewed
        return torch.empty(0, tensor.element_size(), dtype=torch.uint8)
    rows = tensor.contiguous().reshape(-1).view(torch.uint8)
    return rows.reshape(tensor.numel(), tensor.element_size())


def _numbers(tensor: Tensor) -> list[float]:
    found: list[float] = tensor.reshape(-1).double().tolist()
    return found


def _finite(*numbers: float) -> bool:
    return all(math.isfinite(number) for number in numbers)
