"""``packed``: 16-bit symbols close to their order-0 entropy, in standard zstd frames.

Made for differences of 16-bit floats, where a few hundred bit patterns make up nearly everything
and often one of them ("unchanged") much of it. How much, decides what a segment is stored as:

- a dense blob   no symbol is common: Huffman codes have whole bits, and lose little on rare ones
- a bitmap       a bit per symbol, whether it is the common one, and a dense blob of the others
- gaps           nearly all are the common one: the places of the others
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hubdiff.encodings import dense, places
from hubdiff.encodings._frames import BlobReader, Stream, corrupt, write_stream, write_varint
from hubdiff.encodings.dense import Dense
from hubdiff.encodings.places import Places

GAPS, BITMAP = 4, 5  # the variants after those of a dense blob

# Measured on differences of bf16 models, by the share of the commonest symbol. Between these a
# bitmap is 2 to 4 % smaller than a dense blob, and as small as gaps in half of their time.
_WORTH_BITMAP, _WORTH_GAPS = 0.30, 0.80


class Packed:
    name = "packed"
    widths = frozenset({16})

    def encode(self, bits: np.ndarray) -> bytes:
        common, share = _commonest(bits)
        if bits.size <= dense.SMALL:
            return min(_variants(bits, common), key=len)
        if share < _WORTH_BITMAP:
            return dense.encode(bits)
        if share < _WORTH_GAPS:
            return _encode_bitmap(bits, common)
        differs = bits != common
        others = int(np.count_nonzero(differs))
        if 2 * others > bits.size:  # the sample misled
            return _encode_bitmap(bits, common)
        return _encode_gaps(bits, common, differs) if others else dense.encode(bits)

    def decode(self, blob: bytes | memoryview, out: np.ndarray) -> None:
        parsed = parse(blob, out.size)
        if isinstance(parsed, Gaps):
            positions, symbols = places.render(parsed.others, out.size)
            out.fill(parsed.common)
            out[positions] = symbols
        elif isinstance(parsed, Bitmap):
            _render_bitmap(parsed, out)
        else:
            dense.render(parsed, out)


def _commonest(bits: np.ndarray) -> tuple[int, float]:
    """The commonest symbol of a sample, and how much of that it fills. A bitmap or gaps can be made
    of any symbol: if the sample misleads, that costs bytes and nothing else.

    The stride is odd, so that a pattern in the columns of a matrix can't hide it.
    """
    counts = np.bincount(bits[:: (bits.size >> 12) | 1])
    common = int(np.argmax(counts))
    return common, int(counts[common]) / int(counts.sum())


def _variants(bits: np.ndarray, common: int) -> Iterator[bytes]:
    """In short lists fixed costs decide: all that is possible."""
    yield dense.encode(bits)
    differs = bits != common
    others = int(np.count_nonzero(differs))
    if others:
        yield _encode_bitmap(bits, common)
    if 0 < 2 * others <= bits.size:
        yield _encode_gaps(bits, common, differs)


def _encode_gaps(bits: np.ndarray, common: int, differs: np.ndarray) -> bytes:
    positions = dense.where(differs)
    return _head(GAPS, common) + places.encode(positions, bits[positions], bits.size)


def _encode_bitmap(bits: np.ndarray, common: int) -> bytes:
    """Not all of them are the common one."""
    from hubdiff import kernels  # compiled code: not for those who only look at a manifest

    marks = np.empty(-(-bits.size // 8), np.uint8)
    others = np.empty(bits.size + 1, np.uint16)
    count = kernels.to_others(bits, np.uint16(common), marks, others)
    head = _head(BITMAP, common) + write_varint(count)
    return head + write_stream(marks) + dense.encode(others[:count])


def _head(variant: int, common: int) -> bytes:
    return bytes([variant]) + common.to_bytes(2, "little")


def _render_bitmap(bitmap: Bitmap, out: np.ndarray) -> None:
    from hubdiff import kernels

    marks = np.unpackbits(bitmap.marks.content(), count=out.size, bitorder="little")
    marked = int(np.count_nonzero(marks))
    if marked != bitmap.count:
        raise corrupt(
            f"Corrupt {Packed.name} blob: the bitmap marks {marked} symbols, "
            f"{bitmap.count} are declared."
        )
    others = np.empty(marked + 1, np.uint16)
    dense.render(bitmap.others, others[:marked])
    kernels.from_others(others, marks, np.uint16(bitmap.common), out)


@dataclass(frozen=True)
class Gaps:
    """Symbols that are ``common`` but for ``others``."""

    common: int
    others: Places


@dataclass(frozen=True)
class Bitmap:
    """Symbols that are ``common`` but for ``count`` others, which stand where the bits of ``marks``
    are set, the lowest bit of the first byte first. To check: so many of them are."""

    common: int
    count: int
    marks: Stream
    others: Dense


def parse(blob: bytes | memoryview, count: int) -> Dense | Gaps | Bitmap:
    """The parts of the blob of ``count`` symbols. Raises ``CorruptPayload``."""
    reader = BlobReader(blob, Packed.name)
    variant = reader.uint(1, "the variant")
    parsed: Dense | Gaps | Bitmap
    if variant == GAPS:
        parsed = _parse_gaps(reader, count)
    elif variant == BITMAP:
        parsed = _parse_bitmap(reader, count)
    else:
        parsed = dense.parse_variant(reader, variant, count)
    reader.end()
    return parsed


def _parse_gaps(reader: BlobReader, count: int) -> Gaps:
    common = reader.uint(2, "the common symbol")
    others = places.parse(reader, count, 1, count // 2)
    assert others is not None  # there is one at least
    return Gaps(common, others)


def _parse_bitmap(reader: BlobReader, count: int) -> Bitmap:
    common = reader.uint(2, "the common symbol")
    others = reader.count("the number of others", 1, count)
    marks = reader.stream("the bitmap", -(-count // 8))
    return Bitmap(common, others, marks, dense.parse(reader, others, "the others"))
