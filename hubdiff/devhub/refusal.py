"""The one way a handler says no.

The official clients read the reason from headers (``X-Error-Code``, ``X-Error-Message``), not from
the body, so a refusal carries both and the HTTP layer writes both.
"""

from __future__ import annotations


class Refusal(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}


def bad_request(message: str) -> Refusal:
    return Refusal(400, message)


def repo_not_found(user: str | None) -> Refusal:
    """A missing repo and a private one look alike: 401 to a stranger, 404 to anyone else."""
    if user is None:
        return Refusal(401, "Invalid username or password.", code="RepoNotFound")
    return Refusal(404, "Repository not found", code="RepoNotFound")


def revision_not_found(revision: str) -> Refusal:
    return Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def entry_not_found(path: str, commit: str | None = None) -> Refusal:
    headers = {"X-Repo-Commit": commit} if commit else {}
    return Refusal(404, f"Entry not found: {path}", code="EntryNotFound", headers=headers)
