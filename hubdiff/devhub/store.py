"""All the repos and users, and who may do what.

Private: only the members of its namespace see the repo. Gated: everyone sees it, only those who
were granted access read its files. Write: the members of its namespace. A trusted publisher may do
all of that with its one repo, and to any other it is a stranger.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .refusal import Refusal, repo_not_found
from .repo import Repo, Settings, check_repo_name

KINDS = ("model", "dataset", "space")


class Publisher(str):
    """The user of a trusted publisher's token: ``[OIDC]``, of whichever repo."""

    kind: str
    repo: str
    pull_requests: bool

    @classmethod
    def of(cls, claim: Mapping[str, Any]) -> Publisher:
        self = cls("[OIDC]")
        self.kind, self.repo = claim["kind"], claim["repo"]
        self.pull_requests = claim["pull_requests"]
        return self

    def owns(self, repo: Repo) -> bool:
        return (self.kind, self.repo) == (repo.kind, repo.name)


class Store:
    def __init__(
        self, folder: Path, users: Mapping[str, str], orgs: Mapping[str, Sequence[str]]
    ) -> None:
        self.users = dict(users)
        self.orgs = {name: list(members) for name, members in orgs.items()}
        self._folder = folder / "repos"
        self._lock = threading.Lock()
        self._repos: dict[tuple[str, str], Repo] = {}
        for settings in sorted(self._folder.glob("*/**/*.git/devhub.json")):
            place = settings.parent
            kind, *parts = place.relative_to(self._folder).parts
            name = "/".join(parts).removesuffix(".git")
            self._repos[kind, name] = Repo(kind, name, place)

    def user_of(self, token: str) -> str | None:
        return next((user for user, known in self.users.items() if known == token), None)

    def orgs_of(self, user: str) -> list[str]:
        return [org for org, members in self.orgs.items() if user in members]

    def is_member(self, user: str | None, namespace: str) -> bool:
        if user is None or isinstance(user, Publisher):
            return False
        return user == namespace or namespace in self.orgs_of(user)

    def may_write(self, repo: Repo, user: str | None) -> bool:
        if isinstance(user, Publisher):
            return user.owns(repo)
        return self.is_member(user, repo.namespace)

    def visible(self, kind: str, user: str | None) -> list[Repo]:
        return [
            repo
            for repo in list(self._repos.values())
            if repo.kind == kind and self._may_see(repo, user)
        ]

    def find(self, kind: str, name: str) -> Repo | None:
        return self._repos.get((kind, name))

    def open(self, kind: str, name: str, user: str | None) -> Repo:
        repo = self.find(kind, name)
        if repo is None or not self._may_see(repo, user):
            raise repo_not_found(user)
        return repo

    def open_files(self, kind: str, name: str, user: str | None) -> Repo:
        """As ``open``, and the right to read the content of its files."""
        repo = self.open(kind, name, user)
        may_write = self.may_write(repo, user)
        if repo.settings.gated and not may_write and user not in repo.settings.allowed:
            status = 401 if user is None else 403
            message = (
                f"Access to {kind} {name} is restricted and you are not in the authorized list."
            )
            raise Refusal(status, message, code="GatedRepo")
        return repo

    def open_for_write(self, kind: str, name: str, user: str | None) -> Repo:
        repo = self.open(kind, name, user)
        self.check_write(repo, user)
        return repo

    def open_to_contribute(self, kind: str, name: str, user: str | None) -> Repo:
        """As ``open``, for what anyone may send: pull requests, comments. Not so a publisher, whose
        token is for one repo, and for those only where its owner's settings have it so."""
        repo = self.open(kind, name, user)
        if isinstance(user, Publisher):
            self.check_write(repo, user)
            if not user.pull_requests:
                raise Refusal(403, "This token may not open or change discussions")
        return repo

    def check_write(self, repo: Repo, user: str | None) -> None:
        if not self.may_write(repo, user):
            self.check_namespace(repo.namespace, user)

    def check_namespace(self, namespace: str, user: str | None) -> None:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not self.is_member(user, namespace):
            raise Refusal(
                403, f"You don't have the rights to write under the namespace {namespace}"
            )

    def create(self, kind: str, name: str, author: str, settings: Settings) -> Repo:
        check_repo_name(name)
        with self._lock:
            if (kind, name) in self._repos:
                raise Refusal(409, f"You already created this {kind} repo")
            repo = Repo.create(kind, name, self._place(kind, name), settings, author)
            self._repos[kind, name] = repo
        return repo

    def delete(self, repo: Repo) -> None:
        with self._lock:
            del self._repos[repo.kind, repo.name]
            shutil.rmtree(repo.git.folder)

    def move(self, repo: Repo, name: str) -> None:
        check_repo_name(name)
        with self._lock:
            if (repo.kind, name) in self._repos:
                raise Refusal(409, f"{name} already exists")
            del self._repos[repo.kind, repo.name]
            self._repos[repo.kind, name] = repo.moved_to(name, self._place(repo.kind, name))

    def _may_see(self, repo: Repo, user: str | None) -> bool:
        return repo.settings.visibility == "public" or self.may_write(repo, user)

    def _place(self, kind: str, name: str) -> Path:
        return self._folder / kind / f"{name}.git"
