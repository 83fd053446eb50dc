"""The side files of a transfer: what the tune changed is replayed on the target's.

Several deltas are replayed one after the other in the order given, each on what the ones before it
left: that is the three-way merge of one delta, with the result so far as its target. Where two
changed the same thing the later one wins, as a tuned model wins over a target, and a note says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hubdiff.checkpoint import Checkpoint, parse_json, read_json
from hubdiff.configs import (
    CONFIG_RULES,
    GENERATION_RULES,
    TOKENIZER_RULES,
    json_text,
    merge_json,
)
from hubdiff.delta import Delta
from hubdiff.errors import VocabularyMismatch
from hubdiff.hashing import hash_bytes
from hubdiff.manifest import FileRecord
from hubdiff.plan import token_files
from hubdiff.plan.alignment import ALIGN, JOINED, Alignment, Tokens
from hubdiff.plan.carried import carried, carried_json, require_file
from hubdiff.plan.types import CARD, Weighted, WholeFile
from hubdiff.sidecars import MERGED_FILES, LeftOut, SideFile, result_sidecars
from hubdiff.vocab import read_vocabulary

# Files that map tokens to rows, in the formats that carry the whole map.
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class SidePlan:
    """Every side file of a result, what a reader should know of them, and what is left out."""

    files: tuple[WholeFile, ...]
    notes: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def plan_side_files(
    deltas: Sequence[Weighted], target: Checkpoint, tokens: Sequence[Tokens]
) -> SidePlan:
    """Replay every delta on the target's side files. ``tokens`` says of each delta where its rows
    of the vocabulary go: the tokenizer and the ids in configs go with them."""
    listed = target.tree.files()
    files = {
        path: WholeFile(path, info.size, "target", path, info.sha256)
        for path, info in listed.items()
    }
    notes: list[str] = []
    left_out: dict[str, LeftOut] = {}
    rows = max((t.alignment.rows for t in tokens if t.alignment), default=None)
    for number, item in enumerate(deltas):
        name = item.name if len(deltas) > 1 else ""
        before = ", ".join(earlier.name for earlier in deltas[:number])
        replay = _Replay(item.delta, target, files, tokens[number], rows, name, before)
        files = replay.run()
        notes += replay.notes
        left_out |= {gone.path: gone for gone in replay.left_out if gone.path not in left_out}
    _check_tokens(files, target, [t.alignment for t in tokens if t.alignment])
    missing = tuple(gone for path, gone in left_out.items() if path not in files)
    return SidePlan(tuple(files.values()), tuple(notes), missing)


def _check_tokens(
    files: Mapping[str, WholeFile], target: Checkpoint, alignments: Sequence[Alignment]
) -> None:
    """Raise unless the tokenizer's files say what was planned for the rows."""
    by_token = [one for one in alignments if one.mode == ALIGN]
    if not by_token:
        return
    planned = next((one for one in by_token if one.changes_tokens), by_token[0])

    def content(path: str) -> bytes | None:
        file = files.get(path)
        if file is None or file.data is not None:
            return None if file is None else file.data
        if file.delta is not None:
            return carried(file.delta, f"tuned/{path}")
        return target.tree.read_bytes(path)

    found = read_vocabulary(content)
    if found is None or found.rows != planned.tokens:
        raise VocabularyMismatch(
            "the tuned model's tokenizer and the target's can't be made one: their files would not "
            "say what the rows stand for",
            next_step="--vocab rows takes rows by their number; or leave the vocabulary out with "
            "--exclude '*embed*' --exclude '*lm_head*'.",
        )


@dataclass
class _Replay:
    """One delta on the files of the target, or of the result so far. Reads the small files it has
    to compare or merge; everything else is only planned. The result's vocabulary has ``rows``,
    where that was asked. ``name``, where there are several, and those ``replayed`` before it are
    for the notes."""

    delta: Delta
    target: Checkpoint
    before: dict[str, WholeFile]
    tokens: Tokens
    rows: int | None
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
        if self.tokens.doubt is not None:
            self._note_other_tokenizer(base)
        files: dict[str, WholeFile] = {}
        for side in plan.files:
            if side.source == "merged" or self._names_ids(side):
                files[side.path] = self._merged(self.before[side.path])
            elif side.source == "tuned":
                files[side.path] = self._tuned(side, tuned[side.path])
            else:
                files[side.path] = self._kept(side)
        self.left_out.extend(item for item in plan.left_out if item.path != CARD)
        alignment = self.tokens.alignment
        if alignment is not None and alignment.other_tokens:
            files = self._with_tokens(files, alignment)
        if self.rows is not None and "config.json" in files:
            files["config.json"] = self._with_rows(files["config.json"], self.rows)
        return files

    def _with_rows(self, file: WholeFile, rows: int) -> WholeFile:
        """The result's config for the rows that its vocabulary has."""
        said = self._json_so_far(file)
        there = self.tokens.alignment
        grown = rows if there is None or rows != there.target_rows else None
        config = token_files.with_rows(said, self.target.config, grown)
        return file if config == said else _made(file.path, json_text(config).encode(), file.note)

    def _with_tokens(
        self, files: dict[str, WholeFile], alignment: Alignment
    ) -> dict[str, WholeFile]:
        """Files that name tokens: the target's, with the tuned model's tokens that came along."""
        result = {}
        for path, file in files.items():
            if not token_files.names_tokens(path):
                result[path] = file
            elif path in self.before:
                result[path] = self.before[path]
            else:
                reason = "it is of the tuned model's tokens, the result has the target's"
                self.left_out.append(LeftOut(path, reason))
        config = token_files.CONFIG
        entries = token_files.added_entries(
            self._tuned_json(token_files.TOKENIZER), self._tuned_json(config)
        )
        if config in result:
            result[config] = self._tokenizer_config(result[config], entries, alignment)
        specials = token_files.SPECIALS
        if specials in result and result[specials].origin == "delta":
            target = self._json_so_far(self.before[specials]) if specials in self.before else {}
            known = token_files.known_specials(self._tuned_json(specials), target, alignment)
            result[specials] = _made(specials, token_files.text(known))
        if alignment.tokenizer == JOINED:
            result |= self._joined(entries, alignment)
        for path in ("vocab.txt", "vocab.json") if alignment.renamed else ():
            if result.pop(path, None) is not None:
                self.left_out.append(LeftOut(path, "it has names that the tune changed"))
        return result

    def _tuned_json(self, path: str) -> dict[str, Any]:
        return carried_json(self.delta, f"tuned/{path}")

    def _tokenizer_config(
        self, file: WholeFile, entries: token_files.Entries, alignment: Alignment
    ) -> WholeFile:
        before = self.before.get(file.path)
        target = self._json_so_far(before) if before else {}
        said = target
        if file.origin == "delta":
            merged = merge_json(
                carried_json(self.delta, f"base/{file.path}"),
                self._tuned_json(file.path),
                target,
                TOKENIZER_RULES,
            )
            said = merged.value
            self.notes.extend(f"{self.who}{file.path}: {note}" for note in merged.notes)
        joined = token_files.joined_config(said, target, entries, alignment)
        if before is not None and joined == target:
            return before
        return _made(file.path, token_files.text(joined))

    def _joined(self, entries: token_files.Entries, alignment: Alignment) -> dict[str, WholeFile]:
        """The target's tokenizer with the tuned model's tokens."""
        path, added = token_files.TOKENIZER, token_files.ADDED
        where = f"{self.target.tree.pin}/{path}"
        if path not in self.before:
            raise VocabularyMismatch(
                f"the tuned model has tokens of its own, and {self.target.tree.pin} has no {path} "
                "that they could be put into",
                next_step="Save the target's tokenizer with transformers, which writes that file; "
                "or take rows by their number with --vocab rows.",
            )
        document = self._json_so_far(self.before[path])
        joined = token_files.joined_tokenizer(
            document, entries, alignment, where, carried=bool(self._tuned_json(path))
        )
        files = {path: _made(path, token_files.text(joined))}
        if added in self.before:
            known = token_files.joined_added(self._json_so_far(self.before[added]), alignment)
            files[added] = _made(added, token_files.text(known))
        return files

    def _names_ids(self, side: SideFile) -> bool:
        """Whether a config is the tuned model's, with ids that the result may not have."""
        moved = self.tokens.alignment is not None and self.tokens.alignment.other_tokens
        merged = side.path in MERGED_FILES and side.source == "tuned"
        return moved and merged and side.path in self.before

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
        base, tuned = self._carried_configs(path)
        merged = merge_json(
            base,
            tuned,
            self._json_so_far(file),
            CONFIG_RULES if path == "config.json" else GENERATION_RULES,
        )
        for note in merged.notes:
            if self.rows is None or not note.field.endswith("vocab_size"):  # it follows the rows
                self.notes.append(f"{self.who}{path}: {note}")
        return _made(path, json_text(merged.value).encode())

    def _carried_configs(self, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Base's and tuned model's config, with the ids that their tokens have in the result. What
        names a token that the result does not have is left out of both, and so stays the
        target's."""
        base, tuned = (carried_json(self.delta, f"{side}/{path}") for side in ("base", "tuned"))
        alignment, ours, theirs = self.tokens.alignment, self.tokens.tuned, self.tokens.base
        if alignment is None or ours is None or theirs is None or not alignment.other_tokens:
            return base, tuned
        base, lost = token_files.with_ids(base, theirs, alignment)
        tuned, gone = token_files.with_ids(tuned, ours, alignment)
        for name in gone:
            self.notes.append(
                f"{self.who}{path}: {name} is the target's: the tuned model's token is not there"
            )
        absent = {*lost, *gone}
        return _without(base, absent), _without(tuned, absent)

    def _json_so_far(self, file: WholeFile) -> dict[str, Any]:
        if file.data is not None:
            return parse_json(file.data, file.path)
        if file.delta is not None:
            return carried_json(file.delta, f"tuned/{file.path}")
        return read_json(self.target.tree, file.path)


def _without(config: dict[str, Any], fields: Collection[str], path: str = "") -> dict[str, Any]:
    """A config without some of its fields, given by their paths."""
    return {
        key: _without(value, fields, f"{path}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{path}{key}" not in fields
    }


def _made(path: str, data: bytes, note: str | None = None) -> WholeFile:
    return WholeFile(path, len(data), "made", data=data, note=note)
