"""bf16 on the CPU, compiled by numba: the bits of ``numerics``, going through memory once.

Nearly every model is bf16, and its arithmetic in torch takes fifteen passes for a difference. These
loops go through memory once (four times as fast), need no torch (a second of start-up, 150 MB), and
let other threads run. They work on bit patterns and don't decide about NaN and Inf: a function says
that it met one, and the caller asks ``numerics`` instead.

Compiled at first use, in some seconds; numba keeps the result beside this file, or in the user's
cache where that can't be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])
_u8, _u16, _u32, _u64 = np.uint8, np.uint16, np.uint32, np.uint64
_i64 = np.int64
_f32, _f64 = np.float32, np.float64
_size = np.uintp


def _compile(function: F, fastmath: set[str]) -> F:
    compiled: Any
    try:
        compiled = numba.njit(nogil=True, fastmath=fastmath, cache=True)(function)
    except RuntimeError:  # no folder here may keep what is compiled
        compiled = numba.njit(nogil=True, fastmath=fastmath)(function)
    return compiled


def _compiled(function: F) -> F:
    return _compile(function, set())


def _compiled_sum(function: F) -> F:
    """For sums that are for people to read: terms may be added in any order, several at once."""
    return _compile(function, {"reassoc"})


# numba widens what integers give each other to 64 bits, and a loop takes as many elements at once
# as its widest value allows: every step says that it has 32, or 16.


@_compiled
def _wide(pattern):  # type: ignore[no-untyped-def]
    """bf16 → float32, exact."""
    return _u32(_u32(pattern) << _u32(16)).view(_f32)


@_compiled
def _narrow(value):  # type: ignore[no-untyped-def]
    """float32 → bf16, to nearest even."""
    bits = _f32(value).view(_u32)
    tie = _u32(_u32(bits >> _u32(16)) & _u32(1))
    return _u16(_u32(bits + _u32(0x7FFF) + tie) >> _u32(16))


@_compiled
def _no_number(pattern):  # type: ignore[no-untyped-def]
    return _u16((pattern & _u16(0x7F80)) == _u16(0x7F80))


# Elements that several loops go over, one after the other, while they are in the nearest cache:
# counting along with floats, or squares with either, would widen all of it. Below 2^16, since they
# are counted in 16 bits.
_NEAR = 1 << 12


@_compiled
def difference(tuned, base, hi, tails):  # type: ignore[no-untyped-def]
    """``hi`` of tuned − base, as ``numerics.difference``, all uint16 of one length, and in
    ``tails`` (uint8) where ``lo`` is not 0. Returns how many elements changed, whether all are
    numbers, and, if so, whether base + ``hi`` is tuned again wherever ``lo`` is 0, ‖hi‖² and
    ‖base‖²."""
    changed, numbers, restored, hi_square, base_square = 0, True, True, 0.0, 0.0
    for begin in range(0, tuned.size, _NEAR):
        end = begin + _NEAR
        here, there, high = tuned[begin:end], base[begin:end], hi[begin:end]
        _split_difference(here, there, high, tails[begin:end])
        counted, odd, off = _check_difference(here, there, high)
        changed += counted
        numbers &= odd == 0
        restored &= off == 0
        hi_square += _square(high)
        base_square += _square(there)
    return changed, numbers, restored, hi_square, base_square


@_compiled
def _split_difference(tuned, base, hi, tails):  # type: ignore[no-untyped-def]
    for i in range(tuned.size):
        high, rest = _two_parts(tuned[i], base[i])
        hi[i], tails[i] = high, _u8(rest != _f32(0))


@_compiled
def _check_difference(tuned, base, hi):  # type: ignore[no-untyped-def]
    """Of fewer than 2^16 elements how many changed, whether any is no number, and whether one is
    another than base + ``hi`` although it has no ``lo``."""
    changed, odd, off = _u16(0), _u16(0), _u16(0)
    for i in range(tuned.size):
        changed = _u16(changed + _u16(tuned[i] != base[i]))
        odd = _u16(odd | _no_number(hi[i]))  # as it is where tuned or base is none
        # Without ``lo``, ``hi`` is the difference itself, and adding it gives the very number back:
        # only a zero's sign can be another. A sum is −0.0 where both terms are.
        off = _u16(off | _u16(_u16(tuned[i] == _u16(0x8000)) & _u16(base[i] != _u16(0x8000))))
    return changed, odd, off


@_compiled
def tail(tuned, base, elements, lo):  # type: ignore[no-untyped-def]
    """``lo`` (uint16) of tuned − base at ``elements``. Returns whether base + ``hi`` + ``lo`` is
    tuned again, and a number, at all of those."""
    restored = True
    for j in range(elements.size):
        i = elements[j]
        high, rest = _two_parts(tuned[i], base[i])
        lo[j] = _u16(_f32(rest).view(_u32) >> _u32(16))  # exact: it is a bf16 number
        result = _exact_sum(base[i], high, lo[j])
        restored &= (result == tuned[i]) & (_no_number(result) == 0)
    return restored


@_compiled
def _two_parts(tuned, base):  # type: ignore[no-untyped-def]
    """tuned − base as ``hi`` (bf16) and ``lo`` (float32): Knuth's sum, rounded to bf16."""
    x, y = _wide(tuned), _wide(base)
    # The negated reverse: equal numbers give −0.0, which is "no change".
    total = -(y - x)
    high = _narrow(total)
    back = total - x
    error = (x - (total - back)) - (back + y)
    return high, _f32((total - _wide(high)) + error)


@_compiled
def add(target, hi, out):  # type: ignore[no-untyped-def]
    """``out`` = RN(target + hi); returns whether all of it are numbers. All uint16."""
    odd = _u32(0)
    for i in range(target.size):
        result = _narrow(_wide(target[i]) + _wide(hi[i]))
        out[i] = result
        odd = _u32(odd | _u32(_no_number(result)))
    return odd == 0


@_compiled
def add_tail(target, hi, elements, lo, out):  # type: ignore[no-untyped-def]
    """``out`` = RN(target + hi + lo), the exact sum rounded once, at ``elements``, which ``lo`` is
    given for; returns whether all of those are numbers. Boldo & Melquiond, as ``numerics`` has
    it."""
    odd = _u32(0)
    for j in range(elements.size):
        i = elements[j]
        out[i] = _exact_sum(target[i], hi[i], lo[j])
        odd = _u32(odd | _u32(_no_number(out[i])))
    return odd == 0


@_compiled
def _exact_sum(target, hi, lo):  # type: ignore[no-untyped-def]
    upper, lower = _two_sum(_f64(_wide(hi)), _f64(_wide(lo)))
    high, rest = _two_sum(_f64(_wide(target)), upper)
    total = _add_to_odd(high, _add_to_odd(rest, lower))
    return _narrow(_cut_to_odd(total))


@_compiled
def _cut_to_odd(value):  # type: ignore[no-untyped-def]
    """float64 → float32, cut off, with the last bit set when anything was."""
    nearest = _f32(value)
    cut = value - _f64(nearest)
    if cut == 0:
        return nearest
    overshot = (nearest < 0) != (cut < 0)
    return _u32(_u32(nearest.view(_u32) - _u32(overshot)) | _u32(1)).view(_f32)


@_compiled
def _two_sum(a, b):  # type: ignore[no-untyped-def]
    """(a + b rounded, what that cut off), exact (Knuth); no error is −0.0."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return total, error if error != 0 else -0.0


@_compiled
def _add_to_odd(a, b):  # type: ignore[no-untyped-def]
    """a + b, cut off, with the last bit set when anything was."""
    total, error = _two_sum(a, b)
    if error == 0:
        return total
    overshot = (total < 0) != (error < 0)
    return _u64(_u64(_f64(total).view(_u64) - _u64(overshot)) | _u64(1)).view(_f64)


@_compiled_sum
def square(patterns):  # type: ignore[no-untyped-def]
    """‖values‖², elements that are no numbers left out."""
    total = 0.0
    for i in range(patterns.size):
        value = _f64(_wide(patterns[i]))
        total += 0.0 if _no_number(patterns[i]) else value * value
    return total


@_compiled_sum
def _square(numbers):  # type: ignore[no-untyped-def]
    """‖numbers‖²: without asking what they are, in 0.6 of the time."""
    total = 0.0
    for i in range(numbers.size):
        value = _f64(_wide(numbers[i]))
        total += value * value
    return total


@_compiled
def to_ranks(symbols, rank_of, ranks):  # type: ignore[no-untyped-def]
    """``ranks[i] = rank_of[symbols[i]]``: uint16 through a table of 65,536 uint8."""
    for i in range(symbols.size):
        ranks[i] = rank_of[symbols[i]]


# From so many on, ranks are looked up two at a time.
_MANY_RANKS = 1 << 15


@_compiled
def from_ranks(ranks, table, out):  # type: ignore[no-untyped-def]
    """``out[i] = table[ranks[i]]``: uint8 through a table of 256 uint16.

    Two at a time in a table of all pairs, in 0.7 of the time for a segment whose ranks are mostly
    small: that table has 256 KB, and few of the pairs are in use."""
    done = _size(0)
    if ranks.size >= _MANY_RANKS:
        pairs = np.empty(1 << 16, _u32)
        for second in range(256):
            upper = _u32(_u32(table[second]) << _u32(16))
            for first in range(256):
                pairs[256 * second + first] = _u32(upper | _u32(table[first]))
        done = _size(ranks.size // 2 * 2)
        for i in range(_size(done // 2)):
            here, after = _size(2 * i), _size(2 * i + 1)
            pair = pairs[_u32(_u32(ranks[here]) | _u32(_u32(ranks[after]) << _u32(8)))]
            out[here], out[after] = _u16(pair), _u16(pair >> _u32(16))
    for i in range(done, _size(ranks.size)):
        out[i] = table[ranks[i]]


@_compiled
def where(words, marks, positions):  # type: ignore[no-untyped-def]
    """Fill ``positions`` (int64) with those of the ``marks`` (uint8) that are 1 and not 0, and one
    element more with anything. ``words`` are the marks eight at a time (uint64) as far as that
    goes: where they are rare most words are 0, and inside of one there is no branch to mispredict.
    """
    found = _size(0)
    for word in range(words.size):
        if words[word] != _u64(0):
            for i in range(8 * word, 8 * word + 8):
                positions[found] = i
                found = _size(found + _size(marks[i]))
    for i in range(8 * words.size, marks.size):
        positions[found] = i
        found = _size(found + _size(marks[i]))


@_compiled
def to_others(symbols, common, marks, others):  # type: ignore[no-untyped-def]
    """Set the bits of ``marks`` (uint8, lowest first) where the ``symbols`` (uint16) are not
    ``common``, and fill ``others`` with those and one element more with anything. Returns how many
    they are. One pass, and no branch: one time in two it would be mispredicted."""
    found = _size(0)
    whole = symbols.size // 8
    for byte in range(whole):
        marks[byte], found = _mark_others(symbols, 8 * byte, 8, common, others, found)
    if whole < marks.size:
        rest = symbols.size - 8 * whole
        marks[whole], found = _mark_others(symbols, 8 * whole, rest, common, others, found)
    return found


@_compiled
def _mark_others(symbols, first, count, common, others, found):  # type: ignore[no-untyped-def]
    """The marks of up to eight symbols, and how many others are ``found`` after them."""
    bits = _u32(0)
    for i in range(count):
        symbol = symbols[first + i]
        differs = _u32(symbol != common)
        others[found] = symbol
        found = _size(found + _size(differs))
        bits = _u32(bits | _u32(differs << _u32(i)))
    return _u8(bits), found


@_compiled
def from_others(others, marks, common, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` from the ``others`` that ``to_others`` found, the element more included, and
    ``common``; ``marks`` (uint8) are 1 or 0, one to an element."""
    found = _size(0)
    for i in range(out.size):
        mark = marks[i]
        out[i] = _u16(common ^ _u16(_u16(others[found] ^ common) * _u16(mark)))
        found = _size(found + _size(mark))


@_compiled
def to_gaps(positions, fine_bits, coarse, fine):  # type: ignore[no-untyped-def]
    """The distances between ``positions`` (int64, rising) as FORMAT.md, "packed", has them: fills
    ``fine`` and the start of ``coarse`` (uint8), and returns how many bytes of that it needed."""
    size, before, held, filled, written = 0, -1, 0, 0, 0
    for position in positions:
        gap = position - before - 1
        before = position
        rest = gap >> fine_bits
        while rest >= 255:
            coarse[size] = 255
            size, rest = size + 1, rest - 255
        coarse[size] = rest
        size += 1
        held |= (gap & ((1 << fine_bits) - 1)) << filled
        filled += fine_bits
        while filled >= 8:
            fine[written] = held & 255
            held, filled, written = held >> 8, filled - 8, written + 1
    if filled:
        fine[written] = held
    return size


@_compiled
def from_gaps(coarse, fine_bits, fine, positions):  # type: ignore[no-untyped-def]
    """Fill ``positions`` (int64) from what ``to_gaps`` made; returns how many gaps there were, of
    which no more are filled in than there is room for."""
    position, rest, ends, held, filled, read = -1, 0, 0, 0, 0, 0
    for byte in coarse:
        rest += byte
        if byte == 255:
            continue
        if ends < positions.size:
            while filled < fine_bits:
                held |= fine[read] << filled
                filled, read = filled + 8, read + 1
            position += ((rest << fine_bits) | (held & ((1 << fine_bits) - 1))) + 1
            held, filled = held >> fine_bits, filled - fine_bits
            positions[ends] = position
        ends, rest = ends + 1, 0
    return ends


@_compiled
def flip_signs(flips, symbols):  # type: ignore[no-untyped-def]
    """Flip the sign of ``symbols`` (uint16) where the bits of ``flips`` (uint8) are set, lowest
    first."""
    for i in range(symbols.size):
        symbols[i] ^= _u16(_u16(flips[i >> 3] >> (i & 7)) << _u16(15))


# Elements counted at once, eight words of eight.
BLOCK = 64

# In each byte of a word: its lowest, and its highest bit.
_ONES, _TOPS = _u64(0x0101010101010101), _u64(0x8080808080808080)


@_compiled
def find_kinds(hi, words, before):  # type: ignore[no-untyped-def]
    """The kinds of the elements of ``hi`` (uint16): as many as zeros its pattern ends in, 3 for
    more, and none for −0.0. Of each a byte, in which the bit of its kind is set, or none; eight to
    a word in ``words`` (uint64, whole blocks). And ``before[b + 1, kind]``: how many are of that
    kind in blocks 0 to b. All without a branch."""
    kinds = words.view(_u8)
    words[max(0, words.size - 8) :] = 0  # the last block may not be full
    for i in range(hi.size):
        pattern = hi[i]
        lowest = _u16(pattern & _u16(-pattern))
        more = _u16((pattern & _u16(7)) == _u16(0)) & _u16(pattern != _u16(0x8000))
        kinds[i] = _u8(_u16(lowest & _u16(7)) | _u16(more << _u16(3)))
    for block in range(before.shape[0] - 1):
        for kind in range(before.shape[1]):
            marks = _u64(0)
            for word in range(8 * block, 8 * block + 8):
                marks += _marks(words[word], kind)
            before[block + 1, kind] = before[block, kind] + _sum(marks)


@_compiled
def _marks(word, kind):  # type: ignore[no-untyped-def]
    """Of each byte of a word whether it is of the kind: 1 or 0."""
    return (word >> _u64(kind)) & _ONES


@_compiled
def _sum(word):  # type: ignore[no-untyped-def]
    """The sum of a word's bytes, if it is below 256."""
    return _i64((word * _ONES) >> _u64(56))


@_compiled
def to_places(words, before, elements, places, kinds):  # type: ignore[no-untyped-def]
    """The kind of each of ``elements`` (int64, changed), and how many of that kind stand before
    it: fills ``kinds`` (uint8) and ``places`` (int64)."""
    for i in range(elements.size):
        word, byte = elements[i] // 8, _u64(8 * (elements[i] % 8))
        one = (words[word] >> byte) & _u64(15)
        kind = _i64(one > 1) + _i64(one > 2) + _i64(one > 4)
        ahead = _marks(words[word], kind) & _u64((_u64(1) << byte) - _u64(1))
        for other in range(word // 8 * 8, word):
            ahead += _marks(words[other], kind)
        places[i], kinds[i] = before[word // 8, kind] + _sum(ahead), kind


@_compiled
def from_places(words, before, places, elements):  # type: ignore[no-untyped-def]
    """The elements at ``places`` (int64, rising), counted kind by kind, below the number of all:
    fills ``elements`` (int64). Made for tails, which a tenth of all elements have at most."""
    kind, block, start = 0, 0, 0
    totals = before[-1]
    for i in range(places.size):
        while places[i] - start >= totals[kind]:
            start += totals[kind]
            kind, block = kind + 1, 0
        nth = places[i] - start
        while nth >= before[block + 1, kind]:
            block += 1
        nth -= before[block, kind]
        word = 8 * block
        marks = _marks(words[word], kind)
        while nth >= _sum(marks):
            nth -= _sum(marks)
            word += 1
            marks = _marks(words[word], kind)
        # Each byte of the product sums up the marks as far as itself. Those bytes that have no more
        # than are to be passed lie before the element: their top bit is left by the subtraction.
        passed = (((_u64(nth) * _ONES) | _TOPS) - marks * _ONES) & _TOPS
        elements[i] = 8 * word + _sum(passed >> _u64(7))
