"""``packed``: 16-bit symbols close to their order-0 entropy, in standard zstd frames.

Made for differences of 16-bit floats, where a few hundred bit patterns make up nearly everything
and often one of them ("unchanged") most of it. Each segment takes the variant that suits it:

- constant   one symbol
- direct     the two byte planes of the symbols, the sign rotated to the lowest bit
- ranks      one byte per element, its symbol's rank by frequency; 255 escapes to a list
- gaps       the commonest symbol is left out: distances between the others, then the others

Reading has two steps. ``parse`` takes a blob apart and checks every size; what it returns says how
to make the symbols, here with numpy or elsewhere (``hubdiff.device``). What only the decoded bytes
can tell, the second step has to check; the docstrings of the parts list it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubdiff.encodings._frames import BlobReader, Stream, corrupt, write_stream, write_varint
from hubdiff.encodings.planes import join, split
from hubdiff.errors import CorruptPayload

_CONSTANT, _DIRECT, _RANKS, _GAPS = range(4)

ESCAPE = 255  # in ranks: the symbol is in the list; in gaps: 255 further, and go on

MOST_FINE_BITS = 16

# Measured on differences of bf16 models: with more escapes than this `direct` is smaller.
_MOST_ESCAPES = 0.35

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
        parsed = parse(blob, out.size)
        if isinstance(parsed, Gaps):
            _render_gaps(parsed, out)
        else:
            _render_dense(parsed, out)


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
    # coding them: a sample of a thirtieth chooses (its odd stride as in `_commonest`).
    sample = bits[:: (bits.size >> 15) | 1]
    counts = np.bincount(sample, minlength=1 << 16)
    if bits.size <= _SMALL:
        # A symbol that occurs once takes as much room in the table as in the list of escapes.
        tables = (_table(counts, least) for least in (1, 2))
        return min(*(_encode_ranks(bits, t) for t in tables), _encode_direct(bits), key=len)
    table = _table(counts, 1)
    escapes = sample.size - int(counts[table].sum())
    if escapes > _MOST_ESCAPES * sample.size:
        return _encode_direct(bits)
    return _encode_ranks(bits, table)


def _table(counts: np.ndarray, least: int) -> np.ndarray:
    """The commonest symbols, of those that were counted ``least`` times."""
    symbols = np.flatnonzero(counts >= least)
    return symbols[np.argsort(-counts[symbols], kind="stable")[:ESCAPE]].astype(np.uint16)


def _encode_constant(bits: np.ndarray) -> bytes:
    return bytes([_CONSTANT]) + int(bits[0]).to_bytes(2, "little")


def _encode_direct(bits: np.ndarray) -> bytes:
    return bytes([_DIRECT]) + _write_symbols(bits)


def _encode_ranks(bits: np.ndarray, table: np.ndarray) -> bytes:
    from hubdiff import kernels  # compiled code: not for those who only look at a manifest

    rank_of = np.full(1 << 16, ESCAPE, np.uint8)
    rank_of[table] = np.arange(table.size, dtype=np.uint8)
    ranks = np.empty(bits.size, np.uint8)
    kernels.to_ranks(bits, rank_of, ranks)
    escaped = bits[_where(ranks == ESCAPE)]
    listed = np.concatenate([table, escaped])
    head = bytes([_RANKS, table.size]) + write_varint(escaped.size)
    return head + write_stream(ranks) + _write_symbols(listed)


def _encode_gaps(bits: np.ndarray, common: int, others: np.ndarray) -> bytes:
    from hubdiff import kernels

    count = others.size
    fine_bits = _fine_bits(others)
    coarse = np.empty(most_coarse(bits.size, count, fine_bits), np.uint8)
    fine = np.empty(fine_bytes(count, fine_bits), np.uint8)
    coarse = coarse[: kernels.to_gaps(others, fine_bits, coarse, fine)]
    head = bytes([_GAPS]) + common.to_bytes(2, "little") + write_varint(count)
    head += bytes([fine_bits]) + write_varint(coarse.size - count)
    return head + write_stream(coarse) + fine.tobytes() + _encode_dense(bits[others])


def _fine_bits(others: np.ndarray) -> int:
    """Distances between independent changes are geometric. Their low bits, up to half of what is
    usual, then are next to noise and are stored as they are; what is above has few values, and
    little to say about them first. And a geometric distance has no memory: what is left after an
    escape is distributed as before it, so that nothing is lost by coding byte by byte. Where
    changes come in clusters most distances are 0, and no bit is noise: hence the median."""
    if others.size == 1:
        return 0
    step = (others.size >> 12) | 1
    usual = int(np.median(others[1::step] - others[:-1:step]))
    return min(MOST_FINE_BITS, max(0, usual.bit_length() - 2))


def most_coarse(count: int, others: int, fine_bits: int) -> int:
    """Coarse bytes at most: one for each other, and escapes, which ``count`` bounds."""
    return others + (count >> fine_bits) // ESCAPE


def fine_bytes(others: int, fine_bits: int) -> int:
    return -(-others * fine_bits // 8)


def _write_symbols(symbols: np.ndarray) -> bytes:
    """The sign rotated to the lowest bit: one plane is then all exponent, the other mantissa."""
    rotated = (symbols << 1) | (symbols >> 15)
    return b"".join(write_stream(plane) for plane in split(rotated))


# --- reading: sizes ---


@dataclass(frozen=True)
class Constant:
    symbol: int


@dataclass(frozen=True)
class Symbols:
    """``length`` symbols as two streams of bytes, each symbol rotated left by one bit."""

    length: int
    low: Stream
    high: Stream


@dataclass(frozen=True)
class Ranks:
    """The first ``size`` symbols are the table, the rest what the escapes stand for. To check: as
    many ranks are ``ESCAPE`` as there are such symbols, and no other is ``size`` or more."""

    size: int
    ranks: Stream
    symbols: Symbols

    @property
    def escapes(self) -> int:
        return self.symbols.length - self.size


Dense = Constant | Symbols | Ranks


@dataclass(frozen=True)
class Gaps:
    """``others`` symbols among ``common`` ones. To check: as many coarse bytes are below
    ``ESCAPE``, the last among them, and the last position is below the number of elements."""

    common: int
    others: int
    coarse: Stream
    fine_bits: int
    fine: Stream
    values: Dense


def parse(blob: bytes | memoryview, count: int) -> Dense | Gaps:
    """The parts of the blob of ``count`` symbols. Raises ``CorruptPayload``."""
    reader = BlobReader(blob, Packed.name)
    variant = reader.uint(1, "the variant")
    parsed = (
        _parse_gaps(reader, count) if variant == _GAPS else _parse_dense(reader, variant, count)
    )
    reader.end()
    return parsed


def _parse_dense(reader: BlobReader, variant: int, count: int) -> Dense:
    if variant == _CONSTANT:
        return Constant(reader.uint(2, "the symbol"))
    if variant == _DIRECT:
        return _parse_symbols(reader, count)
    if variant == _RANKS:
        size = reader.uint(1, "the table size")
        escapes = reader.count("the number of escapes", 0, count)
        ranks = reader.stream("the ranks", count)
        return Ranks(size, ranks, _parse_symbols(reader, size + escapes))
    raise reader.fail(f"variant {variant} is not one that can stand here")


def _parse_symbols(reader: BlobReader, length: int) -> Symbols:
    low = reader.stream("the low bytes of the symbols", length)
    high = reader.stream("the high bytes of the symbols", length)
    return Symbols(length, low, high)


def _parse_gaps(reader: BlobReader, count: int) -> Gaps:
    common = reader.uint(2, "the common symbol")
    others = reader.count("the number of others", 1, count // 2)
    fine_bits = reader.uint(1, "the number of fine bits")
    if fine_bits > MOST_FINE_BITS:
        raise reader.fail(f"the gaps have {fine_bits} fine bits, {MOST_FINE_BITS} at most can be")
    most = most_coarse(count, others, fine_bits)
    escapes = reader.count("the number of escapes in the gaps", 0, most - others)
    coarse = reader.stream("the gaps", others + escapes)
    fine = reader.plain("the fine bits of the gaps", fine_bytes(others, fine_bits))
    values = _parse_dense(reader, reader.uint(1, "the variant of the others"), others)
    return Gaps(common, others, coarse, fine_bits, fine, values)


def _fail(what: str) -> CorruptPayload:
    return corrupt(f"Corrupt {Packed.name} blob: {what}.")


# --- reading: symbols ---


def _render_symbols(symbols: Symbols) -> np.ndarray:
    out = np.empty(symbols.length, np.uint16)
    _render_symbols_into(symbols, out)
    return out


def _render_symbols_into(symbols: Symbols, out: np.ndarray) -> None:
    join([symbols.low.content(), symbols.high.content()], out)
    sign = out << 15
    np.right_shift(out, 1, out=out)
    np.bitwise_or(out, sign, out=out)


def _render_dense(dense: Dense, out: np.ndarray) -> None:
    if isinstance(dense, Constant):
        out.fill(dense.symbol)
    elif isinstance(dense, Symbols):
        _render_symbols_into(dense, out)
    else:
        _render_ranks(dense, out)


def _render_ranks(parsed: Ranks, out: np.ndarray) -> None:
    from hubdiff import kernels

    ranks, size = parsed.ranks.content(), parsed.size
    is_escape = ranks == ESCAPE
    escapes = int(np.count_nonzero(is_escape))
    if int(np.count_nonzero(ranks >= size)) != escapes:
        raise _fail(f"a rank is beyond the table of {size}")
    if parsed.escapes != escapes:
        raise _fail(f"the ranks have {escapes} escapes, {parsed.escapes} are declared")
    symbols = _render_symbols(parsed.symbols)
    table = np.zeros(256, np.uint16)
    table[:size] = symbols[:size]
    kernels.from_ranks(ranks, table, out)
    if escapes:
        out[_where(is_escape)] = symbols[size:]


def _render_gaps(gaps: Gaps, out: np.ndarray) -> None:
    from hubdiff import kernels

    coarse = gaps.coarse.content()
    positions = np.empty(gaps.others, np.int64)
    ends = kernels.from_gaps(coarse, gaps.fine_bits, gaps.fine.content(), positions)
    if ends != gaps.others or coarse[-1] == ESCAPE:
        raise _fail(f"the gaps are not {gaps.others}, each ended by a byte below {ESCAPE}")
    if positions[-1] >= out.size:
        raise _fail(f"the gaps reach element {positions[-1]} of {out.size}")
    values = np.empty(gaps.others, np.uint16)
    _render_dense(gaps.values, values)
    out.fill(gaps.common)
    out[positions] = values
