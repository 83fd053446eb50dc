"""The names that a repo on the Hub gives to its commits: branches and tags."""

from __future__ import annotations

from dataclasses import dataclass

from hubdiff.hub.client import api, subject
from hubdiff.hub.retry import retrying
from hubdiff.hub.translate import translated


@dataclass(frozen=True)
class Pointers:
    """Commits by name."""

    branches: dict[str, str]
    tags: dict[str, str]


def pointers(repo: str) -> Pointers:
    """All branches and tags. Raises ``HubError``."""
    with translated(subject(repo)):
        found = retrying(lambda: api().list_repo_refs(repo))
    return Pointers(
        {ref.name: ref.target_commit for ref in found.branches},
        {ref.name: ref.target_commit for ref in found.tags},
    )


def create_tag(repo: str, name: str, commit: str, message: str | None = None) -> None:
    """Raises ``HubConflict`` where the tag exists."""
    with translated(subject(repo, commit)):
        api().create_tag(repo, tag=name, revision=commit, tag_message=message)


def delete_tag(repo: str, name: str) -> None:
    with translated(subject(repo, name)):
        api().delete_tag(repo, tag=name)
