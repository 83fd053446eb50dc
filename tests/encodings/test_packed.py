"""The variants of ``packed``: which is chosen, how small it gets, what a reader refuses."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubdiff.encodings import ENCODINGS, SEGMENT
from hubdiff.encodings._frames import write_varint
from hubdiff.errors import CorruptPayload

PACKED = ENCODINGS["packed"]
CONSTANT, DIRECT, RANKS, SIGNS, GAPS, BITMAP = range(6)
UNCHANGED = 0x8000

Delta = Callable[[int, float], np.ndarray]


def _order0_bytes(bits: np.ndarray) -> float:
    shares = np.unique(bits, return_counts=True)[1] / bits.size
    return float(-(shares * np.log2(shares)).sum() * bits.size / 8)


def _decode(blob: bytes, count: int) -> np.ndarray:
    out = np.empty(count, np.uint16)
    PACKED.decode(blob, out)
    return out


def _at(positions: list[int], count: int) -> np.ndarray:
    bits = np.full(count, UNCHANGED, np.uint16)
    bits[positions] = np.arange(len(positions)) % 7 + 1
    return bits


@pytest.mark.parametrize(
    ("step", "unchanged", "variant", "bound"),
    [
        (2e-7, 0.9975, GAPS, 1.3),
        (1.2e-5, 0.86, GAPS, 1.04),
        (2e-5, 0.78, BITMAP, 1.03),
        (6.5e-5, 0.45, BITMAP, 1.03),
        (1e-4, 0.32, BITMAP, 1.03),
        (2.2e-4, 0.16, RANKS, 1.03),
        (1.2e-3, 0.03, SIGNS, 1.02),
        (4e-3, 0.01, SIGNS, 1.02),
    ],
)
def test_differences_come_close_to_their_entropy(
    bf16_delta: Delta, step: float, unchanged: float, variant: int, bound: float
) -> None:
    bits = bf16_delta(SEGMENT, step)
    assert float(np.mean(bits == UNCHANGED)) == pytest.approx(unchanged, abs=0.01)
    blob = PACKED.encode(bits)
    assert blob[0] == variant
    assert len(blob) < bound * _order0_bytes(bits)


@pytest.mark.parametrize(("share", "bound"), [(5e-4, 1.3), (2e-3, 1.15), (1e-2, 1.07)])
def test_sparse_tails_and_residuals_come_close_too(share: float, bound: float) -> None:
    rng = np.random.default_rng(3)
    steps = 2 * rng.geometric(0.65, SEGMENT) - (rng.random(SEGMENT) < 0.5)  # zig-zag, mostly ±1
    bits = np.where(rng.random(SEGMENT) < share, steps, 0).astype(np.uint16)
    assert len(PACKED.encode(bits)) < bound * _order0_bytes(bits)


def test_weights_themselves_are_cut_into_planes() -> None:
    rng = np.random.default_rng(0)
    weights = (rng.normal(0, 0.02, 1 << 18).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    blob = PACKED.encode(weights)
    assert blob[0] == DIRECT
    assert len(blob) < 0.68 * weights.nbytes


def test_an_unchanged_segment_is_three_bytes() -> None:
    blob = PACKED.encode(np.full(SEGMENT, UNCHANGED, np.uint16))
    assert blob == struct.pack("<BH", CONSTANT, UNCHANGED)


def test_changes_in_one_column_of_a_matrix_are_sparse() -> None:
    """The common symbol is found by sampling: regular patterns must not fool it."""
    for columns in (16, 256, 1024, 4096):
        bits = np.full(SEGMENT, UNCHANGED, np.uint16)
        bits[::columns] = 0x3C00
        assert PACKED.encode(bits)[0] == GAPS


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 65_535, 65_536, 300_000])
@pytest.mark.parametrize("first", [0, 254, 255, 70_000])
def test_every_size_of_gap(gap: int, first: int) -> None:
    positions = [first, first + 1 + gap, first + 2 + gap]
    for count in (positions[-1] + 1, positions[-1] + 400):
        bits = _at(positions, max(6, count))
        np.testing.assert_array_equal(_decode(PACKED.encode(bits), bits.size), bits)


@given(positions=st.sets(st.integers(0, 39_999), min_size=1, max_size=300))
@settings(max_examples=80, deadline=None)
def test_any_positions_come_back(positions: set[int]) -> None:
    bits = _at(sorted(positions), 40_000)
    blob = PACKED.encode(bits)
    assert blob[0] == GAPS
    np.testing.assert_array_equal(_decode(blob, bits.size), bits)


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.03, 0.09, 0.19, 0.21, 0.3, 0.5, 0.71, 0.9])
@pytest.mark.parametrize("count", [7, 1001, 100_003])
def test_every_density_comes_back(share: float, count: int) -> None:
    rng = np.random.default_rng(5)
    bits = np.full(count, UNCHANGED, np.uint16)
    hits = rng.random(bits.size) < share
    bits[hits] = rng.geometric(0.01, int(hits.sum()))
    np.testing.assert_array_equal(_decode(PACKED.encode(bits), bits.size), bits)


def test_changes_in_blocks_are_no_larger_as_a_bitmap() -> None:
    """Half of a segment untouched, as rows of an embedding: most bytes of the bitmap are 0."""
    rng = np.random.default_rng(8)
    bits = np.full(SEGMENT, UNCHANGED, np.uint16)
    rows = bits.reshape(512, -1)
    touched = rng.random(len(rows)) < 0.5
    rows[touched] = rng.geometric(0.05, (int(touched.sum()), rows.shape[1]))
    blob = PACKED.encode(bits)
    assert blob[0] == BITMAP
    assert len(blob) < 1.02 * _order0_bytes(rows[touched].ravel())


def test_a_sample_that_misleads_costs_no_bit() -> None:
    """What the sample sees nine times in ten is rare, and what it takes for rare is half of all."""
    step = (1 << 18 >> 12) | 1
    for seen, elsewhere in ((0.9, 0.1), (0.5, 0.02), (0.1, 0.9)):
        rng = np.random.default_rng(9)
        share = np.full(1 << 18, elsewhere)
        share[::step] = seen
        bits = rng.integers(0, 300, share.size).astype(np.uint16)
        bits[rng.random(share.size) < share] = UNCHANGED
        np.testing.assert_array_equal(_decode(PACKED.encode(bits), bits.size), bits)


def test_escapes_at_every_density_come_back() -> None:
    rng = np.random.default_rng(6)
    for share in (0.001, 0.04, 0.2):
        bits = rng.integers(0, 250, 100_001).astype(np.uint16)
        rare = rng.random(bits.size) < share
        bits[rare] = rng.integers(1000, 60_000, int(rare.sum()))
        blob = PACKED.encode(bits)
        assert blob[0] == RANKS
        np.testing.assert_array_equal(_decode(blob, bits.size), bits)


def test_signs_are_apart_only_where_that_saves_escapes() -> None:
    rng = np.random.default_rng(6)
    steps = (rng.standard_cauchy(1 << 17) * 60).clip(-32_000, 32_000).astype(np.int16)
    magnitudes = np.abs(steps).astype(np.uint16)
    for bits, variant in (
        (magnitudes | ((steps < 0) * 0x8000).astype(np.uint16), SIGNS),  # as floats have them
        (steps.view(np.uint16), RANKS),  # two's complement
        (((steps << 1) ^ (steps >> 15)).view(np.uint16), RANKS),  # zigzag
    ):
        blob = PACKED.encode(bits)
        assert blob[0] == variant
        np.testing.assert_array_equal(_decode(blob, bits.size), bits)


# Blobs by hand, from FORMAT.md: what is right is read, what is wrong is refused.


def _raw(data: bytes) -> bytes:
    return write_varint(len(data)) + data


def _symbols(*symbols: int) -> bytes:
    rotated = [(s << 1 | s >> 15) & 0xFFFF for s in symbols]
    return _raw(bytes(r & 0xFF for r in rotated)) + _raw(bytes(r >> 8 for r in rotated))


def _direct(*symbols: int) -> bytes:
    return bytes([DIRECT]) + _symbols(*symbols)


def _ranks(table: list[int], ranks: bytes, escapes: int = 0, escaped: bytes = b"") -> bytes:
    head = bytes([RANKS, len(table)]) + write_varint(escapes)
    return head + _raw(ranks) + _symbols(*table) + escaped


def _signs(flips: bytes, rest: bytes) -> bytes:
    return bytes([SIGNS]) + flips + rest


def _gaps(
    others: int, coarse: bytes, values: bytes, fine_bits: int = 0, fine: bytes = b""
) -> bytes:
    head = struct.pack("<BH", GAPS, UNCHANGED) + write_varint(others) + bytes([fine_bits])
    return head + write_varint(max(0, len(coarse) - others)) + _raw(coarse) + fine + values


def _bitmap(marked: int, marks: bytes, others: bytes) -> bytes:
    return struct.pack("<BH", BITMAP, UNCHANGED) + write_varint(marked) + _raw(marks) + others


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (struct.pack("<BH", CONSTANT, 5), [5, 5, 5]),
        (_direct(1, 0x8001, 0xFFFF), [1, 0x8001, 0xFFFF]),
        (_ranks([7, 9], b"\x00\x01\x00"), [7, 9, 7]),
        (_ranks([7], b"\xff\x00\x00\xff", 2, _direct(8, 9)), [8, 7, 7, 9]),
        (_ranks([7], b"\xff\x00", 1, _ranks([8], b"\x00")), [8, 7]),
        (_signs(b"\x05", _direct(1, 2, 3)), [0x8001, 2, 0x8003]),
        (_signs(b"\x01\x01", struct.pack("<BH", CONSTANT, 0)), [0x8000, *[0] * 7, 0x8000]),
        (_signs(b"\x02", struct.pack("<BH", CONSTANT, 0x8001)), [0x8001, 1]),
        (
            _ranks([7], b"\x00\x00\xff\xff", 2, _signs(b"\x01", _direct(1, 2))),
            [7, 7, 0x8001, 2],
        ),
        (_gaps(1, b"\x02", _direct(3)), [UNCHANGED, UNCHANGED, 3, UNCHANGED]),
        (_gaps(2, b"\x00\x01", _direct(3, 4)), [3, UNCHANGED, 4, UNCHANGED]),
        (_gaps(1, b"\xff\x00", _direct(3)), [UNCHANGED] * 255 + [3]),
        (_gaps(2, b"\x00\x00", _direct(3, 4), 1, b"\x01"), [UNCHANGED, 3, 4, UNCHANGED]),
        (_gaps(1, b"\x01", _direct(3), 8, b"\x02"), [UNCHANGED] * 258 + [3]),
        (
            _gaps(2, b"\x01\x00", _direct(3, 4), 3, b"\x2a"),
            [*[UNCHANGED] * 10, 3, *[UNCHANGED] * 5, 4],
        ),
        (_bitmap(1, b"\x04", _direct(3)), [UNCHANGED, UNCHANGED, 3, UNCHANGED]),
        (_bitmap(3, b"\x07", _direct(3, 4, 5)), [3, 4, 5]),
        (_bitmap(2, b"\x01\x01", _signs(b"\x02", _direct(3, 4))), [3, *[UNCHANGED] * 7, 0x8004]),
        (_bitmap(1, b"\xf2", _direct(3)), [UNCHANGED, 3, UNCHANGED, UNCHANGED]),
    ],
)
def test_blobs_written_by_hand_are_read(blob: bytes, expected: list[int]) -> None:
    assert _decode(blob, len(expected)).tolist() == expected


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b"\x06", "variant 6"),
        (b"\xff\x00\x00", "variant 255"),
        (struct.pack("<BB", CONSTANT, 5), "the symbol needs 2 bytes"),
        (bytes([DIRECT]) + _raw(bytes(601)), "low bytes of the symbols stores 601 bytes for 600"),
        (_ranks([7, 8, 9], bytes([3]) * 600), "a rank is beyond the table of 3"),
        (_ranks([7], bytes([254]) * 600), "a rank is beyond the table of 1"),
        (_ranks([], bytes(600)), "a rank is beyond the table of 0"),
        (_ranks([7], bytes([255]) * 600), "the ranks have 600 escapes, 0 are declared"),
        (_ranks([7], bytes(600), 1, _direct(8)), "the ranks have 0 escapes, 1 are declared"),
        (_ranks([7], bytes(600), 1), "the variant of the escaped symbols needs 1 bytes"),
        (_ranks([7], bytes(600), 2, _gaps(1, b"\x00", _direct(3))), "variant 4"),
        (bytes([RANKS, 1]) + write_varint(301), "number of escapes is 301, expected 0 to 300"),
        (_signs(bytes(74), b""), "the signs needs 75 bytes"),
        (_signs(bytes(75), b""), "the variant needs 1 bytes"),
        (_signs(bytes(75), _signs(bytes(75), _direct(*[1] * 600))), "variant 3"),
        (_gaps(0, b"", b""), "the number of places is 0, expected 1 to 300"),
        (_gaps(301, b"\x00" * 301, b""), "the number of places is 301, expected 1 to 300"),
        (_gaps(0xFFFFFFFF, b"", b""), "the number of places is 4294967295"),
        (_gaps(1, b"\x00", _direct(3), 17, bytes(3)), "have 17 fine bits, 16 at most"),
        (_gaps(1, b"\x00" * 4, b""), "escapes in the gaps is 3, expected 0 to 2"),
        (_gaps(1, b"\x00" * 2, _direct(3), 2, b"\x00"), "in the gaps is 1, expected 0 to 0"),
        (_gaps(1, b"\xff", _direct(3)), "the gaps are not 1"),
        (_gaps(1, b"\x00\xff", _direct(3)), "the gaps are not 1"),
        (_gaps(1, b"\x00\x00", _direct(3)), "the gaps are not 1"),
        (_gaps(1, b"\xff\xff\x5a", _direct(3)), "the gaps reach place 600 of 600"),
        (_gaps(1, b"\xfe", _direct(3), 8, b"\x00"), "the gaps reach place 65024 of 600"),
        (_gaps(2, b"\x00\x00", b"", 8, b"\x00"), "the fine bits of the gaps needs 2 bytes"),
        (_gaps(1, b"\x00", _gaps(1, b"\x00", _direct(3))), "variant 4"),
        (_gaps(1, b"\x00", b""), "the variant of the symbols needs 1 bytes"),
        (_gaps(1, b"\x00", _direct(3)) + b"\x00", "1 bytes follow"),
        (_bitmap(0, bytes(75), b""), "the number of others is 0, expected 1 to 600"),
        (_bitmap(601, b"\xff" * 75, b""), "the number of others is 601, expected 1 to 600"),
        (_bitmap(1, bytes(76), _direct(3)), "the bitmap stores 76 bytes for 75"),
        (_bitmap(1, bytes(75), _direct(3)), "the bitmap marks 0 symbols, 1 are declared"),
        (_bitmap(1, bytes(73) + b"\x03\x00", _direct(3)), "marks 2 symbols, 1 are declared"),
        (_bitmap(1, b"\x01" + bytes(74), b""), "the variant of the others needs 1 bytes"),
        (_bitmap(1, b"\x01" + bytes(74), _direct(3, 4)), "the symbols"),
        (_bitmap(1, b"\x01" + bytes(74), _bitmap(1, b"\x01", _direct(3))), "variant 5"),
        (_bitmap(1, b"\x01" + bytes(74), _direct(3)) + b"\x00", "1 bytes follow"),
    ],
)
def test_impossible_blobs_are_refused_by_name(blob: bytes, says: str) -> None:
    with pytest.raises(CorruptPayload, match=says):
        _decode(blob, 600)


def test_the_most_expensive_bitmap_costs_a_small_multiple() -> None:
    count = 1 << 18
    blob = _bitmap(count, b"\xff" * (count // 8), _signs(bytes(count // 8), _direct(*[1] * count)))
    out = np.empty(count, np.uint16)
    tracemalloc.start()
    PACKED.decode(blob, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.tolist() == [1] * count
    assert peak < 6 * out.nbytes


@pytest.mark.parametrize("fine_bits", [0, 16])
def test_the_most_expensive_gaps_cost_a_small_multiple(fine_bits: int) -> None:
    count = 1 << 18
    others = count // 2
    coarse = b"\xff" * ((count >> fine_bits) // 255) + bytes(others)
    fine = bytes(others * fine_bits // 8)
    blob = _gaps(others, coarse, _direct(*[1] * others), fine_bits, fine)
    out = np.empty(count, np.uint16)
    tracemalloc.start()
    with contextlib.suppress(CorruptPayload):
        PACKED.decode(blob, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * out.nbytes
