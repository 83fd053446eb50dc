"""Two vocabularies in one result: which rows of a delta's embedding and head go to which rows of
the target's, told by the tokens they stand for.

Δ of a row goes to the row of the same token. A token that only the tuned model has brings its row
with it. A token that the tuned model does not know keeps the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubdiff.checkpoint import Checkpoint
from hubdiff.delta import Delta
from hubdiff.errors import VocabularyMismatch
from hubdiff.hashing import check_hash, hash_bytes
from hubdiff.manifest import TensorRecord
from hubdiff.names import has_vocabulary_word
from hubdiff.pair import EMBEDDINGS
from hubdiff.rows import Run, runs_of, whole_name
from hubdiff.vocab import BASE_FILE, FILE, TOKEN_FILES, Vocabulary, unpack, vocabulary_of

ALIGN, STRICT, ROWS = "align", "strict", "rows"
MODES = (ALIGN, STRICT, ROWS)
# Whose tokenizer a result has; FILES: nobody asked which tokens its files have.
SAME, TARGET, TUNED, JOINED, FILES = "same", "target", "tuned", "joined", "files"
_LISTED = 1000  # tokens of one kind that a plan and a record name
_SHOWN = 3  # that a sentence names


@dataclass(frozen=True)
class Alignment:
    """The vocabulary tensors of a result: ``rows`` of them, where the target has ``target_rows``.
    ``changed`` says which rows of the delta's ``shared`` ones act on which, ``taken`` which of the
    tuned model's own rows, counted from its first row, are put where.

    Of tokens: ``matched`` ones have their Δ on their row in the target, ``moved`` of them on a row
    of another number; ``added`` are new in the tuned model, with their rows; ``renamed`` are the
    target's that the tune gave another name; ``left`` are unknown to the tuned model; ``missing``
    to the target, which has no row for their Δ. ``tokens`` is the vocabulary of the result where
    that is neither model's."""

    mode: str
    rows: int
    target_rows: int
    shared: int
    changed: tuple[Run, ...]
    taken: tuple[Run, ...]
    matched: int
    moved: int
    added: Mapping[str, int]
    renamed: Mapping[str, str]
    left: tuple[str, ...]
    missing: tuple[str, ...]
    tokenizer: str
    tokens: Mapping[str, int]

    @property
    def in_place(self) -> bool:
        """Whether every row that both have is of one number in both, and none comes or goes."""
        whole = Run(0, 0, self.target_rows)
        return self.rows == self.target_rows and self.changed == (whole,) and not self.taken

    @property
    def other_tokens(self) -> bool:
        """Whether the result's tokens have other rows than in the tuned model."""
        return self.tokenizer in (TARGET, JOINED)

    @property
    def tokenizer_text(self) -> str:
        """Whose tokenizer the result has, in words."""
        count = len(self.added) + len(self.renamed)
        return {
            SAME: "the same tokens in the tuned model and in the target",
            TARGET: "the target's",
            TUNED: "the tuned model's",
            JOINED: f"the target's, with {count:,} of the tuned model's tokens",
            FILES: "file by file the tuned model's, where the tune changed it, or the target's",
        }[self.tokenizer]

    def __str__(self) -> str:
        if self.mode != ALIGN:
            text = f"rows are taken by their number, whatever tokens they stand for ({self.mode})"
            return f"{text}; {self._raw()}" if self.taken else text
        moved = f" ({self.moved:,} in other rows)" if self.moved else ""
        texts = [f"{self.matched:,} tokens matched{moved}"]
        for found, words in (
            (self.added, "added with the tuned model's own rows"),
            (self.renamed.values(), "are new names of the target's"),
            (self.left, "left as in the target, the tuned model does not know them"),
            (self.missing, "of the tuned model not in the target: their Δ has no row"),
        ):
            if found:
                texts.append(f"{len(found):,} {words} ({some(found)})")
        return "; ".join(texts)

    def _raw(self) -> str:
        return f"added, the tuned model's own rows: {sum(run.count for run in self.taken):,}"

    def as_json(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "text": str(self),
            "rows": {"result": self.rows, "target": self.target_rows, "shared": self.shared},
            "tokenizer": self.tokenizer_text,
            "matched": self.matched,
            "moved": self.moved,
            "added": _listed(self.added),
            "renamed": _listed(self.renamed),
            "left": _listed(self.left),
            "missing": _listed(self.missing),
        }


def _listed(found: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """How many, and the first of them."""
    if isinstance(found, Mapping):
        return {"count": len(found), "tokens": dict(list(found.items())[:_LISTED])}
    return {"count": len(found), "tokens": list(found[:_LISTED])}


def some(tokens: Iterable[str]) -> str:
    """A few tokens, for a sentence."""
    found = list(tokens)
    more = len(found) - _SHOWN
    return ", ".join(map(repr, found[:_SHOWN])) + (f" and {more:,} more" if more > 0 else "")


# --- the vocabularies of a delta ---


def tuned_vocabulary(delta: Delta) -> Vocabulary | None:
    """That of the tuned model, as the delta has it."""
    return _stored(delta, FILE)


def base_vocabulary(delta: Delta) -> Vocabulary | None:
    """That of the base, which is the tuned model's where the delta has no other."""
    return _stored(delta, BASE_FILE) or tuned_vocabulary(delta)


def _stored(delta: Delta, path: str) -> Vocabulary | None:
    record = next((f for f in delta.manifest.side_files if f.path == path), None)
    if record is None or path not in delta.tree.files():
        return None
    where = f"{delta.tree.pin}/{path}"
    data = delta.tree.read_bytes(path)
    check_hash(hash_bytes(data), record.sha256, where)
    return unpack(data, where)


# --- deciding ---


@dataclass(frozen=True)
class Tables:
    """The vocabulary tensors that a delta acts on: their records, those of rows that only the tuned
    model has by the name of the tensor they are of, and the target's tensor of each."""

    records: Mapping[str, TensorRecord]
    own: Mapping[str, TensorRecord]
    partners: Mapping[str, str]
    shared: int
    tuned_rows: int

    @classmethod
    def of(
        cls, delta: Delta, pairs: Mapping[str, str], takes: Callable[[str], bool]
    ) -> Tables | None:
        """None where the delta does nothing to any."""
        manifest = delta.manifest
        words = {
            record.name: record
            for record in manifest.tensors
            if has_vocabulary_word(record.name)
            and record.shape
            and not record.added
            and takes(record.name)
        }
        shared = _rows_of_vocabulary(words, {c.shared for c in manifest.rows.values()})
        records = {
            name: record
            for name, record in words.items()
            if record.shape[0] == shared and name in pairs and record.portable
        }
        own = {
            whole_name(record.name): record
            for record in manifest.tensors
            if record.added
            and whole_name(record.name) in manifest.rows
            and record.name != whole_name(record.name)
            and takes(record.name)
        }
        own = {name: record for name, record in own.items() if name in pairs}
        if not records and not own:
            return None
        more = max((record.shape[0] for record in own.values()), default=0)
        partners = {name: pairs[name] for name in (*records, *own)}
        return cls(records, own, partners, shared, shared + more)


def _rows_of_vocabulary(words: Mapping[str, TensorRecord], cut: set[int]) -> int:
    if cut:
        return max(cut)
    embeddings = [r.shape[0] for name, r in words.items() if name.endswith(EMBEDDINGS)]
    return max(embeddings or [record.shape[0] for record in words.values()], default=0)


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of a delta and a target. ``alignment`` None: rows stay where they
    are. ``compared``: both vocabularies were read, or are known to be one; ``tuned`` and ``base``
    are the delta's, where they were read."""

    alignment: Alignment | None
    compared: bool
    tuned: Vocabulary | None = None
    base: Vocabulary | None = None


def align(delta: Delta, target: Checkpoint, tables: Tables | None, mode: str | None) -> Tokens:
    """Decide where the rows of ``tables`` go. ``mode`` None: ``align`` where both tokenizers can be
    read, else ``strict``. Raises ``VocabularyMismatch``."""
    if tables is None:
        return Tokens(None, True)
    rows = {target.tensors[name].entry.shape[0] for name in tables.partners.values()}
    if len(rows) != 1:
        if mode in (ALIGN, ROWS) or delta.manifest.rows:
            raise VocabularyMismatch(
                f"the vocabulary tensors of {target.tree.pin} have {sorted(rows)} rows",
                next_step="Leave one of them out with --exclude.",
            )
        return Tokens(None, False)
    (count,) = rows
    if mode == ROWS:
        return Tokens(_by_number(tables, count, ROWS), True)
    if mode is None and not delta.manifest.rows and count == tables.shared and _kept(delta, target):
        return Tokens(None, True)
    ours, theirs = tuned_vocabulary(delta), vocabulary_of(target.tree)
    base = base_vocabulary(delta)
    if ours is None or theirs is None or base is None:
        whose = f"that {delta.tree.pin} was made with" if ours is None else f"of {target.tree.pin}"
        if mode == ALIGN:
            raise VocabularyMismatch(
                f"tokens can't be aligned: the tokenizer {whose} can't be read",
                next_step="hubdiff reads tokenizer.json, vocab.json and vocab.txt. --vocab rows "
                "takes rows by their number.",
            )
        return Tokens(_strictly(delta, tables, count, target), False)
    if mode is None and not (ours.covers(tables.tuned_rows) and theirs.covers(count)):
        return Tokens(_strictly(delta, tables, count, target), False)
    if mode == STRICT:
        if base.rows != theirs.rows:
            raise VocabularyMismatch(
                f"the tokens of {target.tree.pin} are not those of the base "
                f"{delta.manifest.base.name}",
                next_step="--vocab align brings rows of the same token together.",
            )
        return Tokens(_strictly(delta, tables, count, target), True)
    if ours.rows == base.rows == theirs.rows and count == tables.shared == tables.tuned_rows:
        return Tokens(None, True)
    return Tokens(_Matching(ours, base, theirs, tables, count).alignment(), True, ours, base)


def _kept(delta: Delta, target: Checkpoint) -> bool:
    """Whether the target's tokens are the base's and the tune left them, told without reading a
    vocabulary: by the files that hold it."""
    files = {file.path: file for file in delta.manifest.base.side_files}
    listed = target.tree.files()
    known = [path for path in TOKEN_FILES if path in files or path in listed]
    changed = any(file.path == BASE_FILE for file in delta.manifest.side_files)
    return (
        bool(known)
        and not changed
        and all(
            path in files
            and path in listed
            and listed[path].size == files[path].size
            and (listed[path].sha256 or hash_bytes(target.tree.read_bytes(path)))
            == files[path].sha256
            for path in known
        )
    )


def _strictly(delta: Delta, tables: Tables, count: int, target: Checkpoint) -> Alignment | None:
    """Nothing is moved. Where the tuned model has rows of its own, the target must have as many as
    the base."""
    bases = {cut.base for cut in delta.manifest.rows.values() if cut.base is not None}
    if not tables.own and not bases:
        return None
    if bases != {count}:
        raise VocabularyMismatch(
            f"the vocabulary has {count:,} rows in {target.tree.pin} and "
            f"{', '.join(f'{rows:,}' for rows in sorted(bases))} in the delta's base",
            next_step="--vocab align brings rows of the same token together, where both tokenizers "
            "can be read; --vocab rows takes rows by their number.",
        )
    return _by_number(tables, count, STRICT)


def _by_number(tables: Tables, count: int, mode: str) -> Alignment:
    """Every row to the row of its number."""
    own = tables.tuned_rows - tables.shared
    if own and tables.shared > count:
        raise VocabularyMismatch(
            f"the target has {count:,} rows, and the tuned model's own begin behind row "
            f"{tables.shared:,}",
            next_step="--vocab align finds rows for them, where both tokenizers can be read.",
        )
    both = min(tables.shared, count)
    return Alignment(
        mode,
        max(count, tables.tuned_rows) if own else count,
        count,
        tables.shared,
        (Run(0, 0, both),),
        (Run(tables.shared, tables.shared, own),) if own else (),
        *(0, 0, {}, {}, (), (), FILES, {}),
    )


class _Matching:
    """Rows brought together by token. Three vocabularies: the tuned model's, its base's and the
    target's; rows of the result are found one kind after the other."""

    def __init__(
        self, ours: Vocabulary, base: Vocabulary, theirs: Vocabulary, tables: Tables, count: int
    ) -> None:
        self._ours, self._theirs, self._tables, self._count = ours, theirs, tables, count
        self._token = {row: token for token, row in ours.rows.items()}
        self._before = {row: token for token, row in base.rows.items()}
        self._used = set(theirs.rows.values())
        self._changed: dict[int, int] = {}
        self._taken: dict[int, int] = {}
        self._added: dict[str, int] = {}
        self._renamed: dict[str, str] = {}
        self._missing: list[str] = []

    def alignment(self) -> Alignment:
        matched = self._match_shared()
        self._place_own()
        self._match_unused()
        for row in self._taken:
            self._changed.pop(row, None)
        tokens = {self._renamed.get(token, token): row for token, row in self._theirs.rows.items()}
        tokens |= self._added
        known = {*self._ours.rows, *self._renamed}
        return Alignment(
            ALIGN,
            max(self._count, *(row + 1 for row in self._taken), 0),
            self._count,
            self._tables.shared,
            runs_of(self._changed),
            runs_of(self._taken),
            matched,
            sum(1 for at, row in self._changed.items() if at != row),
            self._added,
            self._renamed,
            tuple(token for token in self._theirs.rows if token not in known),
            tuple(self._missing),
            self._whose(tokens),
            tokens,
        )

    def _whose(self, tokens: Mapping[str, int]) -> str:
        if tokens == self._ours.rows:
            return SAME if self._ours.rows == self._theirs.rows else TUNED
        return TARGET if tokens == self._theirs.rows else JOINED

    def _row_of(self, token: str | None) -> int | None:
        """The target's row of a token."""
        row = None if token is None else self._theirs.rows.get(token)
        return row if row is not None and row < self._count else None

    def _match_shared(self) -> int:
        """Rows that have a Δ, by the tuned model's token; those that the target does not know by
        the base's, which the tune renamed or dropped. How many tokens found their row."""
        unknown = []
        for row in range(self._tables.shared):
            at = self._row_of(self._token.get(row))
            if at is not None:
                self._changed[at] = row
            else:
                unknown.append(row)
        for row in unknown:
            token, old = self._token.get(row), self._before.get(row)
            at = self._row_of(old)
            if at is not None and at not in self._changed:
                self._changed[at] = row
                if old is not None and token is not None:
                    self._renamed[old] = token
            elif token is not None and not self._match_new(row, token):
                self._missing.append(token)
        return len(self._changed)

    def _match_new(self, row: int, token: str) -> bool:
        """A new token in a row that has none in the base and none in the target."""
        free = row not in self._before and row < self._count and row not in self._used
        if free:
            self._changed[row] = self._added[token] = row
        return free

    def _place_own(self) -> None:
        """The tuned model's own rows: to the row of their token, where the target has it; else to
        the very row they have in the tuned model, if that leaves its vocabulary the result's; else
        to the first rows behind the target's tokens, which is where tokenizers count on."""
        shared, rows = self._tables.shared, self._tables.tuned_rows
        fresh = []
        for row in range(shared, rows):
            token = self._token.get(row)
            at = self._row_of(token)
            if at is not None:
                self._taken[at] = row
            elif token is not None:
                fresh.append((row, token))
        tokens = {self._renamed.get(token, token): row for token, row in self._theirs.rows.items()}
        tokens |= {**self._added, **{token: row for row, token in fresh}}
        free = shared <= self._count and self._used.isdisjoint(range(shared, rows))
        if tokens == self._ours.rows and (free or not fresh):
            if fresh:
                self._taken = {row: row for row in range(shared, rows)}
                self._added |= {token: row for row, token in fresh}
            return
        self._leave_holes()
        first = self._theirs.size
        if fresh and first > self._count:
            raise VocabularyMismatch(
                f"the target's tokenizer has {first:,} tokens and its embedding {self._count:,} "
                "rows",
                next_step="Resize the target first (model.resize_token_embeddings).",
            )
        for at, (row, token) in enumerate(fresh, start=first):
            self._taken[at], self._added[token] = row, at

    def _leave_holes(self) -> None:
        """No token goes to a row between others after all: a tokenizer that is not the tuned
        model's would not count that way."""
        for token, row in self._added.items():
            del self._changed[row]
            self._missing.append(token)
        self._added = {}

    def _match_unused(self) -> None:
        """Rows without a token in any of the three: padding, by number."""
        for row in range(min(self._tables.shared, self._count)):
            if row not in self._token and row not in self._before and row not in self._used:
                self._changed[row] = row
