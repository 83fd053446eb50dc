"""``packed``: 16-bit symbols close to their order-0 entropy, in standard zstd frames.

Made for differences of 16-bit floats, where a few hundred bit patterns make up nearly everything
and often one of them ("unchanged") most of it. Each segment takes the variant that suits it:

- constant   one symbol
- direct     the two byte planes of the symbols, the sign rotated to the lowest bit
- ranks      one byte per element, its symbol's rank by frequency; 255 escapes to a list
- gaps       the commonest symbol is left out: distances between the others, then the others
- wide gaps  the same with two bytes per distance, for under 0.3 % of others
"""

from __future__ import annotations

import numpy as np

from hubdiff.encodings._frames import BlobReader, write_stream
from hubdiff.encodings.planes import join, split

_CONSTANT, _DIRECT, _RANKS, _GAPS, _WIDE_GAPS = range(5)

_ESCAPE = 255  # in ranks: the symbol is in the list; in gaps: 255 further, and go on

# Measured on differences of bf16 models: with more escapes than this `direct` is smaller, and with
# fewer others than this (one per 370: half of all gap bytes would be escapes) `wide gaps` is.
_MOST_ESCAPES = 0.35
_WIDE_SPACING = 370

# Up to this size every variant is tried: fixed costs decide there, and time does not matter.
_SMALL = 1 << 14


class Packed:
    name = "packed"
    widths = frozenset({16})

    def encode(self, bits: np.ndarray) -> bytes:
        common = _commonest(bits)
        differs = bits != common
        others = int(np.count_nonzero(differs))
        if others == 0:
            return _encode_constant(bits)
        if 2 * others > bits.size:
            return _encode_dense(bits)
        sparse = _encode_gaps(bits, common, _where(differs))
        if bits.size > _SMALL:
            return sparse
        return min(sparse, _encode_dense(bits), key=len)

    def decode(self, blob: bytes | memoryview, out: np.ndarray) -> None:
        reader = BlobReader(blob, self.name)
        variant = reader.uint(1, "the variant")
        if variant in (_GAPS, _WIDE_GAPS):
            _decode_gaps(reader, variant, out)
        else:
            _decode_dense(reader, variant, out)
        reader.end()


def _commonest(bits: np.ndarray) -> int:
    """The commonest symbol of a sample: the true one whenever it fills clearly more than half.

    The stride is odd, so that a pattern in the columns of a matrix can't hide it.
    """
    return int(np.bincount(bits[:: (bits.size >> 12) | 1]).argmax())


def _where(mask: np.ndarray) -> np.ndarray:
    """The positions of True; three times faster between 2 and 10 % than np.flatnonzero.

    numpy jumps from hit to hit up to 10 %, which mispredicts, and counts without branches above:
    enough True after the end selects that. Indexing by the mask itself is slower than either.
    """
    hits = int(np.count_nonzero(mask))
    if not 0.02 * mask.size < hits <= 0.1 * mask.size:
        return np.flatnonzero(mask)
    padded = np.ones(mask.size + mask.size // 8, np.bool_)
    padded[: mask.size] = mask
    return np.flatnonzero(padded)[:hits]


def _encode_dense(bits: np.ndarray) -> bytes:
    if (bits == bits[0]).all():
        return _encode_constant(bits)
    # Whether a rare symbol stands in the table hardly matters, and counting all costs as much as
    # coding them: a sample of an eighth chooses (its odd stride as in `_commonest`).
    sample = bits[:: (bits.size >> 17) | 1]
    counts = np.bincount(sample, minlength=1 << 16)
    symbols = np.flatnonzero(counts)
    table = symbols[np.argsort(-counts[symbols], kind="stable")[:_ESCAPE]].astype(np.uint16)
    if bits.size <= _SMALL:
        return min(_encode_ranks(bits, table), _encode_direct(bits), key=len)
    escapes = sample.size - int(counts[table].sum())
    if escapes > _MOST_ESCAPES * sample.size:
        return _encode_direct(bits)
    return _encode_ranks(bits, table)


def _encode_constant(bits: np.ndarray) -> bytes:
    return bytes([_CONSTANT]) + int(bits[0]).to_bytes(2, "little")


def _encode_direct(bits: np.ndarray) -> bytes:
    return bytes([_DIRECT]) + _write_symbols(bits)


def _encode_ranks(bits: np.ndarray, table: np.ndarray) -> bytes:
    from hubdiff import kernels  # compiled code: not for those who only look at a manifest

    rank_of = np.full(1 << 16, _ESCAPE, np.uint8)
    rank_of[table] = np.arange(table.size, dtype=np.uint8)
    ranks = np.empty(bits.size, np.uint8)
    kernels.to_ranks(bits, rank_of, ranks)
    escaped = bits[_where(ranks == _ESCAPE)]
    listed = np.concatenate([table, escaped])
    return bytes([_RANKS, table.size]) + write_stream(ranks) + _write_symbols(listed)


def _encode_gaps(bits: np.ndarray, common: int, others: np.ndarray) -> bytes:
    gaps = np.diff(others, prepend=-1) - 1
    wide = _WIDE_SPACING * others.size < bits.size
    fine = b""
    if wide:
        fine = write_stream((gaps & 0xFF).astype(np.uint8))
        gaps >>= 8
    head = bytes([_WIDE_GAPS if wide else _GAPS])
    head += common.to_bytes(2, "little") + others.size.to_bytes(4, "little")
    return head + write_stream(_with_escapes(gaps)) + fine + _encode_dense(bits[others])


def _with_escapes(gaps: np.ndarray) -> np.ndarray:
    """Each gap as bytes that add up to it: as many 255 as fit, then the rest (0 to 254).

    Distances between independent changes are geometric, and those have no memory: what is left
    after an escape is distributed as before it. So nothing is lost by coding byte by byte.
    """
    escapes = gaps // _ESCAPE
    last = np.cumsum(escapes + 1) - 1
    coded = np.full(int(last[-1]) + 1, _ESCAPE, np.uint8)
    coded[last] = gaps - escapes * _ESCAPE
    return coded


def _write_symbols(symbols: np.ndarray) -> bytes:
    """The sign rotated to the lowest bit: one plane is then all exponent, the other mantissa."""
    rotated = (symbols << 1) | (symbols >> 15)
    return b"".join(write_stream(plane) for plane in split(rotated))


def _read_symbols(reader: BlobReader, out: np.ndarray) -> None:
    low = reader.stream("the low bytes of the symbols", out.size)
    high = reader.stream("the high bytes of the symbols", out.size)
    join([low, high], out)
    sign = out << 15
    np.right_shift(out, 1, out=out)
    np.bitwise_or(out, sign, out=out)


def _decode_dense(reader: BlobReader, variant: int, out: np.ndarray) -> None:
    if variant == _CONSTANT:
        out.fill(reader.uint(2, "the symbol"))
    elif variant == _DIRECT:
        _read_symbols(reader, out)
    elif variant == _RANKS:
        _decode_ranks(reader, out)
    else:
        raise reader.fail(f"variant {variant} is not one that can stand here")


def _decode_ranks(reader: BlobReader, out: np.ndarray) -> None:
    from hubdiff import kernels

    size = reader.uint(1, "the table size")
    ranks = reader.stream("the ranks", out.size)
    is_escape = ranks == _ESCAPE
    escapes = int(np.count_nonzero(is_escape))
    if int(np.count_nonzero(ranks >= size)) != escapes:
        raise reader.fail(f"a rank is beyond the table of {size}")
    symbols = np.empty(size + escapes, np.uint16)
    _read_symbols(reader, symbols)
    table = np.zeros(256, np.uint16)
    table[:size] = symbols[:size]
    kernels.from_ranks(ranks, table, out)
    if escapes:
        out[_where(is_escape)] = symbols[size:]


def _decode_gaps(reader: BlobReader, variant: int, out: np.ndarray) -> None:
    common = reader.uint(2, "the common symbol")
    others = reader.uint(4, "the number of others")
    if not 1 <= others <= out.size // 2:
        raise reader.fail(f"{others} others among {out.size} elements (at most half can be)")
    coarse = reader.stream("the gaps", others, others + out.size // _ESCAPE)
    is_end = coarse != _ESCAPE
    if int(np.count_nonzero(is_end)) != others or not is_end[-1]:
        raise reader.fail(f"the gaps are not {others}, each ended by a byte below {_ESCAPE}")
    # A narrow step is its gap plus the element itself: at most 254 + 1, so still one byte.
    steps = coarse if variant == _WIDE_GAPS else coarse + is_end
    positions = np.cumsum(steps, dtype=np.int64)
    if coarse.size > others:
        positions = positions[_where(is_end)]
    if variant == _WIDE_GAPS:
        positions <<= 8
        positions += np.cumsum(reader.stream("the fine gaps", others), dtype=np.int64)
        positions += np.arange(1, others + 1)
    positions -= 1
    if positions[-1] >= out.size:
        raise reader.fail(f"the gaps reach element {positions[-1]} of {out.size}")
    values = np.empty(others, np.uint16)
    _decode_dense(reader, reader.uint(1, "the variant of the others"), values)
    out.fill(common)
    out[positions] = values
