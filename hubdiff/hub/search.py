"""Finding models on the Hub by tags and author."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import ModelInfo

from hubdiff.hub.client import api, subject
from hubdiff.hub.retry import retrying
from hubdiff.hub.translate import translated

_MOST = 10_000


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


def find_models(tags: Sequence[str], *, author: str | None = None) -> list[Found]:
    """Models that have all of ``tags``, the last modified first; 10,000 at most. Raises
    ``HubError``."""

    def ask() -> list[ModelInfo]:
        found = api().list_models(
            filter=list(tags), author=author, sort="last_modified", full=True, limit=_MOST
        )
        return list(found)

    with translated(subject("")):
        models = retrying(ask)
    return [
        Found(
            model.id,
            model.sha,
            tuple(model.tags or ()),
            bool(model.private),
            bool(model.gated),
            model.last_modified.date().isoformat() if model.last_modified else None,
            model.downloads or 0,
        )
        for model in models
    ]
