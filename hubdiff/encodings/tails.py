"""Tails: the ``lo`` of a segment, told by its ``hi``.

``lo`` is what ``hi`` had no digits for, and few elements have one. Which do, shows in ``hi``: where
nothing changed there is none, and a ``hi`` that ends in zeros is mostly exact. So the places of
tails may be counted among the changed elements only, kind by kind (``kernels.find_kinds``); and
their exponents are counted from that of ``hi``. This takes a seventh to a third off the tails, of
which sparse deltas and long training have up to a tenth; where they are next to nothing, places
among all elements are read in a fifth of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hubdiff.encodings import dense, places
from hubdiff.encodings._frames import BlobReader, corrupt
from hubdiff.encodings.places import Places

_NAME = "tail"
KINDS = 4
ANYWHERE, TOGETHER, APART = range(3)
EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00}  # the bits of the exponent

# Measured: kinds are worth their time where there is more than one tail for so many bytes of hi,
# and a list of its own for each kind from so many tails on.
_WORTH_KINDS, _WORTH_APART = 128, 1 << 13

_NOWHERE, _NOTHING = np.empty(0, np.int64), np.empty(0, np.uint16)


class Tail(NamedTuple):
    """The elements that have a ``lo``, in any order, and its bit patterns."""

    elements: np.ndarray
    patterns: np.ndarray

    @classmethod
    def of(cls, lo: np.ndarray) -> Tail:
        """That of a ``lo`` of all elements."""
        elements = dense.where(lo != 0)
        return cls(elements, lo[elements])

    def full(self, count: int) -> np.ndarray:
        """``lo`` of all elements, 0 where there is none: uint16."""
        out = np.zeros(count, np.uint16)
        out[self.elements] = self.patterns
        return out


def encode(tail: Tail, hi: np.ndarray, dtype: str, stored: int) -> bytes:
    """The blob of the ``lo`` that belongs to ``hi``, which takes ``stored`` bytes. Its elements
    rise, and ``hi`` is −0.0 at none of them."""
    elements, theirs = tail.elements, hi[tail.elements]
    if (theirs == dense.SIGN).any():
        raise ValueError("a tail where nothing changed")
    symbols = relative(tail.patterns, theirs, dtype)
    if _WORTH_KINDS * elements.size < stored:
        return bytes([ANYWHERE]) + places.encode(elements, symbols, hi.size)
    return _encode_by_kind(elements, symbols, hi)


def _encode_by_kind(elements: np.ndarray, symbols: np.ndarray, hi: np.ndarray) -> bytes:
    from hubdiff import kernels

    words, before = kinds_of(hi)
    found: np.ndarray = np.empty(elements.size, np.int64)
    kinds: np.ndarray = np.empty(elements.size, np.uint8)
    kernels.to_places(words, before, elements, found, kinds)
    order = np.argsort(kinds, kind="stable")
    found, kinds, symbols = found[order], kinds[order], symbols[order]
    totals = before[-1]
    if elements.size < _WORTH_APART:
        found += (np.cumsum(totals) - totals)[kinds]
        return bytes([TOGETHER]) + places.encode(found, symbols, int(totals.sum()))
    ends = np.searchsorted(kinds, np.arange(KINDS + 1))
    lists = [
        places.encode(found[begin:end], symbols[begin:end], int(total))
        for begin, end, total in zip(ends[:-1], ends[1:], totals, strict=True)
    ]
    return bytes([APART]) + b"".join(lists)


def kinds_of(hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kinds of all elements, eight to a word; and how many of each kind there are before each
    block, in the last row altogether: int32, blocks + 1 × ``KINDS``."""
    from hubdiff import kernels

    blocks = -(-hi.size // kernels.BLOCK)
    words = np.empty(blocks * kernels.BLOCK // 8, np.uint64)
    before = np.zeros((blocks + 1, KINDS), np.int32)
    kernels.find_kinds(hi, words, before)
    return words, before


def relative(these: np.ndarray, hi: np.ndarray, dtype: str) -> np.ndarray:
    """Patterns with the exponent counted down from that of ``hi``; its own inverse."""
    exponent = np.uint16(EXPONENTS[dtype])
    return ((hi - (these & exponent)) & exponent) | (these & ~exponent)


@dataclass(frozen=True)
class Lists:
    """The places of a tail: one list, or with ``variant`` APART one for each kind. What a list
    counts among is known with ``hi``. To check: its last place is below that, no place is where
    ``hi`` is −0.0, and no ``lo`` is 0."""

    variant: int
    lists: list[Places | None]


def parse(blob: bytes | memoryview, count: int) -> Lists:
    """The parts of a blob for ``count`` elements."""
    reader = BlobReader(blob, _NAME)
    variant = reader.uint(1, "the variant")
    if variant not in (ANYWHERE, TOGETHER, APART):
        raise reader.fail(f"there is no variant {variant}")
    number = KINDS if variant == APART else 1
    lists = [places.parse(reader, count, 0, count) for _ in range(number)]
    reader.end()
    return Lists(variant, lists)


def decode(blob: bytes | memoryview, hi: np.ndarray, dtype: str) -> Tail:
    """What ``encode`` made. Raises ``CorruptPayload``."""
    from hubdiff import kernels

    parsed = parse(blob, hi.size)
    if parsed.variant == ANYWHERE:
        elements, symbols = _read(parsed.lists, [hi.size])
    else:
        words, before = kinds_of(hi)
        totals = before[-1].tolist()
        found, symbols = _read(parsed.lists, totals if parsed.variant == APART else [sum(totals)])
        elements = np.empty(found.size, np.int64)
        kernels.from_places(words, before, found, elements)
    theirs = hi[elements]
    patterns = relative(symbols, theirs, dtype)
    if (theirs == dense.SIGN).any() or not patterns.all():
        raise corrupt(f"Corrupt {_NAME} blob: a place has no tail.")
    return Tail(elements, patterns)


def _read(lists: list[Places | None], among: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The places of all lists, counted on from one to the next, and their symbols."""
    found, symbols, start = [_NOWHERE], [_NOTHING], 0
    for one, size in zip(lists, among, strict=True):
        if one is not None:
            here, these = places.render(one, size)
            found.append(here + start)
            symbols.append(these)
        start += size
    return np.concatenate(found), np.concatenate(symbols)
