"""Branches and pull requests: where changes wait for somebody to look at them."""

from __future__ import annotations

from dataclasses import dataclass

from hubdiff.errors import HubError, HubUnavailable
from hubdiff.hub.client import api, subject
from hubdiff.hub.retry import retrying
from hubdiff.hub.translate import translated

TRUSTED_PUBLISHER = "[OIDC]"


@dataclass(frozen=True)
class PullRequest:
    """``ref`` is the revision that holds its content."""

    number: int
    title: str
    author: str
    status: str
    url: str

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"


def make_branch(repo: str, name: str) -> None:
    """A branch, from main where there is none yet. Raises ``HubError``."""
    with translated(subject(repo, name)):
        retrying(lambda: api().create_branch(repo, branch=name, exist_ok=True))


def pull_requests(repo: str) -> list[PullRequest]:
    """Open, closed and merged ones, the newest first. Raises ``HubError``."""
    with translated(subject(repo)):
        found = retrying(
            lambda: list(api().get_repo_discussions(repo, discussion_type="pull_request"))
        )
    return [PullRequest(one.num, one.title, one.author, one.status, one.url) for one in found]


def messages(repo: str, revision: str) -> dict[str, str]:
    """The commits of ``revision``, the newest first, with their whole messages. Raises
    ``HubError``."""
    with translated(subject(repo, revision)):
        found = retrying(lambda: list(api().list_repo_commits(repo, revision=revision)))
    return {commit.commit_id: f"{commit.title}\n\n{commit.message}" for commit in found}


def who() -> str:
    """Whom the Hub will name as the author. The tokens of trusted publishers are of no user, and
    what comes with them is ``[OIDC]``'s, which can be no user's name. Raises ``HubUnavailable``."""
    try:
        with translated(subject("")):
            return str(retrying(lambda: api().whoami())["name"])
    except HubUnavailable:
        raise
    except (HubError, KeyError):
        return TRUSTED_PUBLISHER
