"""The weights files of a transfer: the target's, with what is added to each tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hubdiff.checkpoint import INDEX, Checkpoint, Placed
from hubdiff.plan.alignment import Alignment
from hubdiff.plan.types import Method, Step, Term, WeightsFile, WholeFile
from hubdiff.rows import Run, run_of, runs_of
from hubdiff.safetensors_io import Header, TensorEntry, build_header, parse_header, tensor_bytes
from hubdiff.stream import unit_bytes


@dataclass
class Table:
    """A vocabulary tensor of the result, of so many ``rows``: terms of deltas whose rows are
    aligned with it, with their alignments, and the term of rows that are a tuned model's ``own``,
    with the runs that say which of its rows go where."""

    rows: int
    terms: dict[Term, Alignment] = field(default_factory=dict)
    own: tuple[Term, tuple[Run, ...]] | None = None

    def edges(self, target_rows: int) -> list[int]:
        """Where the tensor is cut, so that each run of rows comes about in one way."""
        at = {0, target_rows, self.rows}
        for alignment in self.terms.values():
            # So that Δ can be taken as it is stored, where it begins at the first row.
            if alignment.changed[:1] == (Run(0, 0, alignment.shared),):
                at.add(alignment.shared)
        if self.own is not None:
            for run in self.own[1]:
                at |= {run.at, run.at + run.count}
        return sorted(row for row in at if row <= self.rows)


@dataclass(frozen=True)
class Layout:
    """The files of the result: the target's, with the ``terms`` of its tensors, what is ``added``,
    and the vocabulary tensors that are made row by row."""

    target: Checkpoint
    terms: Mapping[str, tuple[Term, ...]]
    added: Mapping[str, Term]
    tables: Mapping[str, Table]
    method: Method | None

    def weights(self) -> tuple[list[WeightsFile], list[WholeFile]]:
        """The result's shards: those with work to do, and those the target has already."""
        weights: list[WeightsFile] = []
        copies: list[WholeFile] = []
        for file, header in self.target.shards.items():
            names = {entry.name for entry in header.tensors}
            here = {name for name in self.added if self._home(name) == file}
            if not here and names.isdisjoint({*self.terms, *self.tables}):
                info = self.target.tree.files()[file]
                copies.append(WholeFile(file, info.size, "target", file, info.sha256))
                continue
            changed = {name: self._shape(name) for name in (*here, *(names & set(self.tables)))}
            header = _with_tensors(header, changed, file)
            steps = {step.entry.name: step for e in header.tensors for step in self._steps(e)}
            tensors = tuple(step.entry for step in steps.values())
            weights.append(WeightsFile(file, replace(header, tensors=tensors), steps))
        return weights, copies

    def _home(self, name: str) -> str:
        """The file that a tensor of the result lies in: an added one goes to the last."""
        placed = self.target.tensors.get(name)
        return placed.file if placed else next(reversed(self.target.shards))

    def _shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor that is added, or may have other rows."""
        if name in self.added:
            record = self.added[name].record
            return record.dtype, record.shape
        entry = self.target.tensors[name].entry
        return entry.dtype, (self.tables[name].rows, *entry.shape[1:])

    def _steps(self, entry: TensorEntry) -> list[Step]:
        """How a tensor comes about, run of rows by run of rows where it is a table."""
        if entry.name in self.added:
            return [Step(entry, None, (self.added[entry.name],))]
        placed = self.target.tensors[entry.name]
        terms = self.terms.get(entry.name, ())
        if entry.name not in self.tables:
            return [self._step(entry, placed, terms)]
        table = self.tables[entry.name]
        edges = table.edges(placed.entry.shape[0])
        pairs = pairwise(edges)
        return [self._run(table, entry, placed, terms, *edge) for edge in pairs]

    def _step(self, entry: TensorEntry, source: Placed | None, terms: tuple[Term, ...]) -> Step:
        plain = self.method is None or (self.method.name == "linear" and len(terms) < 2)
        return Step(entry, source, terms, None if plain else self.method)

    def _run(
        self,
        table: Table,
        whole: TensorEntry,
        placed: Placed,
        terms: tuple[Term, ...],
        first: int,
        last: int,
    ) -> Step:
        """The rows ``first`` to ``last`` of a table."""
        entry, there = run_of(whole, first, last), placed.entry
        inside = last <= there.shape[0]
        source = Placed(placed.file, run_of(there, first, last)) if inside else None
        if table.own is not None:
            term, runs = table.own
            own = _laid(term, runs, first, last, same_dtype=term.record.dtype == entry.dtype)
            if own is not None:
                # The target's bytes are read though none is used: its file is hashed as a whole.
                return Step(entry, source, (own,))
        found = (
            _laid(term, table.terms[term].changed, first, last) if term in table.terms else term
            for term in terms
        )
        return self._step(entry, source, tuple(term for term in found if term is not None))

    def index(self) -> list[WholeFile]:
        """The target's index, if it has one, with what was added."""
        data = self.target.index
        if data is None:
            return []
        shapes = {name: self._shape(name) for name in (*self.added, *self.tables)}
        entries = {name: placed.entry for name, placed in self.target.tensors.items()}
        if any(
            name not in entries or entries[name].shape != shape
            for name, (_, shape) in shapes.items()
        ):
            index = json.loads(data)
            index["weight_map"].update({name: self._home(name) for name in self.added})
            sizes = {name: entry.nbytes for name, entry in entries.items()}
            sizes |= {name: tensor_bytes(*shape) for name, shape in shapes.items()}
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": sum(sizes.values())}
            data = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        return [WholeFile(INDEX, len(data), "made", data=data)]


def own_runs(term: Term, alignment: Alignment) -> tuple[Run, ...]:
    """Which rows of ``term``, that of a tuned model's own ones, go where. At scale 0 the target's
    rows stay, but what is behind them or for new tokens has to be something."""
    taken = [Run(run.at, run.row - alignment.shared, run.count) for run in alignment.taken]
    stay = set() if term.factor else set(alignment.replaced.values())
    if not stay:
        return tuple(taken)
    places = {run.at + i: run.row + i for run in taken for i in range(run.count)}
    return runs_of({at: row for at, row in places.items() if at not in stay})


def _laid(
    term: Term, runs: tuple[Run, ...], first: int, last: int, *, same_dtype: bool = True
) -> Term | None:
    """What a term has for the rows ``first`` to ``last``; None: nothing."""
    found = tuple(run for r in runs if (run := r.within(first, last)) is not None)
    if not found:
        return None
    stored = Run(0, 0, last - first)
    if found == (stored,) and term.record.shape[0] == last - first and same_dtype:
        return term
    return replace(term, laid=found)


def _with_tensors(
    header: Header, tensors: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> Header:
    """The header of a file with tensors, given by dtype and shape, added or replaced; the same
    header, where it has them as they are. Wider dtypes come first, so that every tensor stays
    aligned to its elements, as the reference implementation lays files out."""
    present = {e.name: (e.dtype, e.shape) for e in header.tensors}
    if all(present.get(name) == tensor for name, tensor in tensors.items()):
        return header
    listed = [
        (name, dtype, shape, tensor_bytes(dtype, shape))
        for name, (dtype, shape) in {**present, **tensors}.items()
    ]
    ordered = sorted(listed, key=lambda item: -unit_bytes(item[1]))
    raw = build_header(ordered, header.metadata)
    return parse_header(raw, len(raw) + sum(item[3] for item in ordered), where)
