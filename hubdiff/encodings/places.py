"""Places: which of many units are meant, by the gaps between them, and a symbol for each.

Gaps between independent changes are geometric. Their low bits, up to half of what is usual, then
are next to noise and are stored as they are; what is above has few values, and little to say about
them first. And such a gap has no memory: what is left after an escape is distributed as before it,
so that nothing is lost by coding byte by byte. Where changes come in clusters most gaps are 0, and
no bit is noise: hence the median, which chooses how many bits are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubdiff.encodings import dense
from hubdiff.encodings._frames import BlobReader, Stream, corrupt, write_stream, write_varint
from hubdiff.encodings.dense import Dense
from hubdiff.errors import CorruptPayload

ESCAPE = 255  # 255 further, and go on
MOST_FINE_BITS = 16


def encode(places: np.ndarray, symbols: np.ndarray, among: int) -> bytes:
    """``places``: rising int64 below ``among``. ``symbols``: uint16, as many."""
    count = places.size
    if not count:
        return write_varint(0)
    from hubdiff import kernels

    fine_bits = _fine_bits(places)
    coarse: np.ndarray = np.empty(count + _most_escapes(among, fine_bits), np.uint8)
    fine = np.empty(_fine_bytes(count, fine_bits), np.uint8)
    coarse = coarse[: kernels.to_gaps(places, fine_bits, coarse, fine)]
    head = write_varint(count) + bytes([fine_bits]) + write_varint(coarse.size - count)
    return head + write_stream(coarse) + fine.tobytes() + dense.encode(symbols)


def _fine_bits(places: np.ndarray) -> int:
    if places.size == 1:
        return 0
    step = (places.size >> 12) | 1
    usual = int(np.median(places[1::step] - places[:-1:step]))
    return min(MOST_FINE_BITS, max(0, usual.bit_length() - 2))


def _most_escapes(among: int, fine_bits: int) -> int:
    return (among >> fine_bits) // ESCAPE


def _fine_bytes(count: int, fine_bits: int) -> int:
    return -(-count * fine_bits // 8)


@dataclass(frozen=True)
class Places:
    """``count`` places, from 1. To check: as many coarse bytes are below ``ESCAPE``, the last among
    them, and the last place lies where it can."""

    count: int
    fine_bits: int
    coarse: Stream
    fine: Stream
    symbols: Dense


def parse(reader: BlobReader, among: int, least: int, most: int) -> Places | None:
    """The next places among so many units, from ``least`` to ``most``; None: there are none."""
    count = reader.count("the number of places", least, most)
    if not count:
        return None
    fine_bits = reader.uint(1, "the number of fine bits")
    if fine_bits > MOST_FINE_BITS:
        raise reader.fail(f"the gaps have {fine_bits} fine bits, {MOST_FINE_BITS} at most can be")
    most = _most_escapes(among, fine_bits)
    escapes = reader.count("the number of escapes in the gaps", 0, most)
    coarse = reader.stream("the gaps", count + escapes)
    fine = reader.plain("the fine bits of the gaps", _fine_bytes(count, fine_bits))
    symbols = dense.parse(reader, count, "the symbols")
    return Places(count, fine_bits, coarse, fine, symbols)


def render(places: Places, among: int) -> tuple[np.ndarray, np.ndarray]:
    """The places (int64, rising) and their symbols (uint16). Raises ``CorruptPayload``."""
    from hubdiff import kernels

    coarse = places.coarse.content()
    found = np.empty(places.count, np.int64)
    ends = kernels.from_gaps(coarse, places.fine_bits, places.fine.content(), found)
    if ends != places.count or coarse[-1] == ESCAPE:
        raise _fail(places, f"are not {places.count}, each ended by a byte below {ESCAPE}")
    if found[-1] >= among:
        raise _fail(places, f"reach place {found[-1]} of {among}")
    symbols = np.empty(places.count, np.uint16)
    dense.render(places.symbols, symbols)
    return found, symbols


def _fail(places: Places, what: str) -> CorruptPayload:
    return corrupt(f"Corrupt {places.coarse.encoding} blob: the gaps {what}.")
