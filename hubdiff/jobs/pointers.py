"""tag and alias: names for the commits of a delta on the Hub.

A version (``v1.2``) is a tag that never moves. An alias (``production``) is a tag too, so that
nobody can commit to it, and moves only when it is told to. Both are plain revisions of the Hub:
``org/delta@production`` works wherever a ref does, and in every other tool.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from hubdiff.errors import HubConflict, HubdiffError, HubError, RefError
from hubdiff.files import open_tree
from hubdiff.manifest import read_manifest
from hubdiff.refs import ModelRef

_VERSION = re.compile(r"v?\d+([.+-][0-9A-Za-z]+)*")
_ALIAS = re.compile(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*")
_HEX = re.compile(r"[0-9a-f]{7,40}")
_TAKEN = ("main", "master", "head", "refs")


@dataclass(frozen=True)
class Pointer:
    """``name`` stands for ``commit`` of ``repo``; ``before`` is what it stood for, None if it is
    new. ``removed``: it stands for nothing any more."""

    repo: str
    name: str
    commit: str
    before: str | None
    removed: bool = False

    @property
    def ref(self) -> str:
        return f"{self.repo}@{self.name}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ref": self.ref}


def tag(delta: str, version: str, *, message: str | None = None) -> Pointer:
    """Give a commit of a delta a version, for good.

    Args:
        delta: a repo, ``org/name`` or ``org/name@revision``.
        version: such as ``v1.2`` or ``2.0-rc1``.
        message: what is new in it.

    Raises ``HubConflict`` for a version that stands for another commit, ``RefError`` for a name
    that is no version, ``NotADelta`` or another ``HubError``.
    """
    if not _VERSION.fullmatch(version) or _HEX.fullmatch(version):
        raise RefError(
            f"{version!r} is no version",
            next_step="Write v1.2 or 2.0-rc1; a name that moves is an alias: hubdiff alias.",
        )
    repo, commit = _delta(delta)
    from hubdiff.hub import create_tag, pointers

    known = pointers(repo)
    if version in known.branches:
        raise HubConflict(
            f"{version} is a branch of {repo}, which moves with every commit to it",
            next_step="Choose another name for the version.",
        )
    before = known.tags.get(version)
    if before not in (None, commit):
        raise HubConflict(
            f"{repo}@{version} is {before}, and a version never moves",
            next_step="Take the next version; a name that moves is an alias: hubdiff alias.",
        )
    if before is None:
        create_tag(repo, version, commit, message)
    return Pointer(repo, version, commit, before)


def alias(delta: str, name: str, *, move: bool = False, remove: bool = False) -> Pointer:
    """Let ``name`` stand for a commit of a delta.

    Args:
        delta: a repo, ``org/name`` or ``org/name@revision``.
        name: such as ``production``.
        move: it may stand for another commit already.
        remove: take the alias away instead.

    Raises ``HubConflict`` for an alias that stands for another commit, unless ``move``, and for the
    name of a branch; ``RefError``, ``NotADelta`` or another ``HubError``.
    """
    if not _ALIAS.fullmatch(name) or _VERSION.fullmatch(name) or _HEX.fullmatch(name):
        raise RefError(
            f"{name!r} is no alias",
            next_step="Write a word in small letters, such as production; a version is a tag: "
            "hubdiff tag.",
        )
    repo, commit = _delta(delta)
    from hubdiff.hub import pointers

    known = pointers(repo)
    if name in known.branches or name in _TAKEN:
        raise HubConflict(
            f"{name} is a branch of {repo}, which moves with every commit to it",
            next_step="Choose another name for the alias.",
        )
    before = known.tags.get(name)
    if remove:
        return _remove(repo, name, before)
    if before not in (None, commit) and not move:
        raise HubConflict(
            f"{repo}@{name} is {before}, not {commit}",
            next_step="Move it with --move.",
        )
    if before != commit:
        _set(repo, name, commit, before)
    return Pointer(repo, name, commit, before)


def _remove(repo: str, name: str, before: str | None) -> Pointer:
    from hubdiff.hub import delete_tag

    if before is None:
        raise RefError(f"{repo} has no alias {name}", next_step="hf repo tag list shows its tags.")
    delete_tag(repo, name)
    return Pointer(repo, name, before, before, removed=True)


def _set(repo: str, name: str, commit: str, before: str | None) -> None:
    """The Hub can't move a tag: it is deleted and made again. Where that fails half way the old one
    is put back."""
    from hubdiff.hub import create_tag, delete_tag

    if before is not None:
        delete_tag(repo, name)
    try:
        create_tag(repo, name, commit)
    except HubError as error:
        if before is None:
            raise
        try:
            create_tag(repo, name, before)
        except HubdiffError:
            raise HubError(
                f"{repo}@{name} was {before} and is gone: {error}",
                next_step=f"Set it again: hubdiff alias {repo}@{before} {name}.",
            ) from error
        raise


def _delta(ref: str) -> tuple[str, str]:
    """Repo and commit that a ref stands for, which must hold a delta on the Hub."""
    parsed = ModelRef.parse(ref)
    if parsed.repo is None:
        raise RefError(
            f"{ref} is a folder, which has no versions",
            next_step="Publish it first: hubdiff push-delta, or hf upload.",
        )
    tree = open_tree(parsed)
    read_manifest(tree)
    assert tree.pin.commit is not None
    return parsed.repo, tree.pin.commit
