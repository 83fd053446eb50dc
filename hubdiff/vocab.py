"""Vocabularies: which token stands for which row, read from a tokenizer's files.

Read as data: no tokenizer is built and no code of a repo runs. A vocabulary that can't be read is
None, never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hubdiff.fields import bad_manifest
from hubdiff.files import FileTree

SPECIAL_FILES = ("special_tokens_map.json", "tokenizer_config.json")
SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Vocabulary:
    """``rows``: token → id. Several tokens never share an id, and no id is negative."""

    rows: Mapping[str, int]

    @property
    def size(self) -> int:
        """One more than the largest id: the rows that an embedding has at least."""
        return max(self.rows.values(), default=-1) + 1

    def covers(self, rows: int) -> bool:
        """Whether it can be the vocabulary of so many rows: most of them have a token."""
        return 2 * len(self.rows) >= rows


# A model's side files by path; None for one that is not there.
Files = Callable[[str], bytes | None]


def files_of(tree: FileTree) -> Files:
    return lambda path: tree.read_bytes(path) if path in tree.files() else None


def same_vocabulary(one: FileTree, other: FileTree) -> bool:
    """Whether the files that say which token stands for which row are the same files."""
    listed = one.files(), other.files()
    found = [path for path in TOKEN_FILES if any(path in files for files in listed)]
    return bool(found) and all(
        path in listed[0] and path in listed[1] and _same_file(one, other, path) for path in found
    )


def _same_file(one: FileTree, other: FileTree, path: str) -> bool:
    mine, theirs = one.files()[path], other.files()[path]
    if mine.size != theirs.size:
        return False
    if mine.sha256 and theirs.sha256:
        return mine.sha256 == theirs.sha256
    return one.read_bytes(path) == other.read_bytes(path)


def vocabulary_of(tree: FileTree) -> Vocabulary | None:
    """Which token stands for which row in the model of ``tree``."""
    return read_vocabulary(files_of(tree))


def read_vocabulary(files: Files) -> Vocabulary | None:
    """The vocabulary of a model with these side files, added tokens included."""
    for path, parse in _FORMATS.items():
        data = files(path)
        if data is None:
            continue
        try:
            rows = parse(data)
            if path != "tokenizer.json":
                rows |= _ids(json.loads(files(_ADDED) or b"{}"))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        return _checked(rows)
    return None


def _checked(rows: dict[str, int]) -> Vocabulary | None:
    """None for a map in which two tokens share a row: it can't say what the row stands for."""
    if not rows or len(set(rows.values())) != len(rows):
        return None
    return Vocabulary(rows)


def _tokenizer_json(data: bytes) -> dict[str, int]:
    document = json.loads(data)
    vocab = document["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [token, score] by id
        rows = {_text(entry[0]): number for number, entry in enumerate(vocab)}
    else:
        rows = _ids(vocab)
    added = document.get("added_tokens") or ()
    return rows | _ids({entry["content"]: entry["id"] for entry in added})


def _vocab_txt(data: bytes) -> dict[str, int]:
    lines = data.decode().removesuffix("\n").split("\n")  # a token may hold other line ends
    return {token.removesuffix("\r"): number for number, token in enumerate(lines)}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no token")
    return value


def _ids(document: Any) -> dict[str, int]:
    for token, number in document.items():
        if type(number) is not int or not 0 <= number < 1 << 31:
            raise ValueError(f"{token!r} has the id {number!r}")
    return {_text(token): number for token, number in document.items()}


_FORMATS: dict[str, Callable[[bytes], dict[str, int]]] = {
    "tokenizer.json": _tokenizer_json,
    "vocab.json": lambda data: _ids(json.loads(data)),
    "vocab.txt": _vocab_txt,
}
_ADDED = "added_tokens.json"
TOKEN_FILES = (*_FORMATS, _ADDED)


def special_tokens(files: Files) -> dict[str, str]:
    """The special tokens by role, as ``tokenizer_config.json`` and ``special_tokens_map.json``
    name them."""
    found: dict[str, str] = {}
    for path in SPECIAL_FILES:
        document = _object(files(path))
        for role in SPECIAL:
            value = document.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[role] = text
    return found


def chat_template(files: Files) -> str | None:
    """The chat template, from wherever it stands."""
    jinja = files("chat_template.jinja")
    if jinja is not None:
        return jinja.decode(errors="replace")
    for path in ("chat_template.json", "tokenizer_config.json"):
        template = _object(files(path)).get("chat_template")
        if template is not None:
            return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return None


def _object(data: bytes | None) -> dict[str, Any]:
    try:
        document = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


# --- in a delta ---

FILE = "vocabulary.json.zst"
BASE_FILE = "base-vocabulary.json.zst"
_LARGEST = 64 << 20


def pack(vocabulary: Vocabulary) -> bytes:
    """The file of a delta that holds the vocabulary of its tuned model, or its base's."""
    import zstandard

    text = json.dumps(dict(vocabulary.rows), ensure_ascii=False, separators=(",", ":"))
    return zstandard.ZstdCompressor(level=9).compress(text.encode("utf-8", "surrogatepass"))


def unpack(data: bytes, where: str) -> Vocabulary:
    """What ``pack`` wrote. Raises ``BadManifest``."""
    import zstandard

    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= _LARGEST:
            raise ValueError(f"it unpacks to {size:,} bytes")
        text = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
        found = _checked(_ids(json.loads(text.decode("utf-8", "surrogatepass"))))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise bad_manifest(where, f"is no vocabulary ({error})") from error
    except zstandard.ZstdError as error:
        raise bad_manifest(where, f"is no vocabulary ({error})") from error
    if found is None:
        raise bad_manifest(where, "gives two tokens one row, or has none")
    return found
