"""What changed between two models, tensor by tensor: norms, cosine, how many weights moved, and of
how many directions the change is made. Read once, block by block, in bounded memory.

The rank is the participation ratio of the singular values of Δ, ``(Σσ²)² / Σσ⁴``: r for r equal
ones, 1 where one direction is all. It is estimated from a sketch: for Gaussian columns g of G the
products ``gᵢᵀ ΔᵀΔ gⱼ`` have the mean square ``Σσ⁴`` and ``gᵢᵀ ΔᵀΔ gᵢ`` the mean ``Σσ²``, and
``Δ·G`` needs each row of Δ only once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hubdiff.checkpoint import Placed
from hubdiff.floats import floats
from hubdiff.pair import FLOATS, Pair, TensorPair
from hubdiff.progress import Progress
from hubdiff.stream import (
    Block,
    Range,
    Span,
    blocks,
    read_ranges,
    run_ordered,
    span_range,
    unit_dtype,
    workers_for,
)

NUMBERS = FLOATS | {"F64"}
_COLUMNS = 32  # of the sketch: the estimate is within about 5 %
_MOST_COLUMNS = 1 << 16  # of Δ: what the sketch costs in memory
_SEED = 0


@dataclass(frozen=True)
class TensorChange:
    """``name`` is the second model's; ``dtype`` and ``old_dtype`` are those of the second and the
    first. ``changed`` counts elements whose bits differ (whose numbers do, where dtypes differ).
    Norms are of what is finite; all are 0 for tensors that are no floats. ``rank`` is None for
    what has not two dimensions, or did not change."""

    name: str
    old_name: str
    shape: tuple[int, ...]
    dtype: str
    old_dtype: str
    elements: int
    changed: int
    old_norm: float
    new_norm: float
    delta_norm: float
    cosine: float | None
    rank: float | None


@dataclass
class _Sums:
    """Of one tensor so far. ``row`` is what is known of the sketch of a row that is cut."""

    changed: int = 0
    old: float = 0.0
    new: float = 0.0
    delta: float = 0.0
    product: float = 0.0
    gram: np.ndarray = field(default_factory=lambda: np.zeros((_COLUMNS, _COLUMNS)))
    row: np.ndarray = field(default_factory=lambda: np.zeros(_COLUMNS))


class _Sketch(NamedTuple):
    """Δ·G of a span: of the rest of the row before it (``closes``: all of that rest is here), the
    Gram matrix of its whole rows, and of the start of a row that goes on."""

    head: np.ndarray
    closes: bool
    gram: np.ndarray
    tail: np.ndarray


@dataclass(frozen=True)
class _Piece:
    """What one span adds: ``sums`` are Σx², Σy², ΣΔ² and Σxy of the first and the second model."""

    span: Span
    pair: TensorPair
    changed: int
    sums: tuple[float, float, float, float]
    sketch: _Sketch | None = None


def changes(pair: Pair, progress: Progress) -> Iterator[TensorChange]:
    """Every tensor that both models have, in the second one's file order. ``pair.tuned`` is the
    second model, ``pair.base`` the first."""
    shards = pair.tuned.shards
    progress.start("comparing", sum(header.file_size for header in shards.values()))
    found: list[TensorChange] = []
    sums: dict[str, _Sums] = {}

    def take(block: Block, pieces: list[_Piece]) -> None:
        for piece in pieces:
            here = sums.setdefault(piece.pair.tuned_name, _Sums())
            _add(here, piece)
            if piece.span.last:
                found.append(_finish(piece.pair, sums.pop(piece.pair.tuned_name)))
        progress.advance(block.nbytes)

    sides = (pair.tuned, pair.base)
    remote = any(side.tree.is_remote(file) for side in sides for file in side.shards)
    for file, header in shards.items():
        progress.advance(len(header.raw))
        run_ordered(blocks(file, header), _reader(pair), take, workers_for(remote=remote))
        yield from found
        found.clear()
    progress.finish()


def _reader(pair: Pair) -> Callable[[Block], list[_Piece]]:
    def work(block: Block) -> list[_Piece]:
        both = [
            (span, one, one.base)
            for span in block.spans
            if (one := pair.tensors.get(span.entry.name)) is not None and one.base is not None
        ]
        own = {span: Range(block.file, span.begin, span.begin + span.nbytes) for span, _, _ in both}
        old = {span: span_range(span, base) for span, _, base in both}
        new_views = read_ranges(pair.tuned, own.values())
        old_views = read_ranges(pair.base, old.values())
        return [
            _compare(span, one, base, new_views[own[span]], old_views[old[span]])
            for span, one, base in both
        ]

    return work


def _compare(
    span: Span, pair: TensorPair, base: Placed, new: memoryview, old: memoryview
) -> _Piece:
    dtypes = (span.entry.dtype, base.entry.dtype)
    bits = [np.frombuffer(v, unit_dtype(d)) for v, d in zip((new, old), dtypes, strict=True)]
    if not set(dtypes) <= NUMBERS:
        same_type = bits[0].dtype == bits[1].dtype
        changed = int(np.count_nonzero(bits[0] != bits[1])) if same_type else span.units
        return _Piece(span, pair, changed, (0.0, 0.0, 0.0, 0.0))
    y, x = (_numbers(b, d) for b, d in zip(bits, dtypes, strict=True))
    differs = bits[0] != bits[1] if dtypes[0] == dtypes[1] else y != x
    with np.errstate(over="ignore", invalid="ignore"):
        known = np.isfinite(x) & np.isfinite(y) & np.isfinite(y - x)
    x, y = np.where(known, x, 0), np.where(known, y, 0)
    delta = y - x
    sums = (_dot(x, x), _dot(y, y), _dot(delta, delta), _dot(x, y))
    changed = int(np.count_nonzero(differs))
    if not _has_rank(span.entry.shape):
        return _Piece(span, pair, changed, sums)
    columns = math.prod(span.entry.shape[1:])
    return _Piece(span, pair, changed, sums, _sketch(delta, span.first, columns))


def _numbers(patterns: np.ndarray, dtype: str) -> np.ndarray:
    return patterns.view("<f8") if dtype == "F64" else floats(patterns, dtype)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.astype(np.float64) @ b.astype(np.float64))


def _has_rank(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and 0 < math.prod(shape[1:]) <= _MOST_COLUMNS


@lru_cache(maxsize=8)
def _gaussian(columns: int) -> np.ndarray:
    generator = np.random.default_rng(_SEED)
    return generator.standard_normal((columns, _COLUMNS), np.float32)


def _sketch(delta: np.ndarray, first: int, columns: int) -> _Sketch:
    """Of the elements from ``first`` on: the rest of a row, whole rows, the start of a row."""
    gaussian, column = _gaussian(columns), first % columns
    lead = min(-first % columns, len(delta))
    head = delta[:lead] @ gaussian[column : column + lead]
    rest = delta[lead:]
    whole = len(rest) // columns * columns
    rows = rest[:whole].reshape(-1, columns) @ gaussian
    tail = rest[whole:] @ gaussian[: len(rest) - whole]
    closes = column > 0 and column + lead == columns
    return _Sketch(head, closes, rows.T @ rows, tail)


def _add(sums: _Sums, piece: _Piece) -> None:
    sums.changed += piece.changed
    old, new, delta, product = piece.sums
    sums.old, sums.new = sums.old + old, sums.new + new
    sums.delta, sums.product = sums.delta + delta, sums.product + product
    if piece.sketch is None:
        return
    sums.row += piece.sketch.head
    if piece.sketch.closes:
        _close_row(sums)
    sums.gram += piece.sketch.gram
    sums.row += piece.sketch.tail


def _close_row(sums: _Sums) -> None:
    sums.gram += np.outer(sums.row, sums.row)
    sums.row = np.zeros(_COLUMNS)


def _finish(pair: TensorPair, sums: _Sums) -> TensorChange:
    assert pair.base is not None
    entry = pair.tuned.entry
    norms = math.sqrt(sums.old * sums.new)
    return TensorChange(
        pair.tuned_name,
        pair.name,
        entry.shape,
        entry.dtype,
        pair.base.entry.dtype,
        entry.count,
        sums.changed,
        math.sqrt(sums.old),
        math.sqrt(sums.new),
        math.sqrt(sums.delta),
        sums.product / norms if norms else None,
        _rank(sums) if _has_rank(entry.shape) else None,
    )


def _rank(sums: _Sums) -> float | None:
    """Both sums from one sketch, so that their errors cancel: of one direction it is exactly 1."""
    _close_row(sums)
    apart = ~np.eye(_COLUMNS, dtype=bool)
    norms = np.diag(sums.gram)
    fourth = float((sums.gram[apart] ** 2).mean())
    return float(np.outer(norms, norms)[apart].mean()) / fourth if fourth else None
