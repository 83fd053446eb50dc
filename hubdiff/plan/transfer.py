"""The plan for a target that is not the own base: Δ added in the target's layout and dtypes.

Each delta is matched with the target on its own; a tensor's step gets one term for each delta that
changes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from hubdiff.checkpoint import INDEX, Checkpoint, Placed
from hubdiff.configs import quantised, tied
from hubdiff.errors import CannotApply, NamesMismatch, NotPortable
from hubdiff.forecast import Look
from hubdiff.manifest import TensorRecord
from hubdiff.names import Match, Rename, match_names
from hubdiff.pair import EMBEDDINGS, FLOATS, HEADS, Filters, check_shapes
from hubdiff.plan.side_files import plan_side_files
from hubdiff.plan.types import (
    PORTABLE_GROUPS,
    TRANSFER,
    MergePlan,
    Method,
    Step,
    Term,
    Weighted,
    WeightsFile,
    WholeFile,
)
from hubdiff.safetensors_io import (
    Header,
    TensorEntry,
    build_header,
    parse_header,
    tensor_bytes,
)
from hubdiff.scales import Scales
from hubdiff.stream import unit_bytes


def transfer_plan(
    deltas: Sequence[Weighted],
    target: Checkpoint,
    scale: Scales,
    filters: Filters,
    method: Method | None,
    reason: str,
) -> MergePlan:
    """``deltas`` on a target that is not the own base, or not to be rebuilt as ``reason`` says."""
    quantisation = quantised(target.config)
    if quantisation:
        raise NotPortable(
            f"the weights of {target.tree.pin} are quantised ({quantisation}); Δ can't be added "
            "to them",
            next_step="Give the unquantised version of that model.",
        )
    scale.check([record.name for item in deltas for record in item.delta.manifest.tensors])
    parts = [Transfer(item, target, scale, filters).contribution() for item in deltas]
    terms, added = _together(parts), _added_once(parts)
    _check_not_both(parts, added)
    layout = _Layout(target, terms, added, method)
    weights, copies = layout.weights()
    side = plan_side_files(deltas, target)
    return MergePlan(
        TRANSFER,
        reason,
        scale,
        tuple(deltas),
        target,
        tuple(weights),
        (*copies, *layout.index(), *side.files),
        (*_notes(parts), *side.notes),
        left_out=side.left_out,
        added=tuple(added),
        kept=_kept(parts, target),
        method=method,
        looks=tuple(part.look for part in parts if part.look),
    )


@dataclass(frozen=True)
class Contribution:
    """What one delta does to the target: its terms by the name of the target's tensor, and those of
    the tensors that only its tuned model has by the name they get. ``known`` are the names that the
    tuned model has a counterpart of; None where that is not known. ``look`` is how the target is
    compared with its base; None where that can't be."""

    item: Weighted
    terms: dict[str, Term]
    added: dict[str, Term]
    known: frozenset[str] | None
    notes: tuple[str, ...]
    look: Look | None


def _together(parts: Sequence[Contribution]) -> dict[str, tuple[Term, ...]]:
    """The terms of every tensor, in the order of the deltas. A term times 0 is none: it is not even
    read, and has no say in an election of signs."""
    found: dict[str, tuple[Term, ...]] = {}
    for part in parts:
        for name, term in part.terms.items():
            if term.factor != 0:
                found[name] = (*found.get(name, ()), term)
    return found


def _added_once(parts: Sequence[Contribution]) -> dict[str, Term]:
    """Every added tensor; one that several deltas add must be the same tensor in all of them."""
    added: dict[str, tuple[Weighted, Term]] = {}
    for part in parts:
        for name, term in part.added.items():
            first, other = added.setdefault(name, (part.item, term))
            one, two = other.record, term.record
            if (one.dtype, one.shape, one.tuned) != (two.dtype, two.shape, two.tuned):
                raise CannotApply(
                    f"{first.name} and {part.item.name} both add {name}, and not the same",
                    next_step="Leave it out with --exclude, or apply one of the two first.",
                )
    return {name: term for name, (_, term) in added.items()}


def _check_not_both(parts: Sequence[Contribution], added: dict[str, Term]) -> None:
    """A tensor that one delta replaces and another changes has no meaning."""
    for part in parts:
        for name in part.terms:
            if name in added:
                owner = next(other for other in parts if name in other.added)
                raise CannotApply(
                    f"{owner.item.name} brings a {name} of its own and {part.item.name} changes "
                    "the target's",
                    next_step="Leave it out with --exclude, or apply one of the two first.",
                )


def _notes(parts: Sequence[Contribution]) -> list[str]:
    if len(parts) == 1:
        return list(parts[0].notes)
    return [f"{part.item.name}: {note}" for part in parts for note in part.notes]


def _kept(parts: Sequence[Contribution], target: Checkpoint) -> tuple[str, ...]:
    """The target's tensors that no tuned model has a counterpart of."""
    known: set[str] = set()
    for part in parts:
        if part.known is None:
            return ()
        known |= part.known
    return tuple(name for name in target.tensors if name not in known)


@dataclass
class Transfer:
    """One delta on a target that is not the own base, in the making."""

    item: Weighted
    target: Checkpoint
    scale: Scales
    filters: Filters
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.delta = self.item.delta

    def contribution(self) -> Contribution:
        if not any(self.filters.takes(record.name) for record in self.delta.manifest.tensors):
            raise CannotApply(
                f"no tensor of {self.delta.tree.pin} passes --include/--exclude",
                next_step="Check the globs against the tensor names (hubdiff inspect --json).",
            )
        match = self._match()
        terms = self._terms(match)
        added = self._added(match.rename)
        complete = self.delta.manifest.complete
        known = frozenset({*match.pairs.values(), *added}) if complete else None
        acts = {term.record.name: name for name, term in reversed(terms.items()) if term.factor}
        look = Look.of(self.delta, self.target, acts)
        return Contribution(self.item, terms, added, known, tuple(self.notes), look)

    def _match(self) -> Match:
        """Target names for the names of the base."""
        names = [record.name for record in self.delta.manifest.tensors if not record.added]
        match = match_names(names, self.target.tensors)
        if 2 * len(match.pairs) < min(len(names), len(self.target.tensors)):
            raise NamesMismatch(
                f"only {len(match.pairs)} of the delta's {len(names)} tensors have a partner in "
                f"{self.target.tree.pin} (for example {next(iter(names), '')!r} against "
                f"{next(iter(self.target.tensors), '')!r})",
                next_step="The target must be of the family of "
                f"{self.delta.manifest.base.name}; check --to.",
            )
        if match.rename:
            self.notes.append(
                f"names differ by a prefix: {match.rename.left or '(none)'} in the delta is "
                f"{match.rename.right or '(none)'} in the target"
            )
        return match

    def _terms(self, match: Match) -> dict[str, Term]:
        """What is added to each of the target's tensors that the delta touches."""
        terms = {}
        for record in self.delta.manifest.tensors:
            if record.added or record.unchanged or not self.filters.takes(record.name):
                continue
            name = match.pairs.get(record.name)
            if name is None:
                self._without_partner(record)
                continue
            placed = self.target.tensors[name]
            self._check_tensor(record, placed)
            if record.portable:
                terms[name] = self._term(record)
            else:
                self.notes.append(
                    f"{name} stays the target's: {record.dtype} is not added, only restored"
                )
        self._follow_ties(match, terms)
        return terms

    def _term(self, record: TensorRecord) -> Term:
        scale = self.scale.of_tensor(record.name)
        return Term(self.delta, record, PORTABLE_GROUPS, scale, self.item.weight)

    def _check_tensor(self, record: TensorRecord, placed: Placed) -> None:
        theirs = Placed("", TensorEntry(record.name, record.dtype, record.shape, 0, 0))
        check_shapes(record.name, theirs, placed, "delta", "target")
        if record.portable and placed.entry.dtype not in FLOATS | {"F64"}:
            raise NotPortable(
                f"{placed.entry.name} is {placed.entry.dtype} in {self.target.tree.pin}; Δ can't "
                "be added to it",
                next_step="Give an unquantised target, or leave the tensor out with --exclude.",
            )

    def _without_partner(self, record: TensorRecord) -> None:
        if record.name in self.delta.manifest.aliases:
            self.notes.append(
                f"{record.name} is one tensor with {self.delta.manifest.aliases[record.name]}, "
                "which the target ties: its Δ is added once"
            )
            return
        if not record.portable:
            return
        raise NamesMismatch(
            f"the delta changes {record.name}, which {self.target.tree.pin} does not have",
            next_step="Leave it out with --exclude if the result can do without it"
            + (", or untie the target's output head first." if record.name in HEADS else "."),
        )

    def _follow_ties(self, match: Match, terms: dict[str, Term]) -> None:
        """A target that stores its tied head as a second copy keeps both copies equal."""
        paired = set(match.pairs.values())
        for head in HEADS:
            placed = self.target.tensors.get(head)
            if placed is None or head in paired:
                continue
            embedding = next(
                (
                    term
                    for name, term in terms.items()
                    if name.endswith(EMBEDDINGS) and term.record.shape == placed.entry.shape
                ),
                None,
            )
            if embedding is None:
                continue
            if tied(self.target.config):
                terms[head] = embedding
                self.notes.append(f"{head} repeats the tied embedding: it gets the same Δ")
            else:
                self.notes.append(f"{head} stays the target's: the delta has a tied head")

    def _added(self, rename: Rename | None) -> dict[str, Term]:
        """Tensors that only the tuned model has, under the names they get in the result."""
        added = {}
        for record in self.delta.manifest.tensors:
            if not record.added or not self.filters.takes(record.name):
                continue
            own = self.delta.manifest.rename
            name = own.apply(record.name) if own else record.name
            name = rename.apply(name) if rename else name
            taken = name in self.target.tensors
            alias = record.name in self.delta.manifest.aliases
            if alias and (taken or tied(self.target.config) is not False):
                self.notes.append(f"{record.name} repeats the tied embedding: not added")
                continue
            self.notes.append(
                f"{name} {'replaces the target’s' if taken else 'is added'}: only the tuned model "
                "has it"
            )
            added[name] = self._term(record)
        return added


@dataclass(frozen=True)
class _Layout:
    """The files of the result: the target's, with the ``terms`` of its tensors and what is
    ``added``."""

    target: Checkpoint
    terms: dict[str, tuple[Term, ...]]
    added: dict[str, Term]
    method: Method | None

    def weights(self) -> tuple[list[WeightsFile], list[WholeFile]]:
        """The result's shards: those with work to do, and those the target has already."""
        weights: list[WeightsFile] = []
        copies: list[WholeFile] = []
        for file, header in self.target.shards.items():
            here = {n: t.record for n, t in self.added.items() if self._home(n) == file}
            if here:
                header = _with_added(header, here, file)
            elif not any(entry.name in self.terms for entry in header.tensors):
                info = self.target.tree.files()[file]
                copies.append(WholeFile(file, info.size, "target", file, info.sha256))
                continue
            steps = {entry.name: self._step(entry) for entry in header.tensors}
            weights.append(WeightsFile(file, header, steps))
        return weights, copies

    def _home(self, name: str) -> str:
        """The file that a tensor of the result lies in: an added one goes to the last."""
        placed = self.target.tensors.get(name)
        return placed.file if placed else next(reversed(self.target.shards))

    def _step(self, entry: TensorEntry) -> Step:
        if entry.name in self.added:
            return Step(entry, None, (self.added[entry.name],))
        terms = self.terms.get(entry.name, ())
        plain = self.method is None or (self.method.name == "linear" and len(terms) < 2)
        return Step(entry, self.target.tensors[entry.name], terms, None if plain else self.method)

    def index(self) -> list[WholeFile]:
        """The target's index, if it has one, with what was added."""
        data = self.target.index
        if data is None:
            return []
        if self.added:
            index = json.loads(data)
            index["weight_map"].update({name: self._home(name) for name in self.added})
            sizes = {name: p.entry.nbytes for name, p in self.target.tensors.items()}
            records = {name: term.record for name, term in self.added.items()}
            sizes |= {name: tensor_bytes(r.dtype, r.shape) for name, r in records.items()}
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": sum(sizes.values())}
            data = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        return [WholeFile(INDEX, len(data), "made", data=data)]


def _with_added(header: Header, added: dict[str, TensorRecord], where: str) -> Header:
    """The header of a file with tensors added or replaced. Wider dtypes come first, so that every
    tensor stays aligned to its elements, as the reference implementation lays files out."""
    tensors = {e.name: (e.name, e.dtype, e.shape, e.nbytes) for e in header.tensors}
    for name, record in added.items():
        nbytes = tensor_bytes(record.dtype, record.shape)
        tensors[name] = (name, record.dtype, record.shape, nbytes)
    ordered = sorted(tensors.values(), key=lambda item: -unit_bytes(item[1]))
    raw = build_header(ordered, header.metadata)
    return parse_header(raw, len(raw) + sum(item[3] for item in ordered), where)
