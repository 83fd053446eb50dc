"""The arithmetic against an oracle of exact fractions: every operation checked on bit patterns that
hypothesis picks, −0.0, NaN payloads, Inf and subnormals among them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubdiff import numerics
from hubdiff.numerics import DTYPES, Difference, add, correct, difference, residual
from hubdiff.segment_delta import delta_dtype

FORMATS = {  # dtype: (fraction bits, lowest exponent of a subnormal's unit, largest finite)
    "BF16": (7, -133, torch.finfo(torch.bfloat16).max),
    "F16": (10, -24, torch.finfo(torch.float16).max),
    "F32": (23, -149, torch.finfo(torch.float32).max),
}
INT = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}

SPECIAL_16 = [
    0x0000,
    0x8000,
    0x0001,
    0x8001,
    0x7F7F,
    0x7F80,
    0xFF80,
    0x7FC1,
    0x7F81,
    0x3F80,
    0xBF80,
]


def patterns(dtype: str) -> st.SearchStrategy[int]:
    width = 8 * np.dtype(INT[dtype]).itemsize
    special = [p << (width - 16) for p in SPECIAL_16] + [1, 2, (1 << (width - 1)) | 1]
    near_one = st.integers(0x3F00, 0x4100).map(lambda p: p << (width - 16))
    return st.one_of(st.sampled_from(special), near_one, st.integers(0, (1 << width) - 1))


def tensor(values: list[int], dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=INT[dtype])).view(DTYPES[dtype])


def columns(*dtypes: str) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*map(patterns, dtypes)), min_size=1, max_size=40)


def round_fraction(value: Fraction, dtype: str) -> float:
    """Nearest even, from the definition."""
    digits, lowest, largest = FORMATS[dtype]
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value))) if abs(value) > 2.0**-1000 else lowest
    while Fraction(2) ** exponent > abs(value):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    unit = Fraction(2) ** max(exponent - digits, lowest)
    quotient = value / unit
    whole = math.floor(quotient)
    rest = quotient - whole
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2):
        whole += 1
    rounded = whole * unit
    return math.copysign(math.inf, rounded) if abs(rounded) > Fraction(largest) else float(rounded)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(numerics.bits(a), numerics.bits(b))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["BF16", "F16"]).flatmap(lambda d: st.tuples(st.just(d), columns(d, d))))
def test_hi_and_lo_are_the_exact_difference(case):
    dtype, rows = case
    tuned, base = (tensor([row[i] for row in rows], dtype) for i in (0, 1))
    delta = difference(tuned, base, dtype)
    for a, b, hi, lo in zip(
        tuned.tolist(), base.tolist(), delta.hi.tolist(), delta.lo.tolist(), strict=True
    ):
        if math.isfinite(a) and math.isfinite(b):
            assert Fraction(hi) + Fraction(lo) == Fraction(a) - Fraction(b)


@settings(max_examples=400, deadline=None)
@given(
    st.tuples(st.sampled_from(["BF16", "F16"]), st.sampled_from(["BF16", "F16", "F32"])).flatmap(
        lambda d: st.tuples(st.just(d), columns(d[0], d[0], d[1]))
    ),
    st.sampled_from([1.0, 0.5, -1.0, 0.7, 1e-3, 3.0]),
)
def test_transfer_is_rounded_once(case, scale):
    (dtype, out), rows = case
    tuned, base = (tensor([row[i] for row in rows], dtype) for i in (0, 1))
    target = tensor([row[2] for row in rows], out)
    result = add(target, difference(tuned, base, dtype), scale, DTYPES[out])
    factor = Fraction(float(np.float32(scale)))
    for a, b, t, r in zip(
        tuned.tolist(), base.tolist(), target.tolist(), result.tolist(), strict=True
    ):
        if all(map(math.isfinite, (a, b, t))):
            exact = Fraction(t) + factor * (Fraction(a) - Fraction(b))
            assert r == round_fraction(exact, out), (a, b, t, scale)


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(*[st.sampled_from(["BF16", "F16", "F32"])] * 2).flatmap(
        lambda d: st.tuples(st.just(d), columns(*d))
    ),
    st.booleans(),
)
def test_residual_restores_every_bit(case, dense):
    (tuned_dtype, base_dtype), rows = case
    tuned = tensor([row[0] for row in rows], tuned_dtype)
    base = tensor([row[1] for row in rows], base_dtype)
    delta = difference(tuned, base, delta_dtype(tuned_dtype, base_dtype, dense=dense))
    predicted = add(base, delta, 1.0, tuned.dtype)
    assert same_bits(correct(predicted, residual(tuned, predicted)), tuned)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(*[st.sampled_from(["BF16", "F16"])] * 3).flatmap(
        lambda d: st.tuples(st.just(d), columns(*d))
    )
)
def test_mixed_dtypes_are_rounded_once(case):
    (kind, target_dtype, out), rows = case
    hi = tensor([row[0] for row in rows], kind)
    lo = tensor([row[1] for row in rows], kind)
    target = tensor([row[2] for row in rows], target_dtype)
    result = add(target, Difference(hi, lo), 1.0, DTYPES[out])
    for h, tail, t, r in zip(
        hi.tolist(), lo.tolist(), target.tolist(), result.tolist(), strict=True
    ):
        if all(map(math.isfinite, (h, tail, t))):
            assert r == round_fraction(Fraction(t) + Fraction(h) + Fraction(tail), out)


@given(columns("BF16"))
def test_no_change_keeps_every_bit_of_the_target(rows):
    target = tensor([row[0] for row in rows], "BF16")
    unchanged = torch.full_like(target, numerics.UNCHANGED)
    delta = Difference(unchanged, torch.zeros_like(target))
    for scale in (1.0, 0.5, -2.0, 0.0):
        assert same_bits(add(target, delta, scale, target.dtype), target)


@given(columns("F32", "F32"))
def test_scale_zero_is_the_target(rows):
    target = tensor([row[0] for row in rows], "F32")
    delta = Difference(tensor([row[1] for row in rows], "F32"), None)
    assert same_bits(add(target, delta, 0.0, target.dtype), target)


def test_own_base_is_restored_without_corrections_for_ordinary_weights():
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(1 << 16, generator=generator) * 0.02
    base = master.bfloat16()
    tuned = (master + 3e-4 * torch.randn(1 << 16, generator=generator)).bfloat16()
    delta = difference(tuned, base, "BF16")
    assert 0 < int((delta.lo != 0).sum()) < len(tuned) // 20
    assert same_bits(add(base, delta, 1.0, torch.bfloat16), tuned)


def test_the_tail_is_needed():
    """Guards the oracle: with hi alone some elements come out wrong."""
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(1 << 16, generator=generator) * 0.02).bfloat16()
    tuned = (base.float() + 3e-4 * torch.randn(1 << 16, generator=generator)).bfloat16()
    delta = difference(tuned, base, "BF16")
    assert not same_bits(add(base, delta._replace(lo=None), 1.0, torch.bfloat16), tuned)


@pytest.mark.parametrize(
    ("tuned", "base", "dense", "expected"),
    [
        ("BF16", "BF16", False, "BF16"),
        ("F16", "F16", False, "F16"),
        ("F32", "F32", False, "BF16"),
        ("F32", "F32", True, "F32"),
        ("F32", "BF16", True, "F32"),
        ("F16", "BF16", True, "BF16"),
    ],
)
def test_delta_dtype(tuned, base, dense, expected):
    assert delta_dtype(tuned, base, dense=dense) == expected
