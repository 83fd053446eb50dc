"""Blobs written once and committed: they are read forever, and written again byte for byte.

A new case is written by ``python tests/encodings/test_golden.py``, which never overwrites one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zstandard

from hubdiff.encodings import ENCODINGS, tails
from hubdiff.encodings.tails import Tail

GOLDEN = Path(__file__).parent.parent / "golden" / "encodings"
WRITTEN_WITH_ZSTD = (1, 5, 7)


def _hash(count: int, salt: int) -> np.ndarray:
    """Arbitrary 32-bit numbers, defined here so that no library can ever change them."""
    x = np.arange(count, dtype=np.uint64) + np.uint64(salt << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x >> np.uint64(32)).astype(np.uint32)


def _skewed(count: int, symbols: int, salt: int) -> np.ndarray:
    """Ranks below ``symbols``, small ones commoner (the product of three uniform numbers)."""
    uniform = [_hash(count, salt + i).astype(np.uint64) >> np.uint64(12) for i in range(3)]
    product = ((uniform[0] * uniform[1]) >> np.uint64(20)) * uniform[2] >> np.uint64(20)
    return (product * np.uint64(symbols) >> np.uint64(20)).astype(np.int64)


def _sparse(count: int, one_in: int, salt: int) -> np.ndarray:
    bits = (_hash(300, salt + 9) >> 16).astype(np.uint16)[_skewed(count, 300, salt)]
    bits[_hash(count, salt + 5) % one_in != 0] = 0x8000
    return bits


def _floats(count: int, dtype: type[np.unsignedinteger], salt: int) -> np.ndarray:
    """Constant top byte, skewed next, the lower ones noise: like the planes of weights."""
    width = 8 * np.dtype(dtype).itemsize
    low = (_hash(count, salt).astype(np.uint64) << np.uint64(32)) | _hash(count, salt + 1)
    skew = _skewed(count, 16, salt + 2).astype(np.uint64) << np.uint64(max(0, width - 16))
    mask = np.uint64((1 << max(0, width - 16)) - 1)
    top = np.uint64(0x3D << (width - 8) if width > 8 else 0)
    return ((low & mask) | skew | top).astype(dtype)


def _differences(count: int, salt: int) -> np.ndarray:
    """Both signs of 700 values, zeros at the end of many, and some that did not change."""
    values = 0x3800 + (_skewed(count, 700, salt) << (_hash(count, salt + 4) % 3)).astype(np.uint16)
    signs = (_hash(count, salt + 5) & 0x8000).astype(np.uint16)
    return np.where(_hash(count, salt + 6) % 5 == 0, 0x8000, values | signs).astype(np.uint16)


def _tails(hi: np.ndarray, one_in: int, salt: int) -> np.ndarray:
    lo = (hi - (8 + _hash(hi.size, salt) % 3 << 7)).astype(np.uint16) & 0x7FC0
    lo[(_hash(hi.size, salt + 1) % one_in != 0) | (hi == 0x8000)] = 0
    return lo


CASES = {
    "packed-constant": np.full(5000, 0x8000, np.uint16),
    "packed-direct": (_hash(600, 1) >> 16).astype(np.uint16) & 0x83FF,
    "packed-ranks": (_hash(280, 2) >> 16).astype(np.uint16)[_skewed(5000, 280, 3)],
    "packed-signs": (_hash(500, 4) >> 17).astype(np.uint16)[_skewed(9000, 500, 5)]
    | (_hash(9000, 8) & 0x8000).astype(np.uint16),
    "packed-gaps": _sparse(40_000, 100, 20),
    "packed-bitmap": _sparse(5000, 2, 50),
    "packed-bitmap-long": _sparse(40_000, 3, 55),
    "packed-far-gaps": _sparse(300_000, 3000, 40),
    "planes-8": _floats(1500, np.uint8, 60),
    "planes-16": _floats(1500, np.uint16, 63),
    "planes-32": _floats(700, np.uint32, 66),
    "planes-64": _floats(300, np.uint64, 69),
    "plain-16": (_hash(50, 72) >> 16).astype(np.uint16),
    "plain-32": _hash(25, 73),
}
# By the hi of each tail: a tail itself is made from it.
TAILS = {
    "tail-anywhere": (_differences(3000, 80), 90),
    "tail-together": (_differences(3000, 80), 20),
    "tail-apart": (_differences(40_000, 100), 3),
}
VARIANTS = {
    "packed-constant": 0,
    "packed-direct": 1,
    "packed-ranks": 2,
    "packed-signs": 3,
    "packed-gaps": 4,
    "packed-bitmap": 5,
    "packed-bitmap-long": 5,
    "tail-anywhere": tails.ANYWHERE,
    "tail-together": tails.TOGETHER,
    "tail-apart": tails.APART,
}
every_case = pytest.mark.parametrize("case", [*CASES, *TAILS])


def _tail(case: str) -> tuple[np.ndarray, np.ndarray]:
    hi, one_in = TAILS[case]
    return _tails(hi, one_in, 120), hi


def _encode(case: str) -> bytes:
    if case in TAILS:
        lo, hi = _tail(case)
        return tails.encode(Tail.of(lo), hi, "BF16", 4000)
    return ENCODINGS[case.split("-")[0]].encode(CASES[case])


@every_case
def test_old_blobs_are_read_forever(case: str) -> None:
    blob = (GOLDEN / f"{case}.bin").read_bytes()
    if case in TAILS:
        expected, hi = _tail(case)
        out = tails.decode(blob, hi, "BF16").full(hi.size)
    else:
        expected = CASES[case]
        out = np.empty_like(expected)
        ENCODINGS[case.split("-")[0]].decode(blob, out)
    np.testing.assert_array_equal(out, expected)


@every_case
@pytest.mark.skipif(
    zstandard.ZSTD_VERSION != WRITTEN_WITH_ZSTD,
    reason="another libzstd may choose other, equally valid frames",
)
def test_the_same_bits_still_give_the_same_bytes(case: str) -> None:
    assert _encode(case) == (GOLDEN / f"{case}.bin").read_bytes()


@pytest.mark.parametrize(("case", "variant"), VARIANTS.items())
def test_every_variant_has_a_golden_blob(case: str, variant: int) -> None:
    assert (GOLDEN / f"{case}.bin").read_bytes()[0] == variant


def test_every_golden_blob_is_tested() -> None:
    assert {path.stem for path in GOLDEN.glob("*.bin")} == {*CASES, *TAILS}
    assert {case.split("-")[0] for case in CASES} == set(ENCODINGS)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for missing in [case for case in (*CASES, *TAILS) if not (GOLDEN / f"{case}.bin").exists()]:
        (GOLDEN / f"{missing}.bin").write_bytes(_encode(missing))
        print("wrote", missing)
