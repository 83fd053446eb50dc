"""``packed``: 16-bit symbols close to their order-0 entropy, in standard zstd frames.

Made for differences of 16-bit floats, where a few hundred bit patterns make up nearly everything
and often one of them ("unchanged") most of it. A segment is a dense blob, or where one symbol fills
half of it *gaps*: that symbol, and the places of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubdiff.encodings import dense, places
from hubdiff.encodings._frames import BlobReader
from hubdiff.encodings.dense import Dense
from hubdiff.encodings.places import Places

GAPS = 4  # the variant after those of a dense blob

# A symbol that fills less than this of the sample does not fill half of the segment (by four
# standard deviations), and need not be counted.
_HALF = 0.46


class Packed:
    name = "packed"
    widths = frozenset({16})

    def encode(self, bits: np.ndarray) -> bytes:
        common, share = _commonest(bits)
        if share < _HALF:
            return dense.encode(bits)
        differs = bits != common
        others = int(np.count_nonzero(differs))
        if others == 0 or 2 * others > bits.size:
            return dense.encode(bits)
        positions = dense.where(differs)
        head = bytes([GAPS]) + common.to_bytes(2, "little")
        sparse = head + places.encode(positions, bits[positions], bits.size)
        if bits.size > dense.SMALL:
            return sparse
        return min(sparse, dense.encode(bits), key=len)

    def decode(self, blob: bytes | memoryview, out: np.ndarray) -> None:
        parsed = parse(blob, out.size)
        if isinstance(parsed, Gaps):
            positions, symbols = places.render(parsed.others, out.size)
            out.fill(parsed.common)
            out[positions] = symbols
        else:
            dense.render(parsed, out)


def _commonest(bits: np.ndarray) -> tuple[int, float]:
    """The commonest symbol of a sample, and how much of that it fills. It is the true one whenever
    it fills clearly more than half.

    The stride is odd, so that a pattern in the columns of a matrix can't hide it.
    """
    counts = np.bincount(bits[:: (bits.size >> 12) | 1])
    common = int(counts.argmax())
    return common, int(counts[common]) / int(counts.sum())


@dataclass(frozen=True)
class Gaps:
    """Symbols that are ``common`` but for ``others``."""

    common: int
    others: Places


def parse(blob: bytes | memoryview, count: int) -> Dense | Gaps:
    """The parts of the blob of ``count`` symbols. Raises ``CorruptPayload``."""
    reader = BlobReader(blob, Packed.name)
    variant = reader.uint(1, "the variant")
    parsed: Dense | Gaps
    if variant == GAPS:
        common = reader.uint(2, "the common symbol")
        others = places.parse(reader, count, 1, count // 2)
        assert others is not None  # there is one at least
        parsed = Gaps(common, others)
    else:
        parsed = dense.parse_variant(reader, variant, count)
    reader.end()
    return parsed
