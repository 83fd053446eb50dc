"""``lo`` told by its ``hi``: any pair comes back, what is wrong is refused, and it gets smaller."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubdiff.encodings import ENCODINGS, SEGMENT, tails
from hubdiff.encodings._frames import write_varint
from hubdiff.encodings.tails import Tail
from hubdiff.errors import CorruptPayload

UNCHANGED = 0x8000
BLOCK = 64
CONSTANT = b"\x00"


def _there_and_back(lo: np.ndarray, hi: np.ndarray, dtype: str = "BF16", stored: int = 1) -> bytes:
    blob = tails.encode(Tail.of(lo), hi, dtype, stored)
    assert blob == tails.encode(Tail.of(lo.copy()), hi.copy(), dtype, stored)
    np.testing.assert_array_equal(tails.decode(blob, hi, dtype).full(hi.size), lo)
    return blob


@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 4, 8, 0x3C00, 0x7F80, UNCHANGED, 0x8001, 0xFFFF])
            | st.integers(0, 0xFFFF),
            st.sampled_from([0, 0, 1, 0x3C00, 0x7F80, UNCHANGED, 0xFFFF]) | st.integers(0, 0xFFFF),
        ),
        min_size=1,
        max_size=200,
    ),
    dtype=st.sampled_from(["BF16", "F16"]),
    stored=st.sampled_from([1, 1 << 20]),
)
@settings(deadline=None)
def test_any_pair_comes_back(pairs: list[tuple[int, int]], dtype: str, stored: int) -> None:
    """Overflow stores tuned and −base, so that ``lo`` may be as large as ``hi``."""
    hi, lo = (np.array(side, np.uint16) for side in zip(*pairs, strict=True))
    lo[hi == UNCHANGED] = 0
    if lo.any():
        _there_and_back(lo, hi, dtype, stored)


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5000, SEGMENT])
@pytest.mark.parametrize("share", [1e-4, 0.003, 0.1, 1])
def test_every_density_comes_back(count: int, share: float) -> None:
    rng = np.random.default_rng(count)
    hi = rng.integers(0, 1 << 16, count, np.uint16)
    hi[rng.random(count) < 0.4] = UNCHANGED
    hi[-1] = 0x3C01
    lo = rng.integers(1, 1 << 16, count, np.uint16)
    lo[(rng.random(count) > share) | (hi == UNCHANGED)] = 0
    lo[-1] = 0x3401
    _there_and_back(lo, hi)
    _there_and_back(lo, hi, stored=1 << 30)


@pytest.mark.parametrize("last_digits", [1, 2, 4, 8])
def test_all_of_one_kind_come_back(last_digits: int) -> None:
    hi = np.full(3 * BLOCK + 7, 0x3C00 | last_digits, np.uint16)
    _there_and_back(np.full_like(hi, 0x3400), hi)


def test_a_tail_where_nothing_changed_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nothing changed"):
        tails.encode(Tail.of(np.array([1], np.uint16)), np.array([UNCHANGED], np.uint16), "BF16", 1)


def _pair(count: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """``hi`` and ``lo`` of a fine-tune of weights of N(0, 0.02) by N(0, step)."""
    from hubdiff.segment_delta import Floats, compare

    rng = np.random.default_rng(7)

    def bits(values: np.ndarray) -> np.ndarray:
        wide = values.astype(np.float32).view(np.uint32)
        return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)

    weights = rng.normal(0, 0.02, count)
    base, tuned = bits(weights), bits(weights + rng.normal(0, step, count))
    found = compare(Floats(tuned, "BF16"), Floats(base, "BF16"), None, "BF16")
    assert found.hi is not None
    assert found.lo is not None
    return found.hi, found.lo.full(count)


@pytest.mark.parametrize(
    ("step", "variant", "share"),
    [
        (2e-6, tails.TOGETHER, 0.8),
        (5e-4, tails.APART, 0.8),
        (5e-3, tails.APART, 0.85),
    ],
)
def test_it_is_smaller_than_lo_alone(step: float, variant: int, share: float) -> None:
    hi, lo = _pair(SEGMENT, step)
    blob = _there_and_back(lo, hi)
    assert blob[0] == variant
    assert len(blob) < share * len(ENCODINGS["packed"].encode(lo))


@pytest.mark.parametrize("step", [2e-6, 6e-5, 2e-4])
def test_lists_of_each_kind_may_have_any_length(
    step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many tails are worth lists of their own is for the writer to say."""
    monkeypatch.setattr(tails, "_WORTH_APART", 0)
    hi, lo = _pair(SEGMENT, step)
    assert _there_and_back(lo, hi)[0] == tails.APART


def test_few_tails_are_placed_anywhere() -> None:
    hi, lo = _pair(SEGMENT, 6e-5)
    stored = len(ENCODINGS["packed"].encode(hi))
    blob = _there_and_back(lo, hi, stored=stored)
    assert blob[0] == tails.ANYWHERE
    assert len(blob) < 0.01 * stored


# Blobs by hand, from FORMAT.md.


def _raw(data: bytes) -> bytes:
    return write_varint(len(data)) + data


def _places(gaps: bytes, symbol: int = 0x0480) -> bytes:
    """A symbol for each gap, all the same."""
    count = len(gaps)
    head = write_varint(count) + b"\x00\x00" + _raw(gaps)
    return head + CONSTANT + symbol.to_bytes(2, "little")


HI = np.array([UNCHANGED, 0x3C01, 0x3C02, 0x3C08, 0x3C03, UNCHANGED], np.uint16)


@pytest.mark.parametrize(
    ("blob", "elements"),
    [
        (b"\x00" + _places(b"\x01\x02"), [1, 4]),
        (b"\x00\x00", []),
        (b"\x01" + _places(b"\x00\x00\x00\x00"), [1, 4, 2, 3]),
        (b"\x01" + _places(b"\x03"), [3]),
        (b"\x01\x00", []),
        (b"\x02" + _places(b"\x01") + _places(b"\x00") + b"\x00" + _places(b"\x00"), [4, 2, 3]),
        (b"\x02\x00\x00\x00\x00", []),
    ],
)
def test_blobs_written_by_hand_are_read(blob: bytes, elements: list[int]) -> None:
    found = tails.decode(blob, HI, "BF16")
    assert found.elements.tolist() == elements
    assert found.patterns.tolist() == [0x3780] * len(elements)


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b"", "the variant needs 1 bytes"),
        (b"\x03", "there is no variant 3"),
        (b"\x00", "the number of places needs 1 bytes"),
        (b"\x00\x07", "the number of places is 7, expected 0 to 6"),
        (b"\x00" + _places(b"\x00"), "a place has no tail"),
        (b"\x00" + _places(b"\x01", symbol=0x3C00), "a place has no tail"),
        (b"\x01" + _places(b"\x02", symbol=0x3C00), "a place has no tail"),
        (b"\x00" + _places(b"\x06"), "the gaps reach place 6 of 6"),
        (b"\x00\x00\x00", "1 bytes follow"),
        (b"\x01\x07", "the number of places is 7, expected 0 to 6"),
        (b"\x01" + _places(b"\x04"), "the gaps reach place 4 of 4"),
        (b"\x01" + _places(b"\x00\x00\x00\x00\x00"), "the gaps reach place 4 of 4"),
        (b"\x02\x00\x00\x00", "the number of places needs 1 bytes"),
        (b"\x02" + _places(b"\x02") + b"\x00\x00\x00", "the gaps reach place 2 of 2"),
        (b"\x02\x00\x00" + _places(b"\x00") + b"\x00", "the gaps reach place 0 of 0"),
    ],
)
def test_impossible_blobs_are_refused_by_name(blob: bytes, says: str) -> None:
    with pytest.raises(CorruptPayload, match=says):
        tails.decode(blob, HI, "BF16")


def test_nothing_changed_has_no_tail() -> None:
    hi = np.full(9, UNCHANGED, np.uint16)
    with pytest.raises(CorruptPayload, match="the gaps reach place 0 of 0"):
        tails.decode(b"\x01" + _places(b"\x00"), hi, "BF16")


def test_the_tail_of_a_difference_stands_where_it_changed() -> None:
    """What ``encode`` takes for granted of numerics, subnormals and overflow included."""
    from hubdiff.segment_delta import Floats, compare

    rng = np.random.default_rng(11)
    for dtype in ("BF16", "F16"):
        tuned, base = rng.integers(0, 1 << 16, (2, 200_000), np.uint16)
        base[:100_000] = tuned[:100_000] ^ rng.integers(0, 8, 100_000, np.uint16)
        found = compare(Floats(tuned, dtype), Floats(base, dtype), None, dtype)
        assert found.hi is not None
        assert found.lo is not None
        assert (found.hi[found.lo.elements] != UNCHANGED).all()
