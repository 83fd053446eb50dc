"""Dense blobs: 16-bit symbols, each of them coded, close to their order-0 entropy.

Every list of symbols takes the variant that suits it:

- constant   one symbol
- direct     the two byte planes of the symbols, the sign rotated to the lowest bit
- ranks      one byte per symbol, its rank by frequency; 255 escapes to a dense blob of the others
- signs      a bit per symbol, and a dense blob of the rest: twice as many symbols have a rank then

Reading has two steps. ``parse`` takes a blob apart and checks every size; what it returns says how
to make the symbols, here with numpy or elsewhere (``hubdiff.device``). What only the decoded bytes
can tell, the second step has to check; the docstrings of the parts list it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hubdiff.encodings._frames import (
    BlobReader,
    Stream,
    corrupt,
    is_constant,
    write_stream,
    write_varint,
)
from hubdiff.encodings.planes import join, split
from hubdiff.errors import CorruptPayload

CONSTANT, DIRECT, RANKS, SIGNS = range(4)
ESCAPE = 255
SIGN = 1 << 15

# Measured on differences of bf16 models: with more escapes than this, signs apart are as small and
# faster, since fewer escape then; and with more of those than the second, `direct` is smaller.
_MANY_ESCAPES, _MOST_ESCAPES = 0.05, 0.35
_FEWER = 0.8  # of the escapes, at most, must be left for signs apart to be worth it
# Fixed costs decide in short lists. Up to the first size every variant is tried, and up to the
# second whether tables pay at all.
_TINY, SMALL = 1 << 9, 1 << 14


# --- writing ---


def encode(bits: np.ndarray) -> bytes:
    """The dense blob of ``bits``: 1-D, uint16, not empty."""
    if bits.size <= _TINY:
        return min(_smallest(bits), _encode_signs(bits, _smallest(_magnitudes(bits))), key=len)
    if is_constant(bits):
        return _encode_constant(bits)
    sampled = _encode_sampled(bits)
    return sampled if bits.size > SMALL else min(sampled, _encode_few(bits), key=len)


def _encode_sampled(bits: np.ndarray) -> bytes:
    # Whether a rare symbol stands in the table hardly matters, and counting all costs as much as
    # coding them: a sample of a thirtieth chooses. Its stride is odd, so that a pattern in the
    # columns of a matrix can't hide it.
    sample = bits[:: (bits.size >> 15) | 1]
    table, escapes = _sampled_table(sample)
    if escapes > _MANY_ESCAPES and (sample >= SIGN).any():
        unsigned_table, unsigned_escapes = _sampled_table(_magnitudes(sample))
        # Where one sign is commoner than the other, apart they cost a bit each and save nothing.
        if unsigned_escapes <= min(_MOST_ESCAPES, _FEWER * escapes):
            return _encode_signs(bits, _encode_ranks(_magnitudes(bits), unsigned_table))
    return _encode_direct(bits) if escapes > _MOST_ESCAPES else _encode_ranks(bits, table)


def _smallest(bits: np.ndarray) -> bytes:
    if is_constant(bits):
        return _encode_constant(bits)
    return min(_variants(bits), key=len)


def _variants(bits: np.ndarray) -> Iterator[bytes]:
    yield _encode_direct(bits)
    counts = np.bincount(bits)
    # A symbol that occurs once takes about as much room in the table as among the escapes.
    for least in (1, 2):
        table = _table(counts, least)
        if 2 * int(counts[table].sum()) >= bits.size:
            yield _encode_ranks(bits, table)


def _table(counts: np.ndarray, least: int = 1) -> np.ndarray:
    """The commonest symbols, of those that were counted ``least`` times."""
    symbols = np.flatnonzero(counts >= least)
    return symbols[np.argsort(-counts[symbols], kind="stable")[:ESCAPE]].astype(np.uint16)


def _sampled_table(sample: np.ndarray) -> tuple[np.ndarray, float]:
    """A table for what the sample was taken from, and the share of it that will escape."""
    counts = np.bincount(sample)
    # Once in a short list: no place in its table.
    table = _table(counts, 2 if sample.size <= SMALL else 1)
    return table, 1 - int(counts[table].sum()) / sample.size


def _encode_constant(bits: np.ndarray) -> bytes:
    return bytes([CONSTANT]) + int(bits[0]).to_bytes(2, "little")


def _encode_direct(bits: np.ndarray) -> bytes:
    return bytes([DIRECT]) + _write_symbols(bits)


def _encode_few(bits: np.ndarray) -> bytes:
    """Escapes that are too few to be worth a table of their own. (Signs apart made 1 list in 200 of
    real deltas smaller, by some bytes, for twice the time.)"""
    return _encode_constant(bits) if is_constant(bits) else _encode_direct(bits)


def _encode_ranks(bits: np.ndarray, table: np.ndarray) -> bytes:
    ranks = _ranks(bits, table)
    escaped = bits[where(ranks == ESCAPE)]
    if 2 * escaped.size > bits.size:  # the sample misled
        return _encode_direct(bits)
    head = bytes([RANKS, table.size]) + write_varint(escaped.size)
    parts = [head, write_stream(ranks), _write_symbols(table)]
    if escaped.size:
        parts.append(_encode_few(escaped) if escaped.size <= SMALL else encode(escaped))
    return b"".join(parts)


def _ranks(bits: np.ndarray, table: np.ndarray) -> np.ndarray:
    from hubdiff import kernels  # compiled code: not for those who only look at a manifest

    rank_of = np.full(1 << 16, ESCAPE, np.uint8)
    rank_of[table] = np.arange(table.size, dtype=np.uint8)
    ranks = np.empty(bits.size, np.uint8)
    kernels.to_ranks(bits, rank_of, ranks)
    return ranks


def _encode_signs(bits: np.ndarray, magnitudes: bytes) -> bytes:
    signs = np.packbits(bits >= SIGN, bitorder="little")
    return bytes([SIGNS]) + signs.tobytes() + magnitudes


def _magnitudes(bits: np.ndarray) -> np.ndarray:
    return bits & np.uint16(SIGN - 1)


def _write_symbols(symbols: np.ndarray) -> bytes:
    """The sign rotated to the lowest bit: one plane is then all exponent, the other mantissa."""
    rotated = (symbols << 1) | (symbols >> 15)
    return b"".join(write_stream(plane) for plane in split(rotated))


def where(mask: np.ndarray) -> np.ndarray:
    """The positions of True in a contiguous mask, int64: np.flatnonzero in half of the time."""
    from hubdiff import kernels

    hits = int(np.count_nonzero(mask))
    positions = np.empty(hits + 1, np.int64)
    marks = mask.view(np.uint8)
    kernels.where(marks[: mask.size // 8 * 8].view(np.uint64), marks, positions)
    return positions[:hits]


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
    """``escaped`` is what the escapes stand for, None where there are none. To check: as many ranks
    are ``ESCAPE`` as there are ``escapes``, and no other is as large as the table."""

    ranks: Stream
    table: Symbols
    escapes: int
    escaped: Dense | None


@dataclass(frozen=True)
class Signs:
    """Symbols whose sign bits are to be flipped where the bits of ``flips`` are set, the lowest bit
    of the first byte first."""

    flips: Stream
    rest: Dense


Dense = Constant | Symbols | Ranks | Signs


def parse(reader: BlobReader, count: int, what: str) -> Dense:
    """The next dense blob, of ``count`` symbols; ``what`` they are, for errors."""
    return parse_variant(reader, reader.uint(1, f"the variant of {what}"), count)


def parse_variant(reader: BlobReader, variant: int, count: int) -> Dense:
    """The same when its first byte has been read."""
    if variant != SIGNS:
        return _parse_unsigned(reader, variant, count)
    flips = reader.plain("the signs", -(-count // 8))
    return Signs(flips, _parse_unsigned(reader, reader.uint(1, "the variant"), count))


def _parse_unsigned(reader: BlobReader, variant: int, count: int) -> Dense:
    if variant == CONSTANT:
        return Constant(reader.uint(2, "the symbol"))
    if variant == DIRECT:
        return _parse_symbols(reader, count)
    if variant == RANKS:
        return _parse_ranks(reader, count)
    raise reader.fail(f"variant {variant} is not one that can stand here")


def _parse_ranks(reader: BlobReader, count: int) -> Ranks:
    size = reader.uint(1, "the table size")
    # Half of them at most, and so on: the escapes of escapes cost no more than the blob itself.
    escapes = reader.count("the number of escapes", 0, count // 2)
    ranks = reader.stream("the ranks", count)
    table = _parse_symbols(reader, size)
    escaped = parse(reader, escapes, "the escaped symbols") if escapes else None
    return Ranks(ranks, table, escapes, escaped)


def _parse_symbols(reader: BlobReader, length: int) -> Symbols:
    low = reader.stream("the low bytes of the symbols", length)
    high = reader.stream("the high bytes of the symbols", length)
    return Symbols(length, low, high)


# --- reading: symbols ---


def render(dense: Dense, out: np.ndarray) -> None:
    """Fill ``out`` (1-D, uint16, of as many symbols). Raises ``CorruptPayload``."""
    if isinstance(dense, Constant):
        out.fill(dense.symbol)
    elif isinstance(dense, Symbols):
        _render_symbols(dense, out)
    elif isinstance(dense, Ranks):
        _render_ranks(dense, out)
    else:
        from hubdiff import kernels

        render(dense.rest, out)
        kernels.flip_signs(dense.flips.content(), out)


def _render_symbols(symbols: Symbols, out: np.ndarray) -> None:
    join([symbols.low.content(), symbols.high.content()], out)
    sign = out << 15
    np.right_shift(out, 1, out=out)
    np.bitwise_or(out, sign, out=out)


def _render_ranks(parsed: Ranks, out: np.ndarray) -> None:
    from hubdiff import kernels

    ranks, size = parsed.ranks.content(), parsed.table.length
    is_escape = ranks == ESCAPE
    escapes = int(np.count_nonzero(is_escape))
    # With a full table only an escape can be as large as it.
    if size < ESCAPE and int(np.count_nonzero(ranks >= size)) != escapes:
        raise _fail(parsed, f"a rank is beyond the table of {size}")
    if parsed.escapes != escapes:
        raise _fail(parsed, f"the ranks have {escapes} escapes, {parsed.escapes} are declared")
    table = np.zeros(256, np.uint16)
    _render_symbols(parsed.table, table[:size])
    kernels.from_ranks(ranks, table, out)
    if parsed.escaped is not None:
        escaped = np.empty(escapes, np.uint16)
        render(parsed.escaped, escaped)
        out[where(is_escape)] = escaped


def _fail(ranks: Ranks, what: str) -> CorruptPayload:
    return corrupt(f"Corrupt {ranks.ranks.encoding} blob: {what}.")
