"""The plan for a target that is not the own base: Δ added in the target's layout and dtypes.

Each delta is matched with the target on its own; a tensor's step gets one term for each delta that
changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.configs import layers_of, quantised, tied
from hubdiff.errors import (
    CannotApply,
    NamesMismatch,
    NotPortable,
    ShapeMismatch,
    VocabularyMismatch,
)
from hubdiff.forecast import Look
from hubdiff.manifest import TensorRecord
from hubdiff.names import EMBEDDINGS, HEADS, Match, is_for_tokens, match_names, tables_of
from hubdiff.pair import FLOATS, Filters, check_shapes
from hubdiff.plan.alignment import NOTHING, Tokens, align
from hubdiff.plan.carried import carried_json
from hubdiff.plan.layout import Layout, Table, own_runs
from hubdiff.plan.side_files import plan_side_files
from hubdiff.plan.types import (
    PORTABLE_GROUPS,
    TRANSFER,
    MergePlan,
    Method,
    Term,
    Weighted,
)
from hubdiff.rows import shapes_of, whole_name
from hubdiff.safetensors_io import TensorEntry
from hubdiff.scales import Scales


def transfer_plan(
    deltas: Sequence[Weighted],
    target: Checkpoint,
    scale: Scales,
    filters: Filters,
    method: Method | None,
    reason: str,
    vocab: str | None,
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
    parts = [Transfer(item, target, scale, filters, vocab).contribution() for item in deltas]
    terms, added = _together(parts), _added_once(parts)
    _check_not_both(parts, added)
    layout = Layout(target, terms, added, _tables(parts, terms), method)
    weights, copies = layout.weights()
    side = plan_side_files(deltas, target, [part.tokens for part in parts])
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
        alignments=tuple(part.tokens.alignment for part in parts),
    )


@dataclass(frozen=True)
class Contribution:
    """What one delta does to the target: its terms by the name of the target's tensor, and those of
    the tensors that only its tuned model has by the name they get. ``own`` are those of rows that
    only the tuned model has, by the name of the target's tensor that gets them; ``tokens`` says
    where its rows go. ``known`` are the names that the tuned model has a counterpart of; None where
    that is not known. ``look`` is how the target is compared with its base; None where that can't
    be."""

    item: Weighted
    terms: dict[str, Term]
    added: dict[str, Term]
    aligned: frozenset[str]
    own: dict[str, Term]
    tokens: Tokens
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


def _tables(
    parts: Sequence[Contribution], terms: Mapping[str, tuple[Term, ...]]
) -> dict[str, Table]:
    """The vocabulary tensors that are made row by row, by the names of the target's."""
    tables: dict[str, Table] = {}
    brought = [
        part for part in parts if part.tokens.alignment and part.tokens.alignment.changes_tokens
    ]
    if len(brought) > 1:
        raise CannotApply(
            f"{brought[0].item.name} and {brought[1].item.name} both change the target's tokens",
            next_step="Apply one of the two first, then the other to the result.",
        )
    for part in brought:
        _check_not_replaced(part, [other for other in parts if other is not part])
    for part in parts:
        alignment = part.tokens.alignment
        if alignment is None:
            continue
        for name in part.aligned:
            table = tables.setdefault(name, Table(alignment.target_rows))
            table.rows = max(table.rows, alignment.rows if name in part.own else table.rows)
            if name in part.own and alignment.taken:
                table.own = (part.own[name], own_runs(part.own[name], alignment))
            if part.terms.get(name) in terms.get(name, ()):
                table.terms[part.terms[name]] = alignment
    return tables


def _check_not_replaced(part: Contribution, others: Sequence[Contribution]) -> None:
    """A row that one delta replaces and another changes has no meaning, as with whole tensors."""
    assert part.tokens.alignment is not None
    for other in others:
        there = other.tokens.alignment
        for token, row in part.tokens.alignment.replaced.items():
            acts = there is None or any(run.within(row, row + 1) for run in there.changed)
            if acts and not set(part.own).isdisjoint(other.terms):
                raise CannotApply(
                    f"{part.item.name} brings a row of its own for {token!r} and {other.item.name} "
                    "changes the target's",
                    next_step="Apply one of the two first, then the other to the result.",
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
    vocab: str | None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.delta = self.item.delta
        self._acting, self._tokens = NOTHING, Tokens(None)
        self._tied: set[str] = set()

    def contribution(self) -> Contribution:
        if not any(self.filters.takes(record.name) for record in self.delta.manifest.tensors):
            raise CannotApply(
                f"no tensor of {self.delta.tree.pin} passes --include/--exclude",
                next_step="Check the globs against the tensor names (hubdiff inspect --json).",
            )
        match = self._match()
        self._check_depth()
        self._acting, self._tokens = align(
            self.delta,
            self.target,
            match.pairs,
            self.filters.takes,
            self.vocab,
        )
        alignment = self._tokens.alignment
        if self._acting and self._tokens.doubt and self._tokens.read:
            self.notes.append(f"rows of the vocabulary stay where they are: {self._tokens.doubt}")
        own = self._own()
        terms = self._terms(match, own)
        added = self._added(match)
        partners = self._acting.partners.values() if alignment else ()
        aligned = frozenset({*partners, *own, *self._tied})
        self._check_all_grow(aligned)
        complete = self.delta.manifest.complete
        known = frozenset({*match.pairs.values(), *added}) if complete else None
        acts = {term.record.name: name for name, term in reversed(terms.items()) if term.factor}
        rows = alignment.changed if alignment is not None else ()
        names = frozenset(self._acting.records) if alignment else frozenset()
        look = Look.of(self.delta, self.target, acts, names, rows)
        return Contribution(
            self.item, terms, added, aligned, own, self._tokens, known, tuple(self.notes), look
        )

    def _check_all_grow(self, aligned: frozenset[str]) -> None:
        """Where rows are added, every tensor of the vocabulary must get them."""
        alignment = self._tokens.alignment
        if alignment is None or alignment.rows == alignment.target_rows:
            return
        tables = tables_of(shapes_of(self.target))
        for name in tables.known if tables is not None else ():
            if name not in aligned:
                raise VocabularyMismatch(
                    f"the tuned model's tokens need {alignment.rows:,} rows, and {name} of "
                    f"{self.target.tree.pin} would keep {alignment.target_rows:,}: the delta has "
                    "nothing for it",
                    next_step="Leave the whole vocabulary out with --exclude, or resize the "
                    "target first (model.resize_token_embeddings).",
                )

    def _own(self) -> dict[str, Term]:
        """The rows that only the tuned model has, for the target's tensors that get them."""
        pairs = self._acting.partners
        for name, record in self._acting.own.items():
            self._check_own(name, record, self.target.tensors[pairs[name]])
        return {pairs[name]: self._term(record) for name, record in self._acting.own.items()}

    def _check_own(self, name: str, record: TensorRecord, placed: Placed) -> None:
        """Rows are converted to the target's dtype, where both are floats."""
        shape = (*placed.entry.shape[:1], *record.shape[1:])
        check_shapes(
            name,
            Placed("", TensorEntry(name, record.dtype, shape, 0, 0)),
            placed,
            "delta",
            "target",
        )
        if record.dtype != placed.entry.dtype and not (
            record.dtype in FLOATS and placed.entry.dtype in FLOATS | {"F64"}
        ):
            raise NotPortable(
                f"{record.name} is {record.dtype}, and {placed.entry.name} is "
                f"{placed.entry.dtype} in {self.target.tree.pin}: its rows can't be put there",
                next_step="Give an unquantised target, or leave the tensor out with --exclude.",
            )

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

    def _check_depth(self) -> None:
        """Layers that only one side has would be left without their Δ, and those after them get
        that of others."""
        ours = layers_of(carried_json(self.delta, "base/config.json"))
        theirs = layers_of(self.target.config)
        if ours is not None and theirs is not None and ours != theirs:
            raise ShapeMismatch(
                f"{self.target.tree.pin} has {theirs:,} layers, the base of the delta, "
                f"{self.delta.manifest.base.name}, has {ours:,}",
                next_step="A delta only makes sense between models of one architecture and size; "
                "check the refs.",
            )

    def _terms(self, match: Match, own: dict[str, Term]) -> dict[str, Term]:
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
        self._follow_ties(match, terms, own)
        return terms

    def _term(self, record: TensorRecord) -> Term:
        scale = self.scale.of_tensor(record.name)
        return Term(self.delta, record, PORTABLE_GROUPS, scale, self.item.weight)

    def _check_tensor(self, record: TensorRecord, placed: Placed) -> None:
        shape = record.shape
        if self._is_aligned(record):  # its rows go where they belong
            shape = (*placed.entry.shape[:1], *shape[1:])
        theirs = Placed("", TensorEntry(record.name, record.dtype, shape, 0, 0))
        check_shapes(record.name, theirs, placed, "delta", "target")
        if record.portable and placed.entry.dtype not in FLOATS | {"F64"}:
            raise NotPortable(
                f"{placed.entry.name} is {placed.entry.dtype} in {self.target.tree.pin}; Δ can't "
                "be added to it",
                next_step="Give an unquantised target, or leave the tensor out with --exclude.",
            )

    def _is_aligned(self, record: TensorRecord) -> bool:
        return self._tokens.alignment is not None and record.name in self._acting.partners

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

    def _follow_ties(self, match: Match, terms: dict[str, Term], own: dict[str, Term]) -> None:
        """A target that stores its tied head as a second copy keeps both copies equal."""
        paired = set(match.pairs.values())
        for head in HEADS:
            placed = self.target.tensors.get(head)
            if placed is None or head in paired:
                continue
            embedding = next(
                (
                    name
                    for name in (*terms, *own)
                    if name.endswith(EMBEDDINGS)
                    and self.target.tensors[name].entry.shape == placed.entry.shape
                ),
                None,
            )
            if embedding is None:
                continue
            if tied(self.target.config):
                if embedding in terms:
                    terms[head] = terms[embedding]
                if embedding in own:
                    own[head] = own[embedding]
                if self._tokens.alignment is not None:
                    self._tied.add(head)
                self.notes.append(f"{head} repeats the tied embedding: it gets the same Δ")
            else:
                self.notes.append(f"{head} stays the target's: the delta has a tied head")

    def _added(self, match: Match) -> dict[str, Term]:
        """Tensors that only the tuned model has, under the names they get in the result."""
        added, rename = {}, match.rename
        for record in self.delta.manifest.tensors:
            if not record.added or not self.filters.takes(record.name):
                continue
            if self._is_rest(record, match):
                continue
            own = self.delta.manifest.rename
            name = own.apply(record.name) if own else record.name
            name = rename.apply(name) if rename else name
            taken = name in self.target.tensors
            alias = record.name in self.delta.manifest.aliases
            if alias and (taken or tied(self.target.config) is not False):
                self.notes.append(f"{record.name} repeats the tied embedding: not added")
                continue
            self._check_rows(record)
            self.notes.append(
                f"{name} {'replaces the target’s' if taken else 'is added'}: only the tuned model "
                "has it"
            )
            added[name] = self._term(record)
        return added

    def _is_rest(self, record: TensorRecord, match: Match) -> bool:
        """Whether it is the rows of a tensor behind those that the base has too: they go where that
        tensor goes, and nowhere where it is a repeated head."""
        whole = whole_name(record.name)
        if whole == record.name or whole not in self.delta.manifest.rows:
            return False
        if whole not in match.pairs and whole not in self.delta.manifest.aliases:
            raise NamesMismatch(
                f"the tuned model has rows of its own in {whole}, which {self.target.tree.pin} "
                "does not have",
                next_step="Leave it out with --exclude if the result can do without it.",
            )
        return True

    def _check_rows(self, record: TensorRecord) -> None:
        """An added embedding or head has the tuned model's rows: the result must have them too."""
        alignment = self._tokens.alignment
        cut = record.name in self.delta.manifest.rows
        moves = alignment is not None and not alignment.in_place
        if cut or (moves and is_for_tokens(record.name)):
            raise VocabularyMismatch(
                f"{record.name} is only in the tuned model, with rows for its own tokens, which "
                "are not those of the result",
                next_step="Leave it out with --exclude.",
            )
