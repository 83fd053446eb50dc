"""What a poll asks the Hub: bases, each in one call, and where new ones turn up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hubdiff.hub.client import api, subject
from hubdiff.hub.retry import retrying
from hubdiff.hub.translate import translated


@dataclass(frozen=True)
class Seen:
    """A model as it stands: ``files`` are path → sha256 of what is stored apart from the commit,
    ``new_version`` what its card calls its successor, ``library`` what made it."""

    repo: str
    commit: str
    created: str
    files: Mapping[str, str]
    tags: tuple[str, ...]
    library: str | None
    new_version: str | None
    private: bool
    gated: bool


def see(repo: str, revision: str | None = None) -> Seen:
    """In one call. Raises ``HubError``."""
    with translated(subject(repo, revision)):
        info = retrying(lambda: api().model_info(repo, revision=revision, files_metadata=True))
    files = {
        sibling.rfilename: sibling.lfs.sha256 for sibling in info.siblings or () if sibling.lfs
    }
    card = info.card_data.to_dict() if info.card_data else {}
    newer = card.get("new_version")
    return Seen(
        repo,
        str(info.sha),
        info.created_at.isoformat() if info.created_at else "",
        files,
        tuple(info.tags or ()),
        info.library_name,
        newer if isinstance(newer, str) else None,
        bool(info.private),
        bool(info.gated),
    )


def models_in(collection: str) -> list[str]:
    """The models of a collection, in its order. Raises ``HubError``."""
    with translated(subject(collection)):
        found = retrying(lambda: api().get_collection(collection))
    return [item.item_id for item in found.items if item.item_type == "model"]


def models_of(author: str) -> list[str]:
    """All models of a user or organisation, the oldest first. Raises ``HubError``."""
    with translated(subject(author)):
        found = retrying(lambda: list(api().list_models(author=author, sort="created_at")))
    return [model.id for model in reversed(found)]
