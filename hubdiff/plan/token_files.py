"""The files of a result that name tokens: the target's tokenizer with tokens of the tuned model put
in, and ids in configs that mean the same token as before.

Files are edited as JSON; no tokenizer is built. Pure functions on what the files say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hubdiff.configs import SUB_CONFIGS
from hubdiff.errors import VocabularyMismatch
from hubdiff.plan.alignment import Alignment, some
from hubdiff.vocab import SPECIAL, Vocabulary

TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
SPECIALS = "special_tokens_map.json"
# Files that say which token has which id, or are of use to one such vocabulary only.
_TOKENS = re.compile(
    r"tokenizer\.json|vocab\..*|merges\.txt|added_tokens\.json|.*\.model|.*\.tiktoken|spm\..*"
)
_DECODER = "added_tokens_decoder"
_ID = re.compile(r".*_token_(ids?|index)$|(begin_)?suppress_tokens$|bad_words_ids$")


def names_tokens(path: str) -> bool:
    """Whether a file belongs to one vocabulary."""
    return _TOKENS.fullmatch(path) is not None


Entries = dict[str, dict[str, Any]]


def added_entries(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> Entries:
    """How a tokenizer treats each of its added tokens, by token: out of ``tokenizer.json``, else
    ``tokenizer_config.json``."""
    found: Entries = {}
    decoder = config.get(_DECODER)
    listed = list(decoder.values()) if isinstance(decoder, dict) else []
    more = tokenizer.get("added_tokens")
    for entry in [*listed, *(more if isinstance(more, list) else [])]:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            found[entry["content"]] = {k: v for k, v in entry.items() if k not in ("id", "content")}
    return found


def joined_tokenizer(
    document: dict[str, Any],
    entries: Entries,
    alignment: Alignment,
    where: str,
    *,
    carried: bool = True,
) -> dict[str, Any]:
    """The target's ``tokenizer.json`` with the tuned model's tokens. ``entries`` are the tuned
    model's, whose tokenizer the delta has (``carried``) or not. Raises ``VocabularyMismatch`` for
    tokens that can't be put in."""
    unknown = [token for token in alignment.added if token not in entries]
    if unknown and not carried:
        raise VocabularyMismatch(
            f"the tuned model's tokenizer is its base's, which the delta does not carry, and "
            f"{where} lacks {some(unknown)}",
            next_step="Give the target a tokenizer with these tokens; or take rows by their number "
            "with --vocab rows.",
        )
    if unknown:
        raise VocabularyMismatch(
            f"{len(unknown):,} tokens of the tuned model are no added tokens but made by its "
            f"tokenizer's own rules ({some(unknown)}): they can't be put into {where}",
            next_step="--vocab rows takes rows by their number; or leave the vocabulary out with "
            "--exclude '*embed*' --exclude '*lm_head*'.",
        )
    listed = {entry["content"]: dict(entry) for entry in document.get("added_tokens") or ()}
    _check_numbers(document, alignment, where)
    vocab = _rename_all(document.get("model") or {}, listed, entries, alignment, where)
    for token, row in alignment.added.items():
        listed[token] = {"id": row, "content": token, **entries[token]}
    added = sorted(listed.values(), key=lambda entry: entry["id"])
    joined = {**document, "added_tokens": added}
    if vocab is not None:
        joined["model"] = {**document["model"], "vocab": vocab}
    return joined


def _check_numbers(document: Mapping[str, Any], alignment: Alignment, where: str) -> None:
    """Raise unless the tokenizers library will give added tokens the rows that they have: whatever
    the file says, it numbers them on from the vocabulary's length or the last added token."""
    vocab = (document.get("model") or {}).get("vocab") or ()
    added = [entry["id"] for entry in document.get("added_tokens") or ()]
    following = max(len(vocab), *(row + 1 for row in added), 0)
    rows = sorted(alignment.added.values())
    if rows != list(range(following, following + len(rows))):
        raise VocabularyMismatch(
            f"{where} leaves out some ids: its next token would get {following:,}, and the first "
            f"row that no token has is {rows[0]:,}",
            next_step="--vocab rows takes rows by their number.",
        )


def _rename_all(
    model: Mapping[str, Any], listed: Entries, entries: Entries, alignment: Alignment, where: str
) -> dict[str, Any] | None:
    """Give tokens their new names in ``listed``; a vocabulary of whole words with them, where some
    stand in that."""
    vocab = model.get("vocab")
    inside = [old for old in alignment.renamed if isinstance(vocab, dict) and old in vocab]
    words = model.get("type") in ("WordPiece", "WordLevel")
    stuck = [old for old in alignment.renamed if old not in listed and old not in inside]
    if stuck or (inside and not words):
        raise VocabularyMismatch(
            f"the tune gave {some(stuck or inside)} other names, which {where} can't be given: "
            "they are part of its rules",
            next_step="--vocab rows takes rows by their number.",
        )
    for old, token in alignment.renamed.items():
        if old in listed:
            entry = listed.pop(old)
            listed[token] = {**entry, **entries.get(token, {}), "content": token}
    if not inside:
        return None
    assert isinstance(vocab, dict)
    return {alignment.renamed.get(token, token): row for token, row in vocab.items()}


def joined_config(
    config: dict[str, Any], target: Mapping[str, Any], entries: Entries, alignment: Alignment
) -> dict[str, Any]:
    """A ``tokenizer_config.json`` of the result: added tokens are those of the ``target``'s, and
    the tuned model's that came along."""
    config = known_specials(config, target, alignment)
    decoder = target.get(_DECODER)
    if not isinstance(decoder, dict):
        return {key: value for key, value in config.items() if key != _DECODER}
    found = {
        row: {**entry, "content": alignment.renamed.get(entry["content"], entry["content"])}
        for row, entry in decoder.items()
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }
    for token, row in alignment.added.items():
        found[str(row)] = {"content": token, **entries.get(token, {})}
    return {**config, _DECODER: found}


def known_specials(
    config: dict[str, Any], target: Mapping[str, Any], alignment: Alignment
) -> dict[str, Any]:
    """The special tokens that ``config`` names, as far as the result has them; of a role that would
    be left without one, the ``target``'s. A tokenizer makes up tokens it does not know."""
    said = {}
    for key, value in config.items():
        if key in SPECIAL and _content(value) not in alignment.tokens:
            if key not in target:
                continue
            value = target[key]
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            value = _known(value, alignment)
        said[key] = value
    return said


def _known(value: Any, alignment: Alignment) -> Any:
    if isinstance(value, dict):
        return {k: item for k, item in value.items() if _content(item) in alignment.tokens}
    if isinstance(value, list):
        return [item for item in value if _content(item) in alignment.tokens]
    return value


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def joined_added(document: Mapping[str, Any], alignment: Alignment) -> dict[str, Any]:
    """The target's ``added_tokens.json`` with the tuned model's tokens."""
    kept = {alignment.renamed.get(token, token): row for token, row in document.items()}
    return {**kept, **alignment.added}


def with_ids(
    config: Mapping[str, Any], of: Vocabulary, alignment: Alignment
) -> tuple[dict[str, Any], list[str]]:
    """A config that means the same tokens with the result's ids, without the fields that name a
    token which the result does not have; and those fields."""
    tokens = {row: token for token, row in of.rows.items()}
    lost: list[str] = []

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if type(value) is not int or value < 0:  # -1 and the like stand for no token
            return value
        return alignment.tokens[tokens[value]]

    def inside(holder: Mapping[str, Any], path: str) -> dict[str, Any]:
        said = {}
        for key, value in holder.items():
            if isinstance(value, dict):
                said[key] = inside(value, f"{path}{key}.")
            elif not _ID.fullmatch(key):
                said[key] = value
            else:
                try:
                    said[key] = moved(value)
                except KeyError:
                    lost.append(f"{path}{key}")
        return said

    return inside(config, ""), lost


def with_rows(
    config: dict[str, Any], target: Mapping[str, Any], rows: int | None
) -> dict[str, Any]:
    """A model's config for so many rows of the vocabulary, wherever it says how many; None: for as
    many as the ``target`` says."""
    said = {**config}
    if "vocab_size" in said:
        said["vocab_size"] = target.get("vocab_size", said["vocab_size"]) if rows is None else rows
    for name in SUB_CONFIGS:
        if isinstance(said.get(name), dict):
            there = target.get(name)
            said[name] = with_rows(said[name], there if isinstance(there, dict) else {}, rows)
    return said


def text(document: Any) -> bytes:
    """A tokenizer's file, as transformers writes it."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(
        "utf-8", "surrogatepass"
    )
