"""The compiled bf16 arithmetic gives the bits of ``numerics``, or says that it met no number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubdiff import kernels, numerics
from hubdiff.encodings import dense, tails
from hubdiff.numerics import Difference
from hubdiff.segment_delta import Floats, _compare_any, compare

EVERY = np.arange(1 << 16, dtype=np.uint16)
NUMBERS = EVERY[(EVERY & 0x7F80) != 0x7F80]
# A corner of each kind, to be met by every pattern there is: zeros, subnormals, ties, the largest.
CORNERS = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x3F81, 0x4380, 0x7F7F]


def floats(bits: np.ndarray) -> torch.Tensor:
    return numerics.from_bits(bits.copy(), "BF16")


def difference(tuned: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    hi, marks = np.empty_like(tuned), np.empty(tuned.size, np.uint8)
    changed, numbers, restored, *squares = kernels.difference(tuned, base, hi, marks)
    assert changed == np.count_nonzero(tuned != base)
    elements = np.flatnonzero(marks)
    patterns = np.empty(elements.size, np.uint16)
    tail_restored = kernels.tail(tuned, base, elements, patterns)
    lo = np.zeros_like(tuned)
    lo[elements] = patterns
    if numbers:
        assert squares == pytest.approx([kernels.square(hi), kernels.square(base)], rel=1e-12)
        assert patterns.all()
        total = np.empty_like(tuned)
        kernels.add(base, hi, total)
        assert restored == np.array_equal(total[lo == 0], tuned[lo == 0])
        kernels.add_tail(base, hi, elements, patterns, total)
        assert tail_restored == np.array_equal(total[elements], tuned[elements])
    return hi, lo, numbers


def check_pair(tuned: np.ndarray, base: np.ndarray) -> None:
    hi, lo, numbers = difference(tuned, base)
    expected = numerics.difference(floats(tuned), floats(base), "BF16")
    # Where it overflows `numerics` finds another pair, and the kernels leave that to it.
    rounded = (floats(tuned).float() - floats(base).float()).bfloat16()
    finite = torch.isfinite(rounded).numpy()
    assert numbers == finite.all()
    assert np.array_equal(hi[finite], numerics.to_bits(expected.hi)[finite])
    assert expected.lo is not None
    assert np.array_equal(lo[finite], numerics.to_bits(expected.lo)[finite])


@pytest.mark.parametrize("corner", CORNERS, ids=hex)
def test_every_pattern_against_a_corner(corner):
    other = np.full_like(NUMBERS, corner)
    check_pair(NUMBERS, other)
    check_pair(other, NUMBERS)


@pytest.mark.parametrize("zero", [0x0000, 0x8000], ids=hex)
def test_a_zero_that_loses_its_sign_is_said_of_every_pair(zero):
    """Whether all come back is said of many at once: of those that do it is, and of no other."""
    other = np.full_like(NUMBERS, zero)
    hi, marks = np.empty_like(NUMBERS), np.empty(NUMBERS.size, np.uint8)
    for tuned, base in (NUMBERS, other), (other, NUMBERS):
        kernels.difference(tuned, base, hi, marks)
        total = np.empty_like(tuned)
        kernels.add(base, hi, total)
        back = (total == tuned) | (marks != 0)
        assert restored(tuned[back], base[back])
        for i in np.flatnonzero(~back):
            assert not restored(tuned[i : i + 1], base[i : i + 1])
        lost = (tuned == 0x8000) & (base != 0x8000)
        assert np.array_equal(back, ~lost)


def restored(tuned: np.ndarray, base: np.ndarray) -> bool:
    hi, marks = np.empty_like(tuned), np.empty(tuned.size, np.uint8)
    return kernels.difference(tuned, base, hi, marks)[2]


@pytest.mark.parametrize("corner", CORNERS, ids=hex)
def test_what_is_no_number_makes_a_difference_that_is_none(corner):
    other = np.array([corner], np.uint16)
    for pattern in EVERY[(EVERY & 0x7F80) == 0x7F80].reshape(-1, 1):
        assert not difference(pattern, other)[2]
        assert not difference(other, pattern)[2]
        assert not difference(pattern, pattern)[2]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
def test_a_difference_has_the_bits_of_numerics(seed, spread):
    """``spread``: how far apart the exponents of the two lie, at most."""
    rng = np.random.default_rng(seed)
    tuned = rng.choice(NUMBERS, 4096)
    shift = rng.integers(-spread, spread + 1, tuned.size) << 7
    near = (tuned.astype(np.int64) & 0x7FFF) + shift + rng.integers(-99, 100, tuned.size)
    base = np.clip(near, 0, 0x7F7F).astype(np.uint16) | (rng.integers(0, 2, 4096) << 15).astype(
        "u2"
    )
    check_pair(tuned, base)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 8, 40, 250]))
def test_a_sum_has_the_bits_of_numerics(seed, spread):
    """Any target, hi and lo, not only those that a difference can have."""
    rng = np.random.default_rng(seed)
    target, hi, lo = (rng.choice(NUMBERS, 4096) for _ in range(3))
    if spread:
        exponents = rng.integers(0, spread, (3, 4096)) + 1
        target, hi, lo = (
            (part & 0x807F) | (exponent << 7).astype(np.uint16)
            for part, exponent in zip((target, hi, lo), exponents, strict=True)
        )
    lo[rng.random(4096) < 0.5] = 0
    out = np.empty_like(target)
    numbers = kernels.add(target, hi, out)
    alone = numerics.add(floats(target), Difference(floats(hi), None), 1.0, torch.bfloat16)
    assert numbers == bool(torch.isfinite(alone).all())
    finite = torch.isfinite(alone).numpy()
    assert np.array_equal(out[finite], numerics.to_bits(alone)[finite])
    elements = np.flatnonzero(lo != 0)
    kernels.add_tail(target, hi, elements, lo[elements], out)
    both = numerics.add(floats(target), Difference(floats(hi), floats(lo)), 1.0, torch.bfloat16)
    finite = torch.isfinite(both).numpy()
    assert np.array_equal(out[finite], numerics.to_bits(both)[finite])


@pytest.mark.parametrize("odd", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF], ids=hex)
def test_what_is_no_number_is_said(odd):
    one, other = np.array([0x3F80, odd], np.uint16), np.array([0x3F80, 0x3F80], np.uint16)
    out = np.empty_like(one)
    assert not difference(one, other)[2]
    assert not difference(other, one)[2]
    assert not kernels.add(one, other, out)
    assert not kernels.add(other, one, out)
    assert not kernels.add_tail(other, other, np.array([1]), one[1:], out)


@pytest.mark.parametrize("place", [0, 4095, 4096, 9_999])
def test_one_among_many_is_noticed(place):
    """Wherever it stands: what is no number, and a zero that changed its sign."""
    many, zeros = np.full(10_000, 0x3F80, np.uint16), np.zeros(10_000, np.uint16)
    one, negative, out = many.copy(), zeros.copy(), np.empty_like(many)
    one[place], negative[place] = 0x7F80, 0x8000
    assert not difference(one, many)[2]
    assert not kernels.add(many, one, out)
    assert not kernels.add_tail(many, many, np.arange(10_000), one, out)
    changed, numbers, restored, *_ = kernels.difference(
        negative, zeros, out, np.empty(10_000, np.uint8)
    )
    assert (changed, numbers, restored) == (1, True, False)


def test_more_changes_are_counted_than_16_bits_hold():
    one = np.full((1 << 16) + 1, 0x3F80, np.uint16)
    difference(one, np.zeros_like(one))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), min_size=1, max_size=40))
def test_a_comparison_is_the_same_either_way(pairs):
    tuned, base = (Floats(np.array(side, np.uint16), "BF16") for side in zip(*pairs, strict=True))
    quick, slow = compare(tuned, base, None, "BF16"), _compare_any(tuned, base, None, "BF16")
    sides = [(side.hi, side.residual, *(side.lo or (None, None))) for side in (quick, slow)]
    for one, other in zip(*sides, strict=True):
        assert (one is None) == (other is None)
        assert one is None or np.array_equal(one, other)
    assert quick.changed == slow.changed
    assert quick.delta_square == pytest.approx(slow.delta_square, rel=1e-12)
    assert quick.base_square == pytest.approx(slow.base_square, rel=1e-12)


def test_the_sum_of_squares_leaves_out_what_is_no_number():
    assert kernels.square(np.array([0x4040, 0xC080, 0x7F80, 0x7FC0], np.uint16)) == 9 + 16


def test_it_works_where_nothing_can_be_cached(tmp_path):
    """A read-only install and no home: compiled each time, and it works."""
    copy = tmp_path / "kernels_copy.py"
    copy.write_text(Path(kernels.__file__).read_text())
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import numba.core.caching as c;"
        "c.CacheImpl._locator_classes = []; import kernels_copy as k, numpy as np;"
        "print(k.square(np.array([0x4040], np.uint16)))"
    )
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.strip() == "9.0"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.sampled_from([0, 0.01, 0.1, 0.5, 1]), st.integers(0, 2**32 - 1))
def test_positions_are_those_of_numpy(size, share, seed):
    mask = np.random.default_rng(seed).random(size) < share
    positions = dense.where(mask)
    assert positions.dtype == np.int64
    assert np.array_equal(positions, np.flatnonzero(mask))


@pytest.mark.parametrize("size", [0, 1, 2, 7, *(kernels._MANY_RANKS + i for i in range(-2, 3))])
def test_every_rank_is_looked_up(size):
    rng = np.random.default_rng(size)
    table = rng.integers(0, 1 << 16, 256, np.uint16)
    ranks = rng.integers(0, 256, size, np.uint8)
    out = np.empty(size, np.uint16)
    kernels.from_ranks(ranks, table, out)
    assert np.array_equal(out, table[ranks])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400) | st.integers(1, 5000),
    st.sampled_from([0, 0.1, 0.9, 0.999]),
    st.sampled_from([0.01, 0.5, 1]),
    st.integers(0, 2**32 - 1),
)
def test_elements_are_counted_kind_by_kind(size, unchanged, share, seed):
    rng = np.random.default_rng(seed)
    hi = rng.integers(0, 1 << 16, size, np.uint16)
    hi[rng.random(size) < unchanged] = 0x8000
    words, before = tails.kinds_of(hi)
    zeros = [(pattern | 8) & -(pattern | 8) for pattern in hi.tolist()]
    by_kind = [
        [i for i in range(size) if zeros[i] == 1 << kind and hi[i] != 0x8000]
        for kind in range(tails.KINDS)
    ]
    assert before[-1].tolist() == [len(found) for found in by_kind]
    in_order = np.array([i for found in by_kind for i in found], np.int64)
    chosen = np.flatnonzero(rng.random(in_order.size) < share)
    elements = np.empty(chosen.size, np.int64)
    kernels.from_places(words, before, chosen, elements)
    assert np.array_equal(elements, in_order[chosen])
    places, kinds = np.empty(chosen.size, np.int64), np.empty(chosen.size, np.uint8)
    kernels.to_places(words, before, elements, places, kinds)
    starts = np.cumsum([0, *(len(found) for found in by_kind)])
    assert np.array_equal(starts[kinds] + places, chosen)
