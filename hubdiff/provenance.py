"""The code that a model was trained with: the git checkout its folder lies in. Nothing is written
there, and nothing that the checkout configures is run."""

from __future__ import annotations

import configparser
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from git import Repo


@dataclass(frozen=True)
class Provenance:
    """The checkout a model was made in: ``remote`` (without credentials; None when there is none
    that others can reach), ``commit`` (40 hex digits), and whether tracked files had changes that
    were not committed (None: not known). Untracked files don't count: the model itself is often
    one."""

    remote: str | None
    commit: str
    dirty: bool | None


def code_provenance(folder: Path) -> Provenance | None:
    """The git checkout that ``folder`` lies in, or None when there is none, it has no commit, or
    git is not installed or can't read it."""
    try:
        import git
    except ImportError:  # GitPython raises this when there is no git program
        return None
    try:
        with git.Repo(folder, search_parent_directories=True) as repo:
            _run_nothing(repo)
            return Provenance(
                remote=_remote(repo), commit=repo.head.commit.hexsha, dirty=_dirty(repo)
            )
    except (git.GitError, configparser.Error, ValueError, OSError):  # ValueError: no commit yet
        return None


# Settings of a checkout by which git, or git-lfs as the user's own filter, runs a program on files.
_FILTERS = r"^(filter\..*\.(clean|process)|lfs\.extension\..*)$"


def _run_nothing(repo: Repo) -> None:
    """A checkout may name programs to run on every status, and for objects it lacks. Reading must
    run none, and must not refresh the index of a tree that others may be using."""
    repo.git.set_persistent_git_options(c=["core.fsmonitor=false", f"core.hooksPath={os.devnull}"])
    repo.git.update_environment(GIT_OPTIONAL_LOCKS="0", GIT_ALLOW_PROTOCOL="none")


def _dirty(repo: Repo) -> bool | None:
    """Whether tracked files differ from the commit. Comparing them goes through the filters of the
    checkout, which are programs: where it brings its own, the answer stays unknown. Submodules have
    a configuration of their own, so only the commits they are at are compared."""
    if repo.bare:
        return False
    if _brings_filters(repo):
        return None
    changes = repo.git.status(
        "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty", "--no-renames"
    )
    return bool(changes)


def _brings_filters(repo: Repo) -> bool:
    """Whether the checkout's own configuration names a filter. The user's own is trusted."""
    import git

    try:
        found = repo.git.config("--show-scope", "--name-only", "--get-regexp", _FILTERS)
    except git.GitCommandError as error:
        if error.status == 1:  # git config's way to say that there are none
            return False
        raise
    return any(line.startswith(("local", "worktree")) for line in found.splitlines())


def _remote(repo: Repo) -> str | None:
    """The remote of the current branch, else ``origin``, else the first one."""
    tracked = None if repo.head.is_detached else repo.active_branch.tracking_branch()
    names = [remote.name for remote in repo.remotes]
    wanted = [tracked.remote_name] if tracked is not None else []
    for name in (*wanted, "origin", *names):
        if name in names:
            url = next(iter(repo.remote(name).urls), None)
            return None if url is None else public_url(url)
    return None


_SCP_LIKE = re.compile(r"(?![A-Za-z]:[\\/])[^/\\:\s]+:(?!//)\S+")


def public_url(url: str) -> str | None:
    """A remote's URL that is fit to publish, or None for one that is a place on this machine.

    Passwords and tokens go (``https://user:token@host`` → ``https://host``); a user name stays only
    with ssh, where it is part of the address (``git@host:path``).
    """
    if "://" not in url:
        return url if _SCP_LIKE.fullmatch(url) else None
    parts = urlsplit(url)
    if parts.scheme == "file" or not parts.hostname:
        return None
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme in ("ssh", "git+ssh") and parts.username:
        host = f"{parts.username}@{host}"
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
