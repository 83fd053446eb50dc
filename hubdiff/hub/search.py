"""Finding models on the Hub by tags, author and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hubdiff.hub.client import api, subject
from hubdiff.hub.translate import translated


@dataclass(frozen=True)
class Found:
    """A repo as the Hub lists it; ``modified`` is an ISO date, UTC."""

    repo: str
    commit: str | None
    tags: tuple[str, ...]
    private: bool
    gated: bool
    modified: str | None
    downloads: int


def find_models(
    tags: Sequence[str], *, author: str | None = None, words: str | None = None
) -> Iterator[Found]:
    """Models that have all of ``tags``, the last modified first. Raises ``HubError``."""
    with translated(subject("")):
        for model in api().list_models(
            filter=list(tags), author=author, search=words, sort="last_modified", full=True
        ):
            yield Found(
                model.id,
                model.sha,
                tuple(model.tags or ()),
                bool(model.private),
                bool(model.gated),
                model.last_modified.date().isoformat() if model.last_modified else None,
                model.downloads or 0,
            )
