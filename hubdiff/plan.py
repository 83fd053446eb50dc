"""The merge plan: every file of the result, where its bytes come from, and what it will cost.

Made from headers, manifest and listings alone; the plan that ``--dry-run`` prints is the object
that ``merge`` runs. Two cases: on its own base a delta rebuilds the tuned repo file by file; on any
other target Δ is added to the target's tensors in the target's own layout and dtypes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hubdiff import sidecars
from hubdiff.checkpoint import INDEX, SINGLE, Checkpoint, Placed, parse_json, read_json
from hubdiff.configs import CONFIG_RULES, GENERATION_RULES, json_text, merge_json, quantised, tied
from hubdiff.delta import Delta
from hubdiff.errors import BadManifest, NamesMismatch, NotPortable
from hubdiff.hashing import check_hash, hash_bytes
from hubdiff.manifest import GROUPS, FileRecord, TensorRecord
from hubdiff.names import Match, Rename, match_names
from hubdiff.pair import EMBEDDINGS, FLOATS, HEADS, Filters, check_shapes
from hubdiff.recognise import Verdict, recognise
from hubdiff.safetensors_io import (
    Header,
    TensorEntry,
    build_header,
    parse_header,
    tensor_bytes,
)
from hubdiff.stream import BLOCK_BYTES, unit_bytes, workers_for

OWN_BASE, TRANSFER = "own base", "transfer"
PORTABLE_GROUPS = ("delta", "tail")
CARD = "README.md"


@dataclass(frozen=True)
class Step:
    """How one tensor of a result comes about: ``source`` (the target's tensor, None when all of it
    comes from the delta) plus what ``record`` holds in ``groups``. No record: a plain copy."""

    entry: TensorEntry
    source: Placed | None
    record: TensorRecord | None = None
    groups: tuple[str, ...] = ()

    @property
    def copies(self) -> bool:
        return self.record is None or not any(self.record.part(group) for group in self.groups)

    @property
    def delta_bytes(self) -> int:
        if self.record is None:
            return 0
        return sum(part.bytes for part in self.record.parts if part.group in self.groups)


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file of the result that is written tensor by tensor. ``sha256`` is what it must
    come to, where that is known beforehand."""

    path: str
    header: Header
    steps: dict[str, Step]
    sha256: str | None = None


@dataclass(frozen=True)
class WholeFile:
    """A file of the result that is taken as it is: from ``origin`` (``"target"`` or ``"delta"``) at
    ``source``, or ``data`` made here. ``note`` says what a reader should know of the choice."""

    path: str
    size: int
    origin: str
    source: str | None = None
    sha256: str | None = None
    data: bytes | None = None
    note: str | None = None


@dataclass(frozen=True)
class MergePlan:
    case: str
    reason: str
    scale: float
    delta: Delta
    target: Checkpoint
    weights: tuple[WeightsFile, ...]
    files: tuple[WholeFile, ...]
    notes: tuple[str, ...]
    proved: bool = True
    left_out: tuple[sidecars.LeftOut, ...] = ()
    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def reads(self) -> dict[str, int]:
        """Bytes of weights and side files to read, by source. Headers and manifest, which planning
        itself reads, are not among them."""
        target = sum(s.source.entry.nbytes for s in self._steps() if s.source)
        delta = sum(step.delta_bytes for step in self._steps())
        for file in self.files:
            target += file.size if file.origin == "target" else 0
            delta += file.size if file.origin == "delta" else 0
        return {"target": target, "delta": delta}

    @property
    def network(self) -> int:
        """How many of those bytes cost traffic."""
        total = sum(
            step.source.entry.nbytes
            for step in self._steps()
            if step.source and self.target.tree.is_remote(step.source.file)
        )
        for step in self._steps():
            for group in step.groups:
                placed = step.record and self.delta.placed(step.record, group)
                if placed and self.delta.tree.is_remote(placed.placed.file):
                    total += placed.part.bytes
        trees = {"target": self.target.tree, "delta": self.delta.tree}
        for file in self.files:
            if file.source and trees[file.origin].is_remote(file.source):
                total += file.size
        return total

    @property
    def writes(self) -> int:
        return sum(f.header.file_size for f in self.weights) + sum(f.size for f in self.files)

    @property
    def remote(self) -> bool:
        return any(self.target.tree.is_remote(file) for file in self.target.shards)

    @property
    def peak_memory(self) -> int:
        """An upper estimate in bytes: torch and Python, and the blocks in flight, each with what is
        read, decoded and written."""
        runtime, per_block = 300 << 20, 5 * BLOCK_BYTES
        return runtime + (workers_for(remote=self.remote) + 2) * per_block

    def _steps(self) -> Iterator[Step]:
        for file in self.weights:
            yield from file.steps.values()

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "reason": self.reason,
            "scale": self.scale,
            "delta": str(self.delta.tree.pin),
            "target": str(self.target.tree.pin),
            "read": {**self.reads, "network": self.network},
            "write": self.writes,
            "peak_memory": self.peak_memory,
            "files": [_weights_json(file) for file in self.weights]
            + [_whole_json(file) for file in self.files],
            "added": list(self.added),
            "kept": list(self.kept),
            "left_out": [vars(item) for item in self.left_out],
            "notes": list(self.notes),
        }


def _weights_json(file: WeightsFile) -> dict[str, Any]:
    steps = file.steps.values()
    return {
        "path": file.path,
        "bytes": file.header.file_size,
        "action": "merge",
        "tensors": len(steps),
        "changed": sum(not step.copies for step in steps),
    }


def _whole_json(file: WholeFile) -> dict[str, Any]:
    action = {"target": "copy from target", "delta": "copy from delta"}.get(file.origin, "write")
    note = {"note": file.note} if file.note else {}
    return {"path": file.path, "bytes": file.size, "action": action, **note}


def make_plan(
    delta: Delta,
    target: Checkpoint,
    *,
    scale: float = 1.0,
    filters: Filters | None = None,
    as_transfer: bool = False,
) -> MergePlan:
    """Plan ``delta`` onto ``target``. ``as_transfer`` rules the own-base case out. Raises
    ``CannotApply`` and its kin when the two don't go together."""
    filters = filters or Filters()
    verdict = _verdict(delta, target, scale, filters, as_transfer)
    if verdict.own_base:
        return _own_base_plan(delta, target, verdict)
    if delta.manifest.not_portable_reason:
        raise NotPortable(
            f"{delta.tree.pin} can't be added to another base: "
            f"{delta.manifest.not_portable_reason} (and {target.tree.pin} is not its own base: "
            f"{verdict.reason})",
            next_step=f"Apply it to its own base, {delta.manifest.base.name}; or make a delta from "
            "unquantised weights.",
        )
    return _Transfer(delta, target, scale, filters, verdict).plan()


def _verdict(
    delta: Delta, target: Checkpoint, scale: float, filters: Filters, as_transfer: bool
) -> Verdict:
    if as_transfer:
        return Verdict(False, True, "a tensor differs from the base's")
    if scale != 1.0:
        return Verdict(False, True, f"the scale is {scale:g}")
    if filters:
        return Verdict(False, True, "only some tensors are taken")
    if delta.manifest.partial:
        return Verdict(False, True, "the delta holds only some of the tensors")
    return recognise(delta, target)


# --- own base -----------------------------------------------------------------------------------


def _own_base_plan(delta: Delta, target: Checkpoint, verdict: Verdict) -> MergePlan:
    by_tuned_name = {record.tuned_name: record for record in delta.manifest.tensors}
    same = {info.sha256: path for path, info in target.tree.files().items() if info.sha256}
    weights: list[WeightsFile] = []
    files: list[WholeFile] = []
    for file in delta.manifest.tuned_files:
        if file.source == "weights" and file.sha256 not in same:
            header = parse_header(file.header or b"", file.size, file.path)
            steps = {e.name: _rebuild(delta, target, by_tuned_name, e) for e in header.tensors}
            weights.append(WeightsFile(file.path, header, steps, file.sha256))
        elif file.source == "delta":
            source = f"tuned/{file.path}"
            _require(delta, source)
            files.append(WholeFile(file.path, file.size, "delta", source, file.sha256))
        else:
            source = same.get(file.sha256, file.path)
            files.append(WholeFile(file.path, file.size, "target", source, file.sha256))
    return MergePlan(
        OWN_BASE,
        f"the target is the delta's own base: {verdict.reason}",
        1.0,
        delta,
        target,
        tuple(weights),
        tuple(files),
        (),
        verdict.proved,
        tuple(sidecars.LeftOut(item.path, item.reason) for item in delta.manifest.not_carried),
    )


def _rebuild(
    delta: Delta, target: Checkpoint, records: dict[str, TensorRecord], entry: TensorEntry
) -> Step:
    record = records.get(entry.name)
    if record is None or (record.dtype, record.shape) != (entry.dtype, entry.shape):
        raise BadManifest(
            f"{delta.tree.pin}/hubdiff.json: tensor {entry.name!r} stands in a header but not, or "
            "otherwise, among the tensors",
            next_step="The delta is damaged; ask its author to push it again.",
        )
    source = None if record.added else target.tensors[record.name]
    return Step(entry, source, record, GROUPS)


def _require(delta: Delta, path: str) -> None:
    if path not in delta.tree.files():
        raise BadManifest(
            f"{delta.tree.pin}/{path} is missing, the manifest lists it",
            next_step="The delta was not uploaded whole; ask its author to push it again.",
        )


# --- another target -----------------------------------------------------------------------------


@dataclass
class _Transfer:
    """The plan for a target that is not the own base, in the making."""

    delta: Delta
    target: Checkpoint
    scale: float
    filters: Filters
    verdict: Verdict
    notes: list[str] = field(default_factory=list)
    left_out: list[sidecars.LeftOut] = field(default_factory=list)

    def plan(self) -> MergePlan:
        method = quantised(self.target.config)
        if method:
            raise NotPortable(
                f"the weights of {self.target.tree.pin} are quantised ({method}); Δ can't be added "
                "to them",
                next_step="Give the unquantised version of that model.",
            )
        match = self._match()
        steps = self._steps(match)
        added = self._added(match.rename)
        weights, copies = self._weights(steps, added)
        files = [*copies, *self._side_files(added)]
        return MergePlan(
            TRANSFER,
            f"the target is not the delta's own base: {self.verdict.reason}",
            self.scale,
            self.delta,
            self.target,
            tuple(weights),
            tuple(files),
            tuple(self.notes),
            left_out=tuple(self.left_out),
            added=tuple(added),
            kept=self._kept(match, added),
        )

    def _kept(self, match: Match, added: dict[str, TensorRecord]) -> tuple[str, ...]:
        """The target's tensors that the tuned model has no counterpart of."""
        if self.delta.manifest.partial:
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
                steps[name] = Step(placed.entry, placed, record, PORTABLE_GROUPS)
            else:
                self.notes.append(
                    f"{name} stays the target's: {record.dtype} is not added, only restored"
                )
        self._follow_ties(match, steps)
        return steps

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
                steps[head] = Step(placed.entry, placed, embedding.record, PORTABLE_GROUPS)
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
            if record.name in self.delta.manifest.aliases and tied(self.target.config) is not False:
                self.notes.append(f"{record.name} repeats the tied embedding: not added")
                continue
            taken = name in self.target.tensors
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
                result[entry.name] = Step(entry, None, added[entry.name], PORTABLE_GROUPS)
            elif entry.name in steps:
                step = steps[entry.name]
                result[entry.name] = Step(entry, step.source, step.record, step.groups)
            else:
                result[entry.name] = Step(entry, self.target.tensors[entry.name])
        return result

    # --- side files ---

    def _side_files(self, added: dict[str, TensorRecord]) -> list[WholeFile]:
        target = self.target.tree.files()
        files = [self._index(added)] if self.target.index is not None else []
        tuned = {f.path: f for f in self.delta.manifest.tuned_files if f.source != "weights"}
        base = {file.path: file for file in self.delta.manifest.base.side_files}
        plan = sidecars.result_sidecars(
            {path: file.sha256 for path, file in base.items()},
            {path: file.sha256 for path, file in tuned.items()},
            {path: self._content(path, tuned.get(path), base.get(path)) for path in target},
            weights=self.target.shards,
        )
        for side in plan.files:
            if side.source == "merged":
                files.append(self._merged(side.path))
            elif side.source == "tuned":
                source = f"tuned/{side.path}"
                _require(self.delta, source)
                record = tuned[side.path]
                files.append(
                    WholeFile(
                        side.path, record.size, "delta", source, record.sha256, note=side.note
                    )
                )
            else:
                info = target[side.path]
                files.append(
                    WholeFile(
                        side.path, info.size, "target", side.path, info.sha256, note=side.note
                    )
                )
        self.left_out.extend(item for item in plan.left_out if item.path != CARD)
        return files

    def _content(self, path: str, *others: FileRecord | None) -> str:
        """The sha256 of a target's file. One of a size that no other side has is not read to learn
        that it differs."""
        info = self.target.tree.files()[path]
        if info.sha256:
            return info.sha256
        if any(other is not None and other.size == info.size for other in others):
            return hash_bytes(self.target.tree.read_bytes(path))
        return f"{info.size} bytes of the target"

    def _merged(self, path: str) -> WholeFile:
        merged = merge_json(
            self._carried_json(f"base/{path}"),
            self._carried_json(f"tuned/{path}"),
            read_json(self.target.tree, path),
            CONFIG_RULES if path == "config.json" else GENERATION_RULES,
        )
        self.notes.extend(f"{path}: {note}" for note in merged.notes)
        data = json_text(merged.value).encode()
        return WholeFile(path, len(data), "made", data=data)

    def _carried_json(self, path: str) -> dict[str, Any]:
        """A config that the delta carries, checked; ``{}`` for one that its side never had."""
        record = next((f for f in self.delta.manifest.side_files if f.path == path), None)
        if record is None:
            return {}
        _require(self.delta, path)
        data, where = self.delta.tree.read_bytes(path), f"{self.delta.tree.pin}/{path}"
        check_hash(hash_bytes(data), record.sha256, where)
        return parse_json(data, where)

    def _index(self, added: dict[str, TensorRecord]) -> WholeFile:
        assert self.target.index is not None
        data = self.target.index
        if added:
            index = json.loads(data)
            last = next(reversed(self.target.shards))
            index["weight_map"].update({name: self._home(name, last) for name in added})
            sizes = {name: p.entry.nbytes for name, p in self.target.tensors.items()}
            sizes |= {name: tensor_bytes(r.dtype, r.shape) for name, r in added.items()}
            index.setdefault("metadata", {})["total_size"] = sum(sizes.values())
            data = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        return WholeFile(INDEX, len(data), "made", data=data)


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


__all__ = ["OWN_BASE", "SINGLE", "TRANSFER", "MergePlan", "Step", "make_plan"]
