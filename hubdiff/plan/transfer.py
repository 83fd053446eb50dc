"""The plan for a target that is not the own base: Δ added in the target's layout and dtypes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from hubdiff.checkpoint import INDEX, Checkpoint, Placed
from hubdiff.configs import quantised, tied
from hubdiff.delta import Delta
from hubdiff.errors import CannotApply, NamesMismatch, NotPortable
from hubdiff.manifest import TensorRecord
from hubdiff.names import Match, Rename, match_names
from hubdiff.pair import EMBEDDINGS, FLOATS, HEADS, Filters, check_shapes
from hubdiff.plan.recognise import Verdict
from hubdiff.plan.side_files import SideFiles
from hubdiff.plan.types import (
    PORTABLE_GROUPS,
    TRANSFER,
    MergePlan,
    Step,
    Term,
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
from hubdiff.stream import unit_bytes


@dataclass
class Transfer:
    """The plan for a target that is not the own base, in the making."""

    delta: Delta
    target: Checkpoint
    scale: float
    filters: Filters
    verdict: Verdict
    notes: list[str] = field(default_factory=list)

    def plan(self) -> MergePlan:
        method = quantised(self.target.config)
        if method:
            raise NotPortable(
                f"the weights of {self.target.tree.pin} are quantised ({method}); Δ can't be added "
                "to them",
                next_step="Give the unquantised version of that model.",
            )
        if not any(self.filters.takes(record.name) for record in self.delta.manifest.tensors):
            raise CannotApply(
                f"no tensor of {self.delta.tree.pin} passes --include/--exclude",
                next_step="Check the globs against the tensor names (hubdiff inspect --json).",
            )
        match = self._match()
        steps = self._steps(match)
        added = self._added(match.rename)
        weights, copies = self._weights(steps, added)
        side = SideFiles(self.delta, self.target)
        files = [*copies, *self._index(added), *side.plan()]
        self.notes.extend(side.notes)
        return MergePlan(
            TRANSFER,
            self._reason(),
            self.scale,
            self.delta,
            self.target,
            tuple(weights),
            tuple(files),
            tuple(self.notes),
            left_out=tuple(side.left_out),
            added=tuple(added),
            kept=self._kept(match, added),
        )

    def _reason(self) -> str:
        if self.verdict.reason == self.delta.manifest.no_rebuild_reason:
            return f"the delta has no own base to rebuild on: {self.verdict.reason}"
        return f"the target is not the delta's own base: {self.verdict.reason}"

    def _kept(self, match: Match, added: dict[str, TensorRecord]) -> tuple[str, ...]:
        """The target's tensors that the tuned model has no counterpart of."""
        if not self.delta.manifest.complete:
            return ()
        known = {*match.pairs.values(), *added}
        return tuple(name for name in self.target.tensors if name not in known)

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

    def _steps(self, match: Match) -> dict[str, Step]:
        """What happens to each of the target's tensors that the delta touches."""
        steps = {}
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
                steps[name] = Step(placed.entry, placed, (self._term(record),))
            else:
                self.notes.append(
                    f"{name} stays the target's: {record.dtype} is not added, only restored"
                )
        self._follow_ties(match, steps)
        return steps

    def _term(self, record: TensorRecord) -> Term:
        return Term(self.delta, record, PORTABLE_GROUPS, self.scale)

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

    def _follow_ties(self, match: Match, steps: dict[str, Step]) -> None:
        """A target that stores its tied head as a second copy keeps both copies equal."""
        paired = set(match.pairs.values())
        for head in HEADS:
            placed = self.target.tensors.get(head)
            if placed is None or head in paired:
                continue
            embedding = next(
                (
                    step
                    for name, step in steps.items()
                    if name.endswith(EMBEDDINGS) and step.entry.shape == placed.entry.shape
                ),
                None,
            )
            if embedding is None:
                continue
            if tied(self.target.config):
                steps[head] = Step(placed.entry, placed, embedding.terms)
                self.notes.append(f"{head} repeats the tied embedding: it gets the same Δ")
            else:
                self.notes.append(f"{head} stays the target's: the delta has a tied head")

    def _added(self, rename: Rename | None) -> dict[str, TensorRecord]:
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
            added[name] = record
        return added

    def _weights(
        self, steps: dict[str, Step], added: dict[str, TensorRecord]
    ) -> tuple[list[WeightsFile], list[WholeFile]]:
        """The result's shards: those with work to do, and those the target has already."""
        weights: list[WeightsFile] = []
        copies: list[WholeFile] = []
        last = next(reversed(self.target.shards))
        for file, header in self.target.shards.items():
            here = {n: r for n, r in added.items() if self._home(n, last) == file}
            if here:
                header = _with_added(header, here, file)
            elif not any(entry.name in steps for entry in header.tensors):
                info = self.target.tree.files()[file]
                copies.append(WholeFile(file, info.size, "target", file, info.sha256))
                continue
            weights.append(WeightsFile(file, header, self._file_steps(header, steps, here)))
        return weights, copies

    def _home(self, name: str, last: str) -> str:
        placed = self.target.tensors.get(name)
        return placed.file if placed else last

    def _file_steps(
        self, header: Header, steps: dict[str, Step], added: dict[str, TensorRecord]
    ) -> dict[str, Step]:
        result = {}
        for entry in header.tensors:
            if entry.name in added:
                result[entry.name] = Step(entry, None, (self._term(added[entry.name]),))
            elif entry.name in steps:
                step = steps[entry.name]
                result[entry.name] = Step(entry, step.source, step.terms)
            else:
                result[entry.name] = Step(entry, self.target.tensors[entry.name])
        return result

    def _index(self, added: dict[str, TensorRecord]) -> list[WholeFile]:
        """The target's index, if it has one, with what was added."""
        data = self.target.index
        if data is None:
            return []
        if added:
            index = json.loads(data)
            last = next(reversed(self.target.shards))
            index["weight_map"].update({name: self._home(name, last) for name in added})
            sizes = {name: p.entry.nbytes for name, p in self.target.tensors.items()}
            sizes |= {name: tensor_bytes(r.dtype, r.shape) for name, r in added.items()}
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
