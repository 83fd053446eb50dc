"""The forecast: how far a target lies from a delta's base, told from the delta's sample.

``Look`` says what is to be read of the target, ``look`` reads it and adds up. Every number is an
estimate: each sampled element stands for the elements of its tensor that were not looked at.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from hubdiff import sample as sampling
from hubdiff.anatomy import KINDS, place
from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.delta import Delta
from hubdiff.errors import BadManifest, IntegrityError
from hubdiff.floats import BYTES, bf16, floats
from hubdiff.hashing import check_hash, hash_bytes
from hubdiff.payloads import DAMAGED
from hubdiff.rows import Run
from hubdiff.sample import Piece, Sample, Values
from hubdiff.stream import Range, read_ranges, run_ordered, workers_for

# Bytes that are read and thrown away rather than asked for with one more request.
_GAP = 64 << 10
# What a stranger's sample may ask for: of one request, of a target, and of its own file.
_MOST_REQUEST, _MOST_READ, _MOST_FILE = 4 << 20, 64 << 20, 16 << 20


class Moments(NamedTuple):
    """Sums over elements, estimated: squares of base, target, Δ and target − base, the products of
    base and target and of Δ and target − base, and the numbers of elements, of those that Δ
    changes, of those of them that the target rounds away again, and of those that are no finite
    numbers on one side, which are in no other sum."""

    base: float = 0.0
    target: float = 0.0
    delta: float = 0.0
    moved: float = 0.0
    base_target: float = 0.0
    delta_moved: float = 0.0
    elements: float = 0.0
    changed: float = 0.0
    eaten: float = 0.0
    strange: float = 0.0

    def plus(self, other: Moments, weight: float = 1.0) -> Moments:
        return Moments(*(a + weight * b for a, b in zip(self, other, strict=True)))

    @property
    def cosine(self) -> float | None:
        """Of base and target: 1 where they are the same, 0 where they have nothing in common."""
        return _ratio(self.base_target, math.sqrt(self.base * self.target))

    @property
    def drift(self) -> float | None:
        """‖target − base‖/‖base‖."""
        return _ratio(math.sqrt(self.moved), math.sqrt(self.base))

    @property
    def reach(self) -> float | None:
        """‖Δ‖/‖base‖."""
        return _ratio(math.sqrt(self.delta), math.sqrt(self.base))

    @property
    def drift_over_delta(self) -> float | None:
        """‖target − base‖/‖Δ‖."""
        return _ratio(math.sqrt(self.moved), math.sqrt(self.delta))

    @property
    def along(self) -> float | None:
        """The cosine of Δ and target − base: 1 where the target went the way of the tune itself,
        −1 where it went back."""
        return _ratio(self.delta_moved, math.sqrt(self.delta * self.moved))

    @property
    def rounded_away(self) -> float | None:
        """The share of what Δ changes that is too small for the target's dtype there: rounded, the
        sum is the target again."""
        return _ratio(self.eaten, self.changed)

    def as_json(self) -> dict[str, float | None]:
        return {
            "cosine": self.cosine,
            "drift": self.drift,
            "reach": self.reach,
            "drift_over_delta": self.drift_over_delta,
            "along": self.along,
            "rounded_away": self.rounded_away,
        }


def _ratio(a: float, b: float) -> float | None:
    return a / b if b and math.isfinite(a) and math.isfinite(b) else None


class Row(NamedTuple):
    """The tensors of one kind in one layer (None: outside the layers) of one stack."""

    stack: str
    layer: int | None
    kind: str
    moments: Moments


@dataclass(frozen=True)
class Forecast:
    """``total`` is that of all but the norms. ``tensors`` of the delta's sample were compared,
    ``elements`` in all; ``read`` are the bytes read of the target. ``missing`` are tensors of the
    sample that were not: the target has no like of them, or Δ does not act there."""

    total: Moments
    rows: tuple[Row, ...]
    tensors: int
    elements: int
    read: int
    missing: tuple[str, ...]

    @property
    def cosine(self) -> float | None:
        """Of base and target, of the whole or of the layers in the middle, whichever is lower: two
        equal embeddings, which are large, do not make two models alike."""
        rows = sorted(r.moments.cosine for r in self.rows if r.moments.cosine is not None)
        found = [rows[(len(rows) - 1) // 2]] if rows else []
        if self.total.cosine is not None:
            found.append(self.total.cosine)
        return min(found, default=None)

    @property
    def strange(self) -> float:
        """The share of the sample that holds no finite numbers on one side."""
        everything = self.total.elements + self.total.strange
        return self.total.strange / everything if everything else 1.0

    def as_json(self) -> dict[str, Any]:
        return {
            **self.total.as_json(),
            "strange": self.strange,
            "sample": {
                "tensors": self.tensors,
                "elements": self.elements,
                "bytes_read": self.read,
                "missing": list(self.missing),
            },
            "layers": [
                {"stack": r.stack, "layer": r.layer, "kind": r.kind, **r.moments.as_json()}
                for r in self.rows
            ],
        }


@dataclass(frozen=True)
class Look:
    """What is to be read to compare ``target`` with the base of ``delta``: its sample, and the
    blocks of the target's tensors that ``partners`` names for those of the base. ``rows`` are the
    runs of rows that ``aligned`` ones of them have in the target; blocks that are not whole in one
    are left out."""

    delta: Delta
    sample: Sample
    target: Checkpoint
    partners: Mapping[str, Placed]
    aligned: frozenset[str] = frozenset()
    rows: tuple[Run, ...] = ()

    @classmethod
    def of(
        cls,
        delta: Delta,
        target: Checkpoint,
        partners: Mapping[str, str],
        aligned: frozenset[str] = frozenset(),
        rows: tuple[Run, ...] = (),
    ) -> Look | None:
        """None for a delta without a sample, or where no tensor has a partner of its shape."""
        found = delta.manifest.sample
        if found is None:
            return None
        placed = {
            name: target.tensors[other]
            for name, other in partners.items()
            if name in found.blocks
            and (name in aligned or target.tensors[other].entry.shape == delta.records[name].shape)
            and target.tensors[other].entry.dtype in BYTES
        }
        by_row = tuple(sorted(rows, key=lambda run: run.row))
        at = cls(delta, found, target, placed, aligned & set(placed), by_row)
        if not at.requests:
            return None
        if at.target_bytes > _MOST_READ:
            raise BadManifest(
                f"{delta.tree.pin}: the sample asks for {at.target_bytes:,} bytes of a target",
                next_step=DAMAGED,
            )
        return at

    @cached_property
    def requests(self) -> list[Request]:
        """What is read of the target, in file order."""
        wanted = []
        for piece in self.sample.pieces():
            first = self._first(piece) if piece.name in self.partners else None
            if first is not None:
                wanted.append((_range(piece, first, self.partners[piece.name]), piece))
        wanted.sort(key=lambda item: item[0])
        return list(_merged(wanted))

    def _first(self, piece: Piece) -> int | None:
        """The element of the target's tensor that a piece begins with; None: it has no such
        place."""
        if piece.name not in self.aligned:
            return piece.first
        width = math.prod(self.delta.records[piece.name].shape[1:])
        begin, end = piece.first // width, -(-(piece.first + piece.count) // width)
        index = bisect_right(self.rows, begin, key=lambda run: run.row) - 1
        run = self.rows[index] if index >= 0 else None
        if run is None or end > run.row + run.count:
            return None
        return piece.first + (run.at - run.row) * width

    @property
    def target_bytes(self) -> int:
        return sum(request.range.nbytes for request in self.requests)

    @property
    def delta_bytes(self) -> int:
        return self.delta.tree.files()[sampling.FILE].size

    @property
    def network(self) -> int:
        """How many of those bytes cost traffic."""
        remote = [r.range for r in self.requests if self.target.tree.is_remote(r.range.file)]
        own = self.delta_bytes if self.delta.tree.is_remote(sampling.FILE) else 0
        return own + sum(place.nbytes for place in remote)


class Request(NamedTuple):
    """One range of the target, and the pieces in it with their own ranges."""

    range: Range
    pieces: tuple[tuple[Range, Piece], ...]


def _range(piece: Piece, first: int, placed: Placed) -> Range:
    size = BYTES[placed.entry.dtype]
    begin = placed.entry.begin + first * size
    return Range(placed.file, begin, begin + piece.count * size)


def _merged(wanted: Sequence[tuple[Range, Piece]]) -> Iterable[Request]:
    run: list[tuple[Range, Piece]] = []
    for item in wanted:
        if run and (
            item[0].file != run[-1][0].file
            or item[0].begin - run[-1][0].end > _GAP
            or item[0].end - run[0][0].begin > _MOST_REQUEST
        ):
            yield _request(run)
            run = []
        run.append(item)
    if run:
        yield _request(run)


def _request(run: list[tuple[Range, Piece]]) -> Request:
    return Request(Range(run[0][0].file, run[0][0].begin, run[-1][0].end), tuple(run))


def read_sample(delta: Delta, sample: Sample) -> Values:
    """The values that a delta keeps. Raises ``DeltaError`` or ``IntegrityError``."""
    where = f"{delta.tree.pin}/{sampling.FILE}"
    record = next((f for f in delta.manifest.side_files if f.path == sampling.FILE), None)
    if record is None or record.path not in delta.tree.files():
        raise BadManifest(f"{where} is missing, the manifest has a sample", next_step=DAMAGED)
    if delta.tree.files()[sampling.FILE].size > _MOST_FILE:
        raise BadManifest(f"{where} is larger than any sample", next_step=DAMAGED)
    data = delta.tree.read_bytes(sampling.FILE)
    check_hash(hash_bytes(data), record.sha256, where)
    return sampling.decode(sample, data, where)


def _numbers(at: Look, request: Request, view: memoryview) -> Iterator[tuple[Piece, np.ndarray]]:
    """The pieces of a request with the target's values, out of what was read for it."""
    for where, piece in request.pieces:
        dtype = at.partners[piece.name].entry.dtype
        start = where.begin - request.range.begin
        patterns = np.frombuffer(view[start : start + where.nbytes], f"<u{BYTES[dtype]}")
        yield piece, floats(patterns, dtype)


def require_base(at: Look) -> int:
    """Raise ``IntegrityError`` unless the base's values in the sample are those of ``at.target``,
    bit by bit; how many they are."""
    values, offsets = read_sample(at.delta, at.sample), _offsets(at.sample)
    count = 0
    for request in at.requests:
        view = read_ranges(at.target, [request.range])[request.range]
        for piece, numbers in _numbers(at, request, view):
            kept = values.base[offsets[piece] : offsets[piece] + piece.count]
            if not np.array_equal(numbers.view(np.uint32), kept.view(np.uint32)):
                raise IntegrityError(
                    f"{at.delta.tree.pin}: the sample has other values of {piece.name} than "
                    f"{at.target.tree.pin}",
                    next_step="A forecast from it is wrong; ask the delta's author to push again.",
                )
            count += piece.count
    return count


def look(at: Look) -> Forecast:
    """Read the target's blocks and compare. Raises ``HubdiffError`` for a delta that is damaged."""
    values, offsets = read_sample(at.delta, at.sample), _offsets(at.sample)
    found: dict[str, Moments] = {}

    def read(request: Request) -> memoryview:
        return read_ranges(at.target, [request.range])[request.range]

    def take(request: Request, view: memoryview) -> None:
        for piece, numbers in _numbers(at, request, view):
            here = slice(offsets[piece], offsets[piece] + piece.count)
            dtype = at.partners[piece.name].entry.dtype
            moments = _moments(values.base[here], values.delta[here], numbers, dtype)
            found[piece.name] = found.get(piece.name, Moments()).plus(moments)

    requests = at.requests
    remote = any(at.target.tree.is_remote(request.range.file) for request in requests)
    run_ordered(requests, read, take, workers_for(remote=remote))
    rows: dict[tuple[str, int | None, str], Moments] = {}
    weights = at.sample.weights()
    for name, moments in found.items():
        # Those of its blocks that the target has no place for are stood for by the others.
        seen = moments.elements + moments.strange
        weight = weights[name] * sum(p.count for p in at.sample.pieces_of(name)) / seen
        rows[place(name)] = rows.get(place(name), Moments()).plus(moments, weight)
    return Forecast(
        _total(rows),
        tuple(Row(*where, moments) for where, moments in sorted(rows.items(), key=_in_order)),
        len(found),
        int(sum(moments.elements for moments in found.values())),
        sum(request.range.nbytes for request in requests),
        tuple(name for name in at.sample.blocks if name not in at.partners),
    )


def _total(rows: Mapping[tuple[str, int | None, str], Moments]) -> Moments:
    """Of everything but norms, unless there is nothing else. Norms start at 1 and stay near it in
    every model: their few large numbers would make any two of them alike."""
    chosen = [moments for (_, _, kind), moments in rows.items() if kind != "norm"]
    total = Moments()
    for moments in chosen or rows.values():
        total = total.plus(moments)
    return total


def _in_order(item: tuple[tuple[str, int | None, str], Moments]) -> tuple[bool, str, int, int]:
    (stack, layer, kind), _ = item
    return layer is not None, stack, -1 if layer is None else layer, KINDS.index(kind)


def _offsets(sample: Sample) -> dict[Piece, int]:
    offsets, position = {}, 0
    for piece in sample.pieces():
        offsets[piece] = position
        position += piece.count
    return offsets


def _moments(base: np.ndarray, delta: np.ndarray, target: np.ndarray, dtype: str) -> Moments:
    """Of one block; what is infinite or no number on any side is left out."""
    known = np.isfinite(base) & np.isfinite(delta) & np.isfinite(target)
    b, d, t = (side[known].astype(np.float64) for side in (base, delta, target))
    moved, changed = t - b, d != 0
    with np.errstate(over="ignore"):  # an overflow is a change
        eaten = changed & (_rounded(t + d, dtype) == t)
    return Moments(
        float(b @ b),
        float(t @ t),
        float(d @ d),
        float(moved @ moved),
        float(b @ t),
        float(d @ moved),
        float(len(b)),
        float(np.count_nonzero(changed)),
        float(np.count_nonzero(eaten)),
        float(np.count_nonzero(~known)),
    )


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values as the dtype has them."""
    if dtype == "BF16":
        return floats(bf16(values.astype(np.float32)), "BF16")
    return values.astype(np.float16 if dtype == "F16" else np.float32)
