"""A second decoder, written from FORMAT.md alone, reads what hubdiff writes.

Slow and plain on purpose: no numpy, nothing of hubdiff. If the two disagree, one of them or the
document is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import pytest
import zstandard

from hubdiff.encodings import ENCODINGS, tails
from hubdiff.encodings.tails import Tail

FORMAT = Path(__file__).parents[2] / "FORMAT.md"


class Cursor:
    def __init__(self, blob: bytes) -> None:
        self.blob, self.at = blob, 0

    def take(self, size: int) -> bytes:
        piece = self.blob[self.at : self.at + size]
        assert len(piece) == size
        self.at += size
        return piece

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        byte = self.uint(1)
        return byte if byte < 128 else byte - 128 + 128 * self.varint()

    def stream(self, size: int) -> bytes:
        stored_size = self.varint()
        assert stored_size <= size
        body = self.take(stored_size)
        if stored_size == size:
            return body
        if stored_size == 1:
            return body * size
        assert zstandard.frame_content_size(body) == size
        return zstandard.ZstdDecompressor().decompress(body)

    def symbols(self, length: int) -> list[int]:
        low, high = self.stream(length), self.stream(length)
        rotated = [b << 8 | a for a, b in zip(low, high, strict=True)]
        return [r >> 1 | (r & 1) << 15 for r in rotated]


def plain(cursor: Cursor, width: int, n: int) -> list[int]:
    return [cursor.uint(width // 8) for _ in range(n)]


def planes(cursor: Cursor, width: int, n: int) -> list[int]:
    streams = [cursor.stream(n) for _ in range(width // 8)]
    return [int.from_bytes(unit, "little") for unit in zip(*streams, strict=True)]


def dense(cursor: Cursor, n: int, variant: int | None = None) -> list[int]:
    if variant is None:
        variant = cursor.uint(1)
    if variant == 0:
        return [cursor.uint(2)] * n
    if variant == 1:
        return cursor.symbols(n)
    if variant == 2:
        size, escapes, ranks = cursor.uint(1), cursor.varint(), cursor.stream(n)
        table = cursor.symbols(size)
        assert escapes <= n // 2
        rest = iter(dense(cursor, escapes) if escapes else [])
        found = [next(rest) if rank == 255 else table[rank] for rank in ranks]
        assert next(rest, None) is None
        return found
    assert variant == 3
    flips = int.from_bytes(cursor.take(-(-n // 8)), "little")
    inner = cursor.uint(1)
    assert inner < 3
    return [s ^ (flips >> i & 1) << 15 for i, s in enumerate(dense(cursor, n, inner))]


def places(cursor: Cursor) -> list[tuple[int, int]]:
    count = cursor.varint()
    if not count:
        return []
    fine_bits, escapes = cursor.uint(1), cursor.varint()
    coarse = _gaps(cursor.stream(count + escapes))
    fine = int.from_bytes(cursor.take(-(-count * fine_bits // 8)), "little")
    gaps = [
        (c << fine_bits) + (fine >> i * fine_bits) % (1 << fine_bits) for i, c in enumerate(coarse)
    ]
    symbols = dense(cursor, count)
    assert len(gaps) == len(symbols) == count
    ends = list(accumulate(gap + 1 for gap in gaps))
    return [(end - 1, symbol) for end, symbol in zip(ends, symbols, strict=True)]


def packed(cursor: Cursor, width: int, n: int) -> list[int]:
    variant = cursor.uint(1)
    if variant < 4:
        return dense(cursor, n, variant)
    common = cursor.uint(2)
    if variant == 5:
        count, bits = cursor.varint(), int.from_bytes(cursor.stream(-(-n // 8)), "little")
        others = iter(dense(cursor, count))
        found = [next(others) if bits >> i & 1 else common for i in range(n)]
        assert next(others, None) is None
        return found
    assert variant == 4
    found = [common] * n
    for place, symbol in places(cursor):
        found[place] = symbol
    return found


def tail(cursor: Cursor, hi: list[int], exponent: int) -> list[int]:
    by_kind: list[list[int]] = [[], [], [], []]
    for i, unit in enumerate(hi):
        if unit != 0x8000:
            by_kind[next((k for k in range(3) if unit >> k & 1), 3)].append(i)
    variant = cursor.uint(1)
    lists = [[[*range(len(hi))]], [[*chain(*by_kind)]], by_kind][variant]
    lo = [0] * len(hi)
    for units in lists:
        for place, symbol in places(cursor):
            at = units[place]
            lo[at] = (hi[at] - (symbol & exponent)) & exponent | symbol & ~exponent
    return lo


def _gaps(coded: bytes) -> Iterator[int]:
    gap = 0
    for byte in coded:
        gap += byte
        if byte != 255:
            yield gap
            gap = 0


DECODERS = {"plain": plain, "planes": planes, "packed": packed}


def _decode(name: str, blob: bytes, width: int, n: int) -> list[int]:
    cursor = Cursor(blob)
    units = DECODERS[name](cursor, width, n)
    assert cursor.at == len(blob)
    return units


@pytest.mark.parametrize("step", [2e-7, 1.2e-5, 2.5e-5, 6.5e-5, 1.2e-3, 4e-3, 2e-2])
def test_the_document_describes_packed(
    bf16_delta: Callable[[int, float], np.ndarray], step: float
) -> None:
    for count in (1000, 20_001):
        bits = bf16_delta(count, step)
        assert _decode("packed", ENCODINGS["packed"].encode(bits), 16, count) == bits.tolist()


@pytest.mark.parametrize("name", ["plain", "planes"])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_the_document_describes_the_others(name: str, width: int) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << (width // 2 + 3), 3000, f"u{width // 8}")
    assert _decode(name, ENCODINGS[name].encode(bits), width, 3000) == bits.tolist()


def test_every_encoding_is_described() -> None:
    assert set(DECODERS) == set(ENCODINGS)
    text = FORMAT.read_text(encoding="utf-8")
    for encoding in ENCODINGS.values():
        widths = ", ".join(map(str, sorted(encoding.widths)))
        assert f"### `{encoding.name}` ({widths} bits)" in text


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("stored", [1, 1 << 20])
@pytest.mark.parametrize(("count", "share"), [(1, 1), (900, 0.02), (900, 1), (40_000, 0.3)])
def test_the_document_describes_tails(count: int, share: float, stored: int, dtype: str) -> None:
    rng = np.random.default_rng(4)
    hi = rng.integers(0, 1 << 16, count, np.uint16)
    hi[rng.random(count) < 0.3] = 0x8000
    hi[0] = 0x3C01
    lo = rng.integers(1, 1 << 16, count, np.uint16)
    lo[(rng.random(count) > share) | (hi == 0x8000)] = 0
    lo[0] = 5
    cursor = Cursor(tails.encode(Tail.of(lo), hi, dtype, stored))
    assert tail(cursor, hi.tolist(), {"BF16": 0x7F80, "F16": 0x7C00}[dtype]) == lo.tolist()
    assert cursor.at == len(cursor.blob)


def test_the_worked_example_of_a_tail_is_right() -> None:
    text = FORMAT.read_text(encoding="utf-8").split("### Tails", 1)[1]
    hi, lo = (
        [int(unit, 16) for unit in found.split()]
        for found in re.findall(r"`(?:hi|lo)` = `([0-9A-F ]+)`", text)
    )
    blob = _bytes_of(text.split("Worked example", 1)[1])
    found = tails.decode(blob, np.array(hi, np.uint16), "BF16")
    assert found.full(len(hi)).tolist() == tail(Cursor(blob), hi, 0x7F80) == lo


def _bytes_of(example: str) -> bytes:
    """What stands in the first columns of the first block of code."""
    lines = re.findall(r"^((?:[0-9a-f]{2} )+)", example.split("```")[1], re.MULTILINE)
    return bytes.fromhex("".join(lines))


@pytest.mark.parametrize("start", ["Worked example", "The same symbols as variant 5"])
def test_the_worked_example_is_right(start: str) -> None:
    text = FORMAT.read_text(encoding="utf-8")
    blob = _bytes_of(text.split(start, 1)[1])
    symbols = re.search(r"symbols `([0-9a-f ]+)`", text)
    assert symbols is not None
    expected = [int(symbol, 16) for symbol in symbols[1].split()]
    out = np.empty(len(expected), np.uint16)
    ENCODINGS["packed"].decode(blob, out)
    assert out.tolist() == expected
    assert _decode("packed", blob, 16, len(expected)) == expected
