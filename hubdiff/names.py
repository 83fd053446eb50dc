"""Matching the tensors of two models by name.

Most pairs share their names. Some differ by a prefix on one side (``bert.encoder…`` against
``encoder…``, ``model.language_model.layers…`` against ``model.layers…``): then one rename is found
that serves every such tensor, or none. Nothing is matched by shape or by guess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from hubdiff.anatomy import place

_MAX_DEPTH = 3  # components a prefix may have; "model.language_model." has two
_SAMPLE = 64  # unmatched names that are looked at to find a rename
_VOCABULARY_WORDS = ("embed", "wte", "lm_head", "word_embeddings", "output.weight", "decoder")
# Input embeddings, whose rows stand for tokens.
EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"),
    *("shared.weight", "tok_embeddings.weight", "token_embedding.weight", "emb.weight"),
)
# Output heads that many models tie to their input embedding.
HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
# The other tensors with a row for every token.
_FOR_TOKENS = (
    *("lm_head.bias", "lm_head.decoder.weight", "lm_head.decoder.bias", "embed_out.bias"),
    *("cls.predictions.bias", "cls.predictions.decoder.bias"),
    *("vocab_projector.weight", "vocab_projector.bias", "output_layer.weight"),
)
# What may have as many rows as there are tokens by chance.
_NOT_FOR_TOKENS = ("position", "pos_emb", "wpe", "token_type", "type_embeddings", "norm", "ln_")


@dataclass(frozen=True)
class Rename:
    """``left + rest`` on one side is ``right + rest`` on the other."""

    left: str
    right: str

    def apply(self, name: str) -> str:
        """The name on the right, for a name of the left; other names stay as they are."""
        return self.right + name[len(self.left) :] if name.startswith(self.left) else name


@dataclass(frozen=True)
class Match:
    """``pairs``: left name → right name, one to one, in the order of the left."""

    pairs: dict[str, str]
    rename: Rename | None


def match_names(left: Collection[str], right: Collection[str]) -> Match:
    """Pair equal names, then what one rename brings together. ``pairs`` may be empty."""
    right_set = set(right)
    pairs = {name: name for name in left if name in right_set}
    open_left = [name for name in left if name not in pairs]
    open_right = right_set - set(pairs)
    rename = _best_rename(open_left, open_right, at_least=len(pairs) + 1)
    if rename is not None:
        for name in open_left:
            other = rename.apply(name)
            if other in open_right:
                pairs[name] = other
                open_right.discard(other)
    ordered = {name: pairs[name] for name in left if name in pairs}
    return Match(ordered, rename)


def _best_rename(left: Collection[str], right: Collection[str], *, at_least: int) -> Rename | None:
    """The rename that pairs the most names; None when two do equally well, or when it pairs fewer
    than ``at_least``. A prefix moves a whole model: where more names are equal than it would pair,
    what it pairs is a new head with an old one (``classifier.dense`` with ``lm_head.dense``)."""
    by_suffix: dict[str, list[str]] = {}
    for name in right:
        for prefix, suffix in _splits(name):
            by_suffix.setdefault(suffix, []).append(prefix)
    step = max(1, len(left) // _SAMPLE)
    candidates = {
        Rename(prefix, other)
        for name in list(left)[::step]
        for prefix, suffix in _splits(name)
        for other in by_suffix.get(suffix, ())
        if not _shares_last(prefix, other)
    }
    right_set = set(right)
    scores = Counter(
        {rename: _score(rename, left, right_set) for rename in candidates}
    ).most_common(2)
    if not scores or scores[0][1] < at_least:
        return None
    if len(scores) == 2 and scores[0][1] == scores[1][1]:
        return None
    return scores[0][0]


def _score(rename: Rename, left: Iterable[str], right: set[str]) -> int:
    return sum(1 for name in left if name.startswith(rename.left) and rename.apply(name) in right)


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """(prefix, suffix) with prefixes of 0 to _MAX_DEPTH components and a suffix of at least two:
    a bare "weight" says nothing about which tensor it is."""
    parts = name.split(".")
    for depth in range(min(_MAX_DEPTH, len(parts) - 2) + 1):
        yield "".join(part + "." for part in parts[:depth]), ".".join(parts[depth:])


def _shares_last(a: str, b: str) -> bool:
    """Whether a shorter pair of prefixes says the same ("x.bert." → "bert." is "x." → "")."""
    return bool(a) and bool(b) and a.split(".")[-2] == b.split(".")[-2]


def differs_in_rows_only(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes of one tensor look like two vocabularies of one model."""
    return (
        len(a) == len(b)
        and len(a) in (1, 2)
        and a[0] != b[0]
        and a[1:] == b[1:]
        and any(word in name for word in _VOCABULARY_WORDS)
    )


@dataclass(frozen=True)
class Tables:
    """The tensors of a model that have a row for every token, and how many rows that is. Of
    ``unknown`` ones it can't be told whether they do: their shape is right, their name says
    nothing."""

    rows: int
    known: frozenset[str]
    unknown: tuple[str, ...]


def tables_of(shapes: Mapping[str, tuple[int, ...]]) -> Tables | None:
    """The tables of a model whose tensors have these shapes; None where no input embedding says how
    many rows they have."""
    outside = {name: shape for name, shape in shapes.items() if place(name)[1] is None and shape}
    found = {shape[0] for name, shape in outside.items() if _is_one(name, EMBEDDINGS)}
    if len(found) != 1:
        return None
    (rows,) = found
    tall = [name for name, shape in outside.items() if shape[0] == rows and len(shape) <= 2]
    known = frozenset(filter(is_for_tokens, tall))
    others = (name for name in tall if not any(word in name for word in _NOT_FOR_TOKENS))
    return Tables(rows, known, tuple(name for name in others if name not in known))


def is_for_tokens(name: str) -> bool:
    """Whether a tensor of that name has a row for every token."""
    roles = (*EMBEDDINGS, *HEADS, *_FOR_TOKENS)
    return name in ("output.weight", "head.weight") or _is_one(name, roles)


def _is_one(name: str, roles: tuple[str, ...]) -> bool:
    return any(name == role or name.endswith(f".{role}") for role in roles)
