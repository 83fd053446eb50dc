"""The side files of a transfer: what the tune changed is replayed on the target's.

Several deltas are replayed one after the other in the order given, each on what the ones before it
left: that is the three-way merge of one delta, with the result so far as its target. Where two
changed the same thing the later one wins, as a tuned model wins over a target, and a note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hubdiff.checkpoint import Checkpoint, parse_json, read_json
from hubdiff.configs import CONFIG_RULES, GENERATION_RULES, json_text, merge_json
from hubdiff.delta import Delta
from hubdiff.hashing import check_hash, hash_bytes
from hubdiff.manifest import FileRecord
from hubdiff.plan.types import CARD, Weighted, WholeFile, require_file
from hubdiff.sidecars import LeftOut, SideFile, result_sidecars

# Files that map tokens to rows, in the formats that carry the whole map.
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class SidePlan:
    """Every side file of a result, what a reader should know of them, and what is left out."""

    files: tuple[WholeFile, ...]
    notes: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def plan_side_files(deltas: Sequence[Weighted], target: Checkpoint) -> SidePlan:
    """Replay every delta on the target's side files."""
    listed = target.tree.files()
    files = {
        path: WholeFile(path, info.size, "target", path, info.sha256)
        for path, info in listed.items()
    }
    notes: list[str] = []
    left_out: dict[str, LeftOut] = {}
    for number, item in enumerate(deltas):
        name = item.name if len(deltas) > 1 else ""
        before = ", ".join(earlier.name for earlier in deltas[:number])
        replay = _Replay(item.delta, target, files, name, before)
        files = replay.run()
        notes += replay.notes
        left_out |= {gone.path: gone for gone in replay.left_out if gone.path not in left_out}
    missing = tuple(gone for path, gone in left_out.items() if path not in files)
    return SidePlan(tuple(files.values()), tuple(notes), missing)


@dataclass
class _Replay:
    """One delta on the files of the target, or of the result so far. Reads the small files it has
    to compare or merge; everything else is only planned. ``name``, where there are several, and
    those ``replayed`` before it are for the notes."""

    delta: Delta
    target: Checkpoint
    before: dict[str, WholeFile]
    name: str
    replayed: str
    notes: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def run(self) -> dict[str, WholeFile]:
        """Every side file from here on; ``notes`` and ``left_out`` are filled on the way."""
        tuned = {
            f.path: f for f in self.delta.manifest.tuned_files if f.source in ("delta", "base")
        }
        base = {file.path: file for file in self.delta.manifest.base.side_files}
        if self.delta.manifest.adapter is not None:
            # An adapter's repo is no whole model: what it lacks was not deleted.
            base = {path: file for path, file in base.items() if path in tuned}
        plan = result_sidecars(
            {path: file.sha256 for path, file in base.items()},
            {path: file.sha256 for path, file in tuned.items()},
            {
                path: self._content(file, tuned.get(path), base.get(path))
                for path, file in self.before.items()
            },
            weights=self.target.shards,
        )
        self._note_other_tokenizer(base)
        files: dict[str, WholeFile] = {}
        for side in plan.files:
            if side.source == "merged":
                files[side.path] = self._merged(self.before[side.path])
            elif side.source == "tuned":
                files[side.path] = self._tuned(side, tuned[side.path])
            else:
                files[side.path] = self._kept(side)
        self.left_out.extend(item for item in plan.left_out if item.path != CARD)
        return files

    @property
    def who(self) -> str:
        """The beginning of a note."""
        after = f" after {self.replayed}" if self.replayed else ""
        return f"{self.name}{after}: " if self.name else ""

    def _kept(self, side: SideFile) -> WholeFile:
        file = self.before[side.path]
        if not side.note:
            return file
        note = f"{self.who}{side.note}"
        return replace(file, note=f"{file.note}; {note}" if file.note else note)

    def _tuned(self, side: SideFile, record: FileRecord) -> WholeFile:
        source = f"tuned/{side.path}"
        require_file(self.delta, source)
        note = f"{self.who}{side.note}" if side.note else None
        earlier = self.before.get(side.path)
        if earlier is not None and earlier.origin != "target":
            note = f"{self.who}an earlier delta changed it too; this one's is used"
        return WholeFile(
            side.path, record.size, "delta", source, record.sha256, note=note, delta=self.delta
        )

    def _note_other_tokenizer(self, base: dict[str, FileRecord]) -> None:
        """Δ of an embedding is added row by row: say so where rows may stand for other tokens."""
        listed = self.target.tree.files()
        for path in TOKENIZERS:
            if path not in base or path not in listed:
                continue
            info = listed[path]
            file = WholeFile(path, info.size, "target", path, info.sha256)
            if self._content(file, base[path]) != base[path].sha256:
                whose = f"{self.name}: " if self.name else ""
                self.notes.append(
                    f"{whose}{path} of the target is not the base's: check that the same rows "
                    "stand for the same tokens in both"
                )

    def _content(self, file: WholeFile, *others: FileRecord | None) -> str:
        """The sha256 of a file so far. A target's of a size that no other side has is not read to
        learn that it differs."""
        if file.sha256:
            return file.sha256
        if file.data is not None:
            return hash_bytes(file.data)
        if any(other is not None and other.size == file.size for other in others):
            return hash_bytes(self.target.tree.read_bytes(file.path))
        return f"{file.size} bytes of the target"

    def _merged(self, file: WholeFile) -> WholeFile:
        path = file.path
        merged = merge_json(
            carried_json(self.delta, f"base/{path}"),
            carried_json(self.delta, f"tuned/{path}"),
            self._json_so_far(file),
            CONFIG_RULES if path == "config.json" else GENERATION_RULES,
        )
        self.notes.extend(f"{self.who}{path}: {note}" for note in merged.notes)
        data = json_text(merged.value).encode()
        return WholeFile(path, len(data), "made", data=data)

    def _json_so_far(self, file: WholeFile) -> dict[str, Any]:
        if file.data is not None:
            return parse_json(file.data, file.path)
        if file.delta is not None:
            return carried_json(file.delta, f"tuned/{file.path}")
        return read_json(self.target.tree, file.path)


def carried_json(delta: Delta, path: str) -> dict[str, Any]:
    """A config that the delta carries, checked; ``{}`` for one that its side never had."""
    record = next((f for f in delta.manifest.side_files if f.path == path), None)
    if record is None:
        return {}
    require_file(delta, path)
    data, where = delta.tree.read_bytes(path), f"{delta.tree.pin}/{path}"
    check_hash(hash_bytes(data), record.sha256, where)
    return parse_json(data, where)
