"""Tails: the ``lo`` of a segment, told by its ``hi``.

``lo`` is what ``hi`` had no digits for, and few elements have one. Which do, shows in ``hi``: where
nothing changed there is none, and a ``hi`` that ends in zeros is mostly exact. So the places of
tails are counted among the changed elements only, kind by kind (``kernels.count_kinds``), and their
exponents from that of ``hi``. On fine-tunes this takes a quarter to a third off the tails, of which
a sparse delta has up to a tenth.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hubdiff.encodings import dense, places
from hubdiff.encodings._frames import BlobReader
from hubdiff.encodings.places import Places

KINDS = 4
TOGETHER, APART = range(2)
EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00}  # the bits of the exponent

# Measured: from here on, a list of its own for each kind is worth its tables.
_WORTH_APART = 1 << 12

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

    def dense(self, count: int) -> np.ndarray:
        """``lo`` of all elements, 0 where there is none: uint16."""
        out = np.zeros(count, np.uint16)
        out[self.elements] = self.patterns
        return out


def encode(tail: Tail, hi: np.ndarray, dtype: str) -> bytes:
    """The blob of the ``lo`` that belongs to ``hi``. Its elements rise, and ``hi`` is −0.0 at none
    of them."""
    from hubdiff import kernels

    elements = tail.elements
    theirs = hi[elements]
    if (theirs == dense.SIGN).any():
        raise ValueError("a tail where nothing changed")
    patterns = relative(tail.patterns, theirs, dtype)
    before = count_before(hi)
    found = np.empty(elements.size, np.int64)
    kinds = np.empty(elements.size, np.uint8)
    kernels.to_places(hi, before, elements, found, kinds)
    order = np.argsort(kinds, kind="stable")
    found, kinds, symbols = found[order], kinds[order], patterns[order]
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


def count_before(hi: np.ndarray) -> np.ndarray:
    """How many elements of each kind there are before each block of ``kernels.BLOCK``, and in the
    last row altogether: int64, blocks + 1 × ``KINDS``."""
    from hubdiff import kernels

    before = np.zeros((-(-hi.size // kernels.BLOCK) + 1, KINDS), np.int64)
    kernels.count_kinds(hi, before)
    return before


def relative(these: np.ndarray, hi: np.ndarray, dtype: str) -> np.ndarray:
    """Patterns with the exponent counted down from that of ``hi``; its own inverse."""
    exponent = np.uint16(EXPONENTS[dtype])
    return ((hi - (these & exponent)) & exponent) | (these & ~exponent)


def parse(blob: bytes | memoryview, count: int) -> list[Places | None]:
    """The lists of a blob for ``count`` elements, one for all kinds or one for each. What a list
    counts among is known with ``hi``; to check: its last place is below that."""
    reader = BlobReader(blob, "tail")
    variant = reader.uint(1, "the variant")
    if variant not in (TOGETHER, APART):
        raise reader.fail(f"there is no variant {variant}")
    lists = [places.parse(reader, count, 0, count) for _ in range(KINDS if variant else 1)]
    reader.end()
    return lists


def decode(blob: bytes | memoryview, hi: np.ndarray, dtype: str) -> Tail:
    """What ``encode`` made. Raises ``CorruptPayload``."""
    from hubdiff import kernels

    before = count_before(hi)
    elements, symbols = [_NOWHERE], [_NOTHING]
    for kind, found, one in _by_kind(parse(blob, hi.size), before[-1]):
        here = np.empty(found.size, np.int64)
        kernels.from_places(hi, before, kind, found, here)
        elements.append(here)
        symbols.append(one)
    where = np.concatenate(elements)
    return Tail(where, relative(np.concatenate(symbols), hi[where], dtype))


def _by_kind(
    lists: list[Places | None], totals: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Places among the elements of a kind, with their symbols, kind by kind."""
    if len(lists) == KINDS:
        for kind, one in enumerate(lists):
            if one is not None:
                yield kind, *places.render(one, int(totals[kind]))
    elif lists[0] is not None:
        found, symbols = places.render(lists[0], int(totals.sum()))
        ends = np.cumsum(totals)
        cuts = [0, *np.searchsorted(found, ends)]
        for kind, (begin, end) in enumerate(pairwise(cuts)):
            start = ends[kind] - totals[kind]
            yield kind, found[begin:end] - start, symbols[begin:end]
