"""A second decoder, written from FORMAT.md alone, reads what hubdiff writes.

Slow and plain on purpose: no numpy, nothing of hubdiff. If the two disagree, one of them or the
document is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard

from hubdiff.encodings import ENCODINGS

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


def packed(cursor: Cursor, width: int, n: int) -> list[int]:
    variant = cursor.uint(1)
    if variant == 0:
        return [cursor.uint(2)] * n
    if variant == 1:
        return cursor.symbols(n)
    if variant == 2:
        size, escapes, ranks = cursor.uint(1), cursor.varint(), cursor.stream(n)
        listed = cursor.symbols(size + escapes)
        rest = iter(listed[size:])
        found = [next(rest) if rank == 255 else listed[:size][rank] for rank in ranks]
        assert next(rest, None) is None
        return found
    common, others, fine_bits, escapes = (
        cursor.uint(2),
        cursor.varint(),
        cursor.uint(1),
        cursor.varint(),
    )
    coarse = _gaps(cursor.stream(others + escapes))
    fine = int.from_bytes(cursor.take(-(-others * fine_bits // 8)), "little")
    gaps = [
        (c << fine_bits) + (fine >> i * fine_bits) % (1 << fine_bits) for i, c in enumerate(coarse)
    ]
    values = packed(cursor, width, others)
    assert len(gaps) == len(values) == others
    found = []
    for gap, value in zip(gaps, values, strict=True):
        found += [common] * gap + [value]
    return found + [common] * (n - len(found))


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


@pytest.mark.parametrize("step", [2e-7, 1.7e-5, 6.5e-5, 1.2e-3, 4e-3, 2e-2])
def test_the_document_describes_packed(
    bf16_delta: Callable[[int, float], np.ndarray], step: float
) -> None:
    for count in (1000, 100_000):
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


def test_the_worked_example_is_right() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    example = text.split("Worked example", 1)[1].split("```")[1]
    blob = bytes.fromhex("".join(re.findall(r"^((?:[0-9a-f]{2} )+)", example, re.MULTILINE)))
    symbols = re.search(r"symbols `([0-9a-f ]+)`", text)
    assert symbols is not None
    expected = [int(symbol, 16) for symbol in symbols[1].split()]
    out = np.empty(len(expected), np.uint16)
    ENCODINGS["packed"].decode(blob, out)
    assert out.tolist() == expected
    assert _decode("packed", blob, 16, len(expected)) == expected
