"""The side files of a transfer: what the tune changed is replayed on the target's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hubdiff.checkpoint import Checkpoint, parse_json, read_json
from hubdiff.configs import CONFIG_RULES, GENERATION_RULES, json_text, merge_json
from hubdiff.delta import Delta
from hubdiff.hashing import check_hash, hash_bytes
from hubdiff.manifest import FileRecord
from hubdiff.plan.types import CARD, WholeFile, require_file
from hubdiff.sidecars import LeftOut, result_sidecars

# Files that map tokens to rows, in the formats that carry the whole map.
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass
class SideFiles:
    """Reads the small files it has to compare or merge; everything else is only planned."""

    delta: Delta
    target: Checkpoint
    notes: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def plan(self) -> list[WholeFile]:
        """Every side file of the result; ``notes`` and ``left_out`` are filled on the way."""
        target = self.target.tree.files()
        files: list[WholeFile] = []
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
            {path: self._content(path, tuned.get(path), base.get(path)) for path in target},
            weights=self.target.shards,
        )
        self._note_other_tokenizer(base)
        for side in plan.files:
            if side.source == "merged":
                files.append(self._merged(side.path))
            elif side.source == "tuned":
                source = f"tuned/{side.path}"
                require_file(self.delta, source)
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

    def _note_other_tokenizer(self, base: dict[str, FileRecord]) -> None:
        """Δ of an embedding is added row by row: say so where rows may stand for other tokens."""
        for path in TOKENIZERS:
            if path not in base or path not in self.target.tree.files():
                continue
            if self._content(path, base[path]) != base[path].sha256:
                self.notes.append(
                    f"{path} of the target is not the base's: check that the same rows stand for "
                    "the same tokens in both"
                )

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
        require_file(self.delta, path)
        data, where = self.delta.tree.read_bytes(path), f"{self.delta.tree.pin}/{path}"
        check_hash(hash_bytes(data), record.sha256, where)
        return parse_json(data, where)
