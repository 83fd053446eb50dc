"""Thresholds for TIES: the k-th largest |Δ| of a whole tensor, exact, without holding the tensor.

Elements are ranked by the magnitude of ``hi``, Δ in the dtype of the model, with NaN above Inf
above all numbers; of equal ones those with the lower index come first, so that exactly k are kept.
The part of the delta that holds ``hi`` is read once before the merge (twice where it is float32, 16
bits of the magnitude at a time), every hash checked. What stays in memory of it meanwhile is how
often each magnitude occurs in each segment of 2^20 elements: a few thousand of them, some 20 kB.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hubdiff.delta import Delta
from hubdiff.payloads import Arrays, PayloadHashes, decode_segments
from hubdiff.plan import Term, trim_passes
from hubdiff.safetensors_io import TensorEntry
from hubdiff.stream import spans_of, unit_bytes

_DIGIT = 1 << 16


@dataclass(frozen=True)
class Trim:
    """What is kept of a tensor's Δ: magnitudes (bit patterns without the sign) above ``threshold``,
    and in each segment the first ``ties[segment]`` of those that equal it."""

    threshold: int
    ties: np.ndarray


@dataclass
class _Slot:
    lock: threading.Lock = field(default_factory=threading.Lock)
    trim: Trim | None = None


class Trims:
    """The thresholds of a run. Each is found once, by whichever thread needs it first; the others
    that need it wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[tuple[Delta, str], _Slot] = {}

    def of(self, term: Term, entry: TensorEntry, density: float) -> Trim:
        """The trim of ``term`` to ``density`` for the tensor of the result ``entry``. Raises
        ``IntegrityError`` or ``CorruptPayload``."""
        with self._lock:
            slot = self._slots.setdefault((term.delta, term.record.name), _Slot())
        with slot.lock:
            if slot.trim is None:
                slot.trim = _measure(term, entry, density)
            return slot.trim


def _measure(term: Term, entry: TensorEntry, density: float) -> Trim:
    part = term.ranked
    assert part is not None
    count = entry.nbytes // unit_bytes(entry.dtype)
    if term.rows is not None:  # the others are filled up, and are none of Δ
        count = count // entry.shape[0] * term.rows
    wanted = max(1, int(density * count))
    threshold = 0
    segments: list[_Counts] = []
    for digit in reversed(range(trim_passes(part))):
        segments = [
            _Counts.of(_digits(magnitudes, threshold, digit))
            for magnitudes in _magnitudes(term, entry)
        ]
        found, above = _largest(segments, wanted)
        threshold, wanted = threshold * _DIGIT + found, wanted - above
    equal = np.array([counts.at(threshold % _DIGIT) for counts in segments], np.int64)
    before = np.cumsum(equal) - equal
    return Trim(threshold, np.clip(wanted - before, 0, equal))


def _magnitudes(term: Term, entry: TensorEntry) -> Iterator[np.ndarray]:
    """|hi| of each segment as bit patterns, in order."""
    part = term.ranked
    assert part is not None
    where = str(term.delta.tree.pin)
    hashes = PayloadHashes(where)
    for span in spans_of(entry):
        payloads = term.delta.read([(span, term.record, (part.group,))])[span]
        hashes.take(span, payloads)
        for units, layers in decode_segments(span, payloads, where, Arrays()):
            hi = layers["hi"]
            if hi is None:
                yield np.zeros(units.stop - units.start, np.uint32)
            else:
                yield hi & ((1 << (8 * hi.itemsize - 1)) - 1)


def _digits(magnitudes: np.ndarray, above: int, digit: int) -> np.ndarray:
    """The 16 bits at ``digit`` of those magnitudes whose higher bits are ``above``."""
    shift = 16 * digit
    shifted = magnitudes >> shift if shift else magnitudes
    if magnitudes.itemsize * 8 > shift + 16:
        shifted = shifted[shifted >> 16 == above]
    return shifted & (_DIGIT - 1)


@dataclass(frozen=True)
class _Counts:
    """How often each value of 16 bits occurs in a segment; only those that do."""

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, digits: np.ndarray) -> _Counts:
        counts = np.bincount(digits, minlength=1)
        values = np.flatnonzero(counts)
        return cls(values.astype(np.uint16), counts[values].astype(np.uint32))

    def at(self, value: int) -> int:
        return int(self.counts[self.values == value].sum())


def _largest(segments: list[_Counts], wanted: int) -> tuple[int, int]:
    """The value of the ``wanted``-th largest, and how many lie above it."""
    total = np.zeros(_DIGIT, np.int64)
    for counts in segments:
        total[counts.values] += counts.counts
    reached = np.cumsum(total[::-1])
    place = int(np.searchsorted(reached, wanted))
    value = _DIGIT - 1 - place
    return value, int(reached[place] - total[value])
