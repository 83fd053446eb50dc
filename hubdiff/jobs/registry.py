"""list and search: the deltas that are on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from hubdiff.errors import HubdiffError, RefError
from hubdiff.files import open_tree
from hubdiff.manifest import Manifest, manifest_json, read_manifest
from hubdiff.refs import ModelRef
from hubdiff.registry_tags import BASE_MODEL, DELTA_TAG
from hubdiff.summary import summarise

if TYPE_CHECKING:
    from hubdiff.hub import Found

MOST = 50
_AT_ONCE = 8  # manifests read at the same time


@dataclass(frozen=True)
class Entry:
    """A delta on the Hub. ``base`` and ``tuned`` are pinned where its manifest pins them; sizes are
    bytes. ``problem`` says why its manifest can't be read; all that it would say is None then."""

    repo: str
    commit: str | None
    modified: str | None
    downloads: int
    private: bool
    gated: bool
    base: str | None = None
    tuned: str | None = None
    size: int | None = None
    size_share: float | None = None
    relative_norm: float | None = None
    portable: bool | None = None
    licence: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Listing:
    """``entries``, the last modified first; ``more``: there are others beyond the limit."""

    entries: tuple[Entry, ...]
    more: bool

    def as_json(self) -> dict[str, Any]:
        return {"deltas": [asdict(entry) for entry in self.entries], "more": self.more}


def list_deltas(
    *, base: str | None = None, author: str | None = None, limit: int = MOST
) -> Listing:
    """The deltas on the Hub, by their tags and manifests.

    Args:
        base: only those of this base, a repo of the Hub.
        author: only those of this user or organisation.
        limit: this many at most.

    Raises ``HubError``. A repo that only looks like a delta is listed with its problem.
    """
    tags = [DELTA_TAG]
    if base is not None:
        ref = ModelRef.parse(base)
        if ref.repo is None:
            raise RefError(f"{base} is a folder", next_step='Name the base as "org/name".')
        tags.append(f"{BASE_MODEL}:{ref.repo}")
    return _listing(_found(tags, author), limit)


def search(words: str | Sequence[str], *, limit: int = MOST) -> Listing:
    """The deltas in whose name, base, tuned model, tags or licence every one of ``words`` stands.
    Case does not matter. Raises ``HubError``."""
    wanted = [word.lower() for word in (words.split() if isinstance(words, str) else words)]
    if not wanted:
        raise RefError("no word to search for", next_step="Give one or several.")
    hits = (found for found in _found([DELTA_TAG], None) if _has(found, wanted))
    return _listing(hits, limit)


def _found(tags: Sequence[str], author: str | None) -> Iterator[Found]:
    from hubdiff.hub import find_models

    return iter(find_models(tags, author=author))


def _has(found: Found, words: Sequence[str]) -> bool:
    """A card's tags name base, licence, languages and task."""
    text = " ".join((found.repo, *found.tags)).lower()
    return all(word in text for word in words)


def _listing(hits: Iterator[Found], limit: int) -> Listing:
    if limit < 1:
        raise RefError(f"the limit {limit} is no whole number from 1", next_step="Give --limit N.")
    chosen = list(islice(hits, limit + 1))
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hubdiff") as pool:
        entries = tuple(pool.map(_entry, chosen[:limit]))
    return Listing(entries, len(chosen) > limit)


def _entry(found: Found) -> Entry:
    known: dict[str, Any] = {
        "repo": found.repo,
        "commit": found.commit,
        "modified": found.modified,
        "downloads": found.downloads,
        "private": found.private,
        "gated": found.gated,
    }
    try:
        ref = ModelRef(repo=found.repo, revision=found.commit, path=None)
        return Entry(**known, **_said(read_manifest(open_tree(ref))))
    except HubdiffError as error:
        return Entry(**known, problem=str(error))


def _said(manifest: Manifest) -> dict[str, Any]:
    summary = summarise(json.loads(manifest_json(manifest)))
    sides = {
        name: f"{side.repo}@{side.commit}" if side.repo else side.name
        for name, side in (("base", manifest.base), ("tuned", manifest.tuned))
    }
    return {
        **sides,
        "size": summary.delta_bytes,
        "size_share": summary.size_share,
        "relative_norm": summary.relative_norm,
        "portable": manifest.not_portable_reason is None,
        "licence": manifest.tuned.licence,
    }
