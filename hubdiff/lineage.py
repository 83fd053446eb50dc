"""Where a delta comes from: the code it was trained with, and the licences it inherits.

``code_provenance`` reads the git checkout a tuned folder lies in; it never writes there and never
runs what that checkout configures. ``strictest`` and ``licence_note`` rank and word licences; they
are a help for readers, not legal advice.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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


# --- licences -----------------------------------------------------------------------------------

UNKNOWN = "unknown"

# Least to most restrictive, as the Hub spells licences. A licence not listed ranks with "other":
# custom terms, to be read. No licence at all ranks last: nothing is granted.
_ORDER = (
    *("cc0-1.0", "unlicense", "wtfpl", "pddl", "mit-0", "0bsd"),
    *("mit", "isc", "zlib", "bsd*", "bsl-1.0", "ncsa", "postgresql", "artistic-2.0", "ms-pl"),
    *("ecl-2.0", "afl-3.0", "apache-2.0", "cdla-permissive*", "cc-by-[234].*", "odc-by"),
    *("mpl-2.0", "lgpl*", "epl*", "eupl*", "ofl-1.1", "cdla-sharing*", "lppl*"),
    *("cc-by-sa*", "odbl", "osl-3.0", "gpl*", "agpl*"),
    *("*openrail*", "*-rail-*"),
    *("cc-by-nd*", "fair-noncommercial-research-license", "cc-by-nc*", "*amlr", "intel-research"),
    *("gemma", "llama*", "other"),
    UNKNOWN,
)

# What a card on the Hub may say for ``license``; any other id makes it refuse the card.
_HUB_IDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown
unlicense wtfpl zlib
"""
HUB_LICENCES = frozenset(_HUB_IDS.split())


def strictest(licences: Iterable[str | None]) -> str:
    """The most restrictive of some licences, as its owner spells it; ``None`` and an empty list
    count as ``"unknown"``, the strictest of all. A card may list several, separated by commas."""
    names = [name.strip() for text in licences for name in (text or UNKNOWN).split(",")]
    return max((name or UNKNOWN for name in names), key=_rank, default=UNKNOWN)


def _rank(licence: str) -> int:
    name = licence.lower()
    matches = (i for i, pattern in enumerate(_ORDER) if fnmatchcase(name, pattern))
    return next(matches, _ORDER.index("other"))


@dataclass(frozen=True)
class Side:
    """One thing that licences are inherited from: how a sentence calls it ("base"), its licence,
    and whether its terms must be accepted on the Hub."""

    name: str
    licence: str | None
    gated: bool = False


def licence_note(sides: Sequence[Side]) -> str:
    """Plain words on what ``sides`` hand down, gating included."""
    if not sides:
        return "No licence is stated for what this was made from."
    strict = strictest(side.licence for side in sides)
    if strict != UNKNOWN and len({side.licence for side in sides}) == 1:
        words = [f"{_list(sides)} {_are(sides)} under {_name(strict)}; so is this."]
    else:
        each = [f"the {side.name} is {_under(side.licence)}" for side in sides]
        words = [f"T{_and(each)[1:]}; the terms of each apply."]
        if strict == UNKNOWN:
            words.append("Where no licence is stated, ask the owner before you use or share it.")
        else:
            words.append(f"The strictest is {_name(strict)}.")
    gated = [side for side in sides if side.gated]
    if gated:
        words.append(
            f"{_list(gated)} {_are(gated)} gated: accept the terms on the Hub first. "
            "They hold here too."
        )
    return " ".join(words)


def _list(sides: Sequence[Side]) -> str:
    return f"T{_and([f'the {side.name}' for side in sides])[1:]}"


def _are(sides: Sequence[Side]) -> str:
    return "is" if len(sides) == 1 else "are"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def _under(licence: str | None) -> str:
    if licence is None or licence == UNKNOWN:
        return "without a stated licence"
    return f"under {_name(licence)}"


def _name(licence: str) -> str:
    return "a licence of its own (other)" if licence == "other" else licence
