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
from hubdiff.vocab import Vocabulary

TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
# Files that say which token has which id, or are of use to one such vocabulary only.
_TOKENS = re.compile(
    r"tokenizer\.json|vocab\..*|merges\.txt|added_tokens\.json|.*\.model|.*\.tiktoken|spm\..*"
)
_DECODER = "added_tokens_decoder"
_ID = re.compile(r".*_token_ids?$")


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
    document: dict[str, Any], entries: Entries, alignment: Alignment, where: str
) -> dict[str, Any]:
    """The target's ``tokenizer.json`` with the tuned model's tokens. ``entries`` are the tuned
    model's. Raises ``VocabularyMismatch`` for tokens that can't be put in."""
    unknown = [token for token in alignment.added if token not in entries]
    if unknown:
        raise VocabularyMismatch(
            f"{len(unknown):,} tokens of the tuned model are no added tokens but made by its "
            f"tokenizer's own rules ({some(unknown)}): they can't be put into {where}",
            next_step="--vocab rows takes rows by their number; or leave the vocabulary out with "
            "--exclude '*embed*' --exclude '*lm_head*'.",
        )
    listed = {entry["content"]: dict(entry) for entry in document.get("added_tokens") or ()}
    vocab = _rename_all(document.get("model") or {}, listed, entries, alignment, where)
    for token, row in alignment.added.items():
        listed[token] = {"id": row, "content": token, **entries[token]}
    added = sorted(listed.values(), key=lambda entry: entry["id"])
    joined = {**document, "added_tokens": added}
    if vocab is not None:
        joined["model"] = {**document["model"], "vocab": vocab}
    return joined


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


def joined_added(document: Mapping[str, Any], alignment: Alignment) -> dict[str, Any]:
    """The target's ``added_tokens.json`` with the tuned model's tokens."""
    kept = {alignment.renamed.get(token, token): row for token, row in document.items()}
    return {**kept, **alignment.added}


def with_ids(config: Any, of: Vocabulary, alignment: Alignment) -> Any:
    """A config that means the same tokens with the result's ids. An id of no token, or of one that
    the result does not have, stays."""
    tokens = {row: token for token, row in of.rows.items()}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if type(value) is not int or value not in tokens:
            return value
        return alignment.tokens.get(tokens[value], value)

    if not isinstance(config, dict):
        return config
    return {
        key: moved(value) if _ID.fullmatch(key) else with_ids(value, of, alignment)
        for key, value in config.items()
    }


def with_rows(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A model's config for so many rows of the vocabulary, wherever it says how many."""
    said = {**config}
    if "vocab_size" in said:
        said["vocab_size"] = rows
    for name in SUB_CONFIGS:
        if isinstance(said.get(name), dict) and "vocab_size" in said[name]:
            said[name] = {**said[name], "vocab_size": rows}
    return said


def text(document: Any) -> bytes:
    """A tokenizer's file, as transformers writes it."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(
        "utf-8", "surrogatepass"
    )
