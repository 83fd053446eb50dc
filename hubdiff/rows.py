"""Vocabulary tensors, embeddings and output heads, cut into runs of rows.

Where a tuned model has rows that its base has not, the rows that both use are compared and the rest
travels as it is. For all that compares and merges these are two tensors: the first rows keep the
name, the rest is called ``NAME[rows:]``. The files stay as they are, header and all; only what
their headers are read as is finer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.errors import CannotDiff
from hubdiff.names import match_names, tables_of
from hubdiff.safetensors_io import DTYPE_BITS, Header, TensorEntry
from hubdiff.vocab import Vocabulary, same_vocabulary, vocabulary_of

_COPY = 8 << 20
_CUT = re.compile(r"\[\d*:\d*\]$")


@dataclass(frozen=True)
class Cut:
    """Where a tensor is cut: its first ``shared`` rows are compared. ``base`` is how many rows the
    base's tensor has in all, None where the base has no such tensor; ``rest`` the blake3 of those
    that are not compared."""

    shared: int
    base: int | None
    rest: str | None = None


def whole_name(name: str) -> str:
    """The name of the tensor that a run of rows is of."""
    return _CUT.sub("", name)


def rest_name(name: str, shared: int) -> str:
    """The name of the rows of a tensor that is cut behind ``shared``."""
    return f"{name}[{shared}:]"


def run_of(entry: TensorEntry, first: int, last: int) -> TensorEntry:
    """The rows ``first`` to ``last`` of a tensor, as a tensor of their own. Those from row 0 on
    keep the name; rows up to the last one are called ``NAME[first:]``."""
    rows = entry.shape[0]
    size = entry.nbytes // rows if rows else 0
    end = "" if last == rows else last
    name = f"{entry.name}[{first}:{end}]" if first else entry.name
    begin = entry.begin
    shape = (last - first, *entry.shape[1:])
    return TensorEntry(name, entry.dtype, shape, begin + first * size, begin + last * size)


def cut_entry(entry: TensorEntry, at: Iterable[int]) -> tuple[TensorEntry, ...]:
    """A tensor as the runs of rows between the ones given."""
    rows = entry.shape[0]
    edges = [0, *sorted({row for row in at if 0 < row < rows}), rows]
    return tuple(run_of(entry, *edge) for edge in pairwise(edges))


def cut_header(header: Header, rows: Mapping[str, Iterable[int]]) -> Header:
    """The header with the tensors that ``rows`` names cut at its rows."""
    tensors = [
        part
        for entry in header.tensors
        for part in (cut_entry(entry, rows[entry.name]) if entry.name in rows else (entry,))
    ]
    return replace(header, tensors=tuple(tensors))


def cut_checkpoint(checkpoint: Checkpoint, shared: Mapping[str, int], *, rest: bool) -> Checkpoint:
    """The same files, open once, with the tensors that ``shared`` names cut behind so many rows.
    Without ``rest`` what comes after them is no tensor, only bytes of the file."""
    if not shared:
        return checkpoint
    at = {name: (rows,) for name, rows in shared.items()}
    shards = {file: cut_header(header, at) for file, header in checkpoint.shards.items()}
    tensors = {
        entry.name: Placed(file, entry)
        for file, header in shards.items()
        for entry in header.tensors
        if rest or entry.name == whole_name(entry.name) or entry.name in checkpoint.tensors
    }
    return replace(checkpoint, shards=shards, tensors=tensors)


# --- where a tuned model and its base part ---


@dataclass(frozen=True)
class CutModels:
    """Tuned model, base and masters, cut where their vocabularies part; ``cuts`` says where, by the
    names of the base (the tuned model's, for a tensor that the base does not have)."""

    tuned: Checkpoint
    base: Checkpoint
    master: Checkpoint | None
    cuts: dict[str, Cut]


def cut_models(tuned: Checkpoint, base: Checkpoint, master: Checkpoint | None) -> CutModels:
    """Nothing is cut where the tokenizers can't be read, where it can't be told which tensors have
    a row for every token, or where a token that both have does not stand for one row. Raises
    ``CannotDiff`` for a tensor that is called like rows of another."""
    for name in (*tuned.tensors, *base.tensors):
        if whole_name(name) != name:
            raise CannotDiff(
                f"the tensor {name!r} is called like some rows of another",
                next_step="Rename it, or leave it out of the model.",
            )
    tables = _Pairs.of(tuned, base)
    shared = tables.shared(tuned, base) if tables is not None else None
    if tables is None or shared is None:
        return CutModels(tuned, base, master, {})
    theirs = {other: shared for other in tables.names.values() if other is not None}
    if master is not None:
        pairs = match_names(tuned.tensors, master.tensors).pairs
        masters = {pairs[name]: shared for name in tables.names if name in pairs}
        master = cut_checkpoint(master, masters, rest=True)
    cuts = {
        other or name: Cut(shared, None if other is None else tables.base_rows)
        for name, other in tables.names.items()
    }
    return CutModels(
        cut_checkpoint(tuned, dict.fromkeys(tables.names, shared), rest=True),
        cut_checkpoint(base, theirs, rest=False),
        master,
        cuts,
    )


def rest_hash(checkpoint: Checkpoint, name: str, shared: int) -> str | None:
    """The blake3 of a tensor's rows from ``shared`` on, as it lies in the file, whether the
    checkpoint is cut there or not. None where there are none."""
    from blake3 import blake3  # not for who reads a manifest only

    file = checkpoint.tensors[name].file
    entries = {entry.name: entry for entry in checkpoint.shards[file].tensors}
    rest = entries.get(rest_name(name, shared))
    if rest is None and shared < entries[name].shape[0]:
        rest = run_of(entries[name], shared, entries[name].shape[0])
    if rest is None:
        return None
    digest = blake3()
    for begin in range(rest.begin, rest.end, _COPY):
        buffer = bytearray(min(_COPY, rest.end - begin))
        checkpoint.read_into(file, begin, memoryview(buffer))
        digest.update(buffer)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Pairs:
    """The tables of a tuned model with those of its base that they belong to."""

    names: Mapping[str, str | None]
    tuned_rows: int
    base_rows: int

    @classmethod
    def of(cls, tuned: Checkpoint, base: Checkpoint) -> _Pairs | None:
        """None where they don't correspond, or may not be all."""
        ours, theirs = tables_of(shapes_of(tuned)), tables_of(shapes_of(base))
        if ours is None or theirs is None or ours.unknown or theirs.unknown:
            return None
        pairs = match_names(tuned.tensors, base.tensors).pairs
        names = {name: pairs.get(name) for name in tuned.tensors if name in ours.known}
        for name, other in names.items():
            entry = tuned.tensors[name].entry
            if DTYPE_BITS[entry.dtype] < 8 or (other is not None and other not in theirs.known):
                return None
        return cls(names, ours.rows, theirs.rows) if any(names.values()) else None

    def shared(self, tuned: Checkpoint, base: Checkpoint) -> int | None:
        """How many rows are compared; None where all are, or it can't be told."""
        if self.tuned_rows == self.base_rows and same_vocabulary(tuned.tree, base.tree):
            return None
        ours, theirs = vocabulary_of(tuned.tree), vocabulary_of(base.tree)
        if ours is None or not ours.covers(self.tuned_rows):
            return None
        if theirs is None or not theirs.covers(self.base_rows):
            return None
        shared = min(self.tuned_rows, self.base_rows)
        if _new_tokens_within(ours, theirs, shared):
            shared = theirs.size
        if shared == self.tuned_rows == self.base_rows:
            return None
        return None if moved(ours, theirs) else shared


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: placed.entry.shape for name, placed in checkpoint.tensors.items()}


def _new_tokens_within(ours: Vocabulary, theirs: Vocabulary, rows: int) -> bool:
    """Whether the tuned model has tokens of its own in rows that the base has no token for: they
    are new, whatever the base's bytes there may be."""
    return any(
        theirs.size <= row < rows for token, row in ours.rows.items() if token not in theirs.rows
    )


def moved(ours: Vocabulary, theirs: Vocabulary) -> str | None:
    """A token that stands for another row in each of the two."""
    other = (token for token, row in ours.rows.items() if theirs.rows.get(token, row) != row)
    return next(other, None)


# --- where rows go ---


@dataclass(frozen=True)
class Run:
    """``count`` rows, from ``at`` on, that are made of those from ``row`` on of another tensor."""

    at: int
    row: int
    count: int

    def within(self, first: int, last: int) -> Run | None:
        """What of it lies in the rows ``first`` to ``last``, counted from ``first``."""
        begin, end = max(self.at, first), min(self.at + self.count, last)
        if begin >= end:
            return None
        return Run(begin - first, self.row + begin - self.at, end - begin)


def runs_of(places: Mapping[int, int]) -> tuple[Run, ...]:
    """Rows as runs, in the order of the rows that they make: ``places`` gives of each such row the
    row that it is made of."""
    runs, first, count = [], 0, 0
    ordered = sorted(places)
    for at in ordered:
        if count and at == first + count and places[at] == places[first] + count:
            count += 1
            continue
        if count:
            runs.append(Run(first, places[first], count))
        first, count = at, 1
    if count:
        runs.append(Run(first, places[first], count))
    return tuple(runs)
