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
from hubdiff.hashing import hash_bytes
from hubdiff.manifest import TensorRecord
from hubdiff.names import Tables, tables_of
from hubdiff.plan.carried import carried
from hubdiff.rows import Run, moved, rest_name, shapes_of
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

    Of tokens: ``matched`` ones are the target's too and have their Δ on their row there, ``moved``
    of them on a row of another number; ``added`` are new in the tuned model, with their rows;
    ``replaced`` are new there and the target's already, whose rows give way to the tuned model's
    own; ``renamed`` are the target's that the tune gave another name; ``left`` are unknown to the
    tuned model; ``missing`` to the target, which has no row for them. ``tokens`` is the vocabulary
    of the result."""

    mode: str
    rows: int
    target_rows: int
    shared: int
    changed: tuple[Run, ...]
    taken: tuple[Run, ...]
    matched: int
    moved: int
    added: Mapping[str, int]
    replaced: Mapping[str, int]
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
    def changes_tokens(self) -> bool:
        """Whether the target's vocabulary is not the result's, or rows of it are replaced."""
        return bool(self.taken or self.added or self.renamed)

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
            (self.added, "added"),
            (self.replaced, "of the target's with the tuned model's own row"),
            (self.renamed.values(), "are new names of the target's"),
            (self.left, "left as in the target, the tuned model does not know them"),
            (self.missing, "of the tuned model without a row in the target"),
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
            "replaced": _listed(self.replaced),
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
    """That of the base."""
    return tuned_vocabulary(delta) if delta.manifest.same_tokens else _stored(delta, BASE_FILE)


def _stored(delta: Delta, path: str) -> Vocabulary | None:
    data = carried(delta, path)
    return None if data is None else unpack(data, f"{delta.tree.pin}/{path}")


# --- deciding ---


@dataclass(frozen=True)
class Acting:
    """What a delta does to a target's tables: its records of them, the records of the rows that
    only the tuned model has, both by the name of the base's tensor, and the target's of each."""

    records: Mapping[str, TensorRecord]
    own: Mapping[str, TensorRecord]
    partners: Mapping[str, str]

    @classmethod
    def of(
        cls,
        delta: Delta,
        tables: Tables,
        pairs: Mapping[str, str],
        takes: Callable[[str], bool],
    ) -> Acting:
        records = {
            record.name: record
            for record in delta.manifest.tensors
            if not record.added
            and record.portable
            and takes(record.name)
            and pairs.get(record.name) in tables.known
        }
        rests = {
            name: delta.records.get(rest_name(name, cut.shared))
            for name, cut in delta.manifest.rows.items()
            if takes(name) and pairs.get(name) in tables.known
        }
        own = {name: record for name, record in rests.items() if record is not None}
        return cls(records, own, {name: pairs[name] for name in (*records, *own)})

    def __bool__(self) -> bool:
        return bool(self.partners)

    def shared(self, delta: Delta) -> int | None:
        """The rows that are compared; None where that is not one number."""
        found = {record.shape[0] for record in self.records.values()}
        found |= {delta.manifest.rows[name].shared for name in self.own}
        return found.pop() if len(found) == 1 else None

    @property
    def own_rows(self) -> int:
        return max((record.shape[0] for record in self.own.values()), default=0)


NOTHING = Acting({}, {}, {})


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of a delta and a target. ``alignment`` None: rows stay where they
    are. ``doubt`` says why rows were not told apart by token, where nobody asked not to, though the
    tokens themselves were read or not; ``tuned`` and ``base`` are the delta's vocabularies, where
    they were needed."""

    alignment: Alignment | None
    doubt: str | None = None
    read: bool = True
    tuned: Vocabulary | None = None
    base: Vocabulary | None = None


def align(
    delta: Delta,
    target: Checkpoint,
    pairs: Mapping[str, str],
    takes: Callable[[str], bool],
    mode: str | None,
) -> tuple[Acting, Tokens]:
    """Decide where the rows of a delta go whose tensors ``pairs`` matches with the target's.
    ``mode`` None: ``align``, or in any doubt ``strict``. Raises ``VocabularyMismatch``."""
    tables = tables_of(shapes_of(target))
    acting = Acting.of(delta, tables, pairs, takes) if tables is not None else NOTHING
    if tables is None or (mode == ROWS and not acting):
        if mode == ALIGN or (mode != ROWS and delta.manifest.rows):
            raise _no_tables(target)
        doubt = None if mode == ROWS else "no tensor is a known embedding"
        return acting, Tokens(None, doubt, read=False)
    if mode == ROWS:
        return acting, Tokens(_by_number(acting, delta, tables.rows, ROWS))
    shared = acting.shared(delta) if acting else tables.rows
    if mode is None and not acting.own and shared == tables.rows and _kept(delta, target):
        return acting, Tokens(None)
    ours, base = tuned_vocabulary(delta), base_vocabulary(delta)
    theirs = vocabulary_of(target.tree)
    doubt = _unread(delta, target, ours, base, theirs)
    read = doubt is None
    if ours is not None and base is not None and theirs is not None:
        doubt = _doubt(acting, tables, shared, ours, base)
        if doubt is None and mode is None and not _covered(acting, tables, shared, ours, theirs):
            doubt = "most rows have no token"
    if doubt is not None and mode != STRICT:
        if mode == ALIGN:
            raise VocabularyMismatch(
                f"tokens can't be aligned: {doubt}",
                next_step="--vocab rows takes rows by their number; or leave the vocabulary out "
                "with --exclude '*embed*' --exclude '*lm_head*'.",
            )
        return acting, Tokens(_strictly(acting, delta, tables.rows, target), doubt, read)
    if mode == STRICT:
        if base is not None and theirs is not None and base.rows != theirs.rows:
            raise VocabularyMismatch(
                f"the tokens of {target.tree.pin} are not those of the base "
                f"{delta.manifest.base.name}",
                next_step="--vocab align brings rows of the same token together.",
            )
        return acting, Tokens(_strictly(acting, delta, tables.rows, target), doubt, read)
    assert ours is not None
    assert base is not None
    assert theirs is not None
    assert shared is not None
    same = ours.rows == base.rows == theirs.rows
    if same and not acting.own and shared == tables.rows:
        return acting, Tokens(None)
    from hubdiff.plan.matching import Matching

    matching = Matching(ours, base, theirs, shared, acting.own_rows, tables.rows)
    return acting, Tokens(matching.alignment(), tuned=ours, base=base)


def _no_tables(target: Checkpoint) -> VocabularyMismatch:
    return VocabularyMismatch(
        f"it can't be told which tensors of {target.tree.pin} have a row for every token: none has "
        "the name of an input embedding",
        next_step="--vocab rows takes rows by their number, where sizes allow it.",
    )


def _unread(
    delta: Delta,
    target: Checkpoint,
    ours: Vocabulary | None,
    base: Vocabulary | None,
    theirs: Vocabulary | None,
) -> str | None:
    """Whose tokenizer can't be read."""
    found = {
        f"the one {delta.tree.pin} was made from": ours,
        f"its base {delta.manifest.base.name}": base,
        f"{target.tree.pin}": theirs,
    }
    whose = next((name for name, vocabulary in found.items() if vocabulary is None), None)
    return None if whose is None else f"the tokenizer of {whose} can't be read"


def _doubt(
    acting: Acting, tables: Tables, shared: int | None, ours: Vocabulary, base: Vocabulary
) -> str | None:
    """Why rows can't be told apart by token, though the tokens are known."""
    if not acting:
        return None
    if tables.unknown:
        return f"whether {tables.unknown[0]} has a row for every token is not known"
    if shared is None:
        return "the delta's tensors of the vocabulary have unequal numbers of rows"
    token = moved(ours, base)
    if token is not None:
        return f"the tune gave {token!r} another row than it has in the base"
    return None


def _covered(
    acting: Acting, tables: Tables, shared: int | None, ours: Vocabulary, theirs: Vocabulary
) -> bool:
    rows = (shared or 0) + acting.own_rows
    return theirs.covers(tables.rows) and (not acting or ours.covers(rows))


def _kept(delta: Delta, target: Checkpoint) -> bool:
    """Whether the target's tokens are the base's and the tune left them, told without reading a
    vocabulary: by the files that hold it."""
    files = {file.path: file for file in delta.manifest.base.side_files}
    listed = target.tree.files()
    known = [path for path in TOKEN_FILES if path in files or path in listed]
    if not known or not delta.manifest.same_tokens:
        return False
    for path in known:
        if path not in files or path not in listed or listed[path].size != files[path].size:
            return False
        digest = listed[path].sha256 or hash_bytes(target.tree.read_bytes(path))
        if digest != files[path].sha256:
            return False
    return True


def _strictly(acting: Acting, delta: Delta, count: int, target: Checkpoint) -> Alignment | None:
    """Nothing is moved. Where the tuned model has rows of its own, the target must have as many as
    the base."""
    bases = {delta.manifest.rows[name].base for name in acting.own}
    if not bases:
        return None
    if bases != {count}:
        raise VocabularyMismatch(
            f"the vocabulary has {count:,} rows in {target.tree.pin} and "
            f"{', '.join(f'{rows or 0:,}' for rows in bases)} in the delta's base",
            next_step="--vocab align brings rows of the same token together, where both tokenizers "
            "can be read; --vocab rows takes rows by their number.",
        )
    return _by_number(acting, delta, count, STRICT)


def _by_number(acting: Acting, delta: Delta, count: int, mode: str) -> Alignment:
    """Every row to the row of its number."""
    shared, own = acting.shared(delta), acting.own_rows
    if shared is None:
        raise VocabularyMismatch(
            "the delta's tensors of the vocabulary have unequal numbers of rows",
            next_step="Leave one of them out with --exclude.",
        )
    if own and shared > count:
        raise VocabularyMismatch(
            f"the target has {count:,} rows, and the tuned model's own begin behind row {shared:,}",
            next_step="--vocab align finds rows for them, where both tokenizers can be read.",
        )
    return Alignment(
        mode=mode,
        rows=max(count, shared + own) if own else count,
        target_rows=count,
        shared=shared,
        changed=(Run(0, 0, min(shared, count)),),
        taken=(Run(shared, shared, own),) if own else (),
        matched=0,
        moved=0,
        added={},
        replaced={},
        renamed={},
        left=(),
        missing=(),
        tokenizer=FILES,
        tokens={},
    )
