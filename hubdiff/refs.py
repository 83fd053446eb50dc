"""Refs: what a user may write to name a model or a delta, and what it is pinned to.

``ModelRef`` is what was asked, possibly a moving name (a branch, a folder). ``PinnedRef`` is what
it resolved to: one commit of one repo, or a folder. They are two types so that nothing which must
be reproducible can be handed a moving name. Nothing here touches the network.

Accepted texts: ``org/name``, ``org/name@revision``, ``hf://org/name[@revision]``, and paths. A text
that starts with ``./``, ``../``, ``/`` or ``~`` is a path and one that starts with ``hf://`` is a
repo; any other text is the folder of that name if there is one, else a repo, the rule that
``from_pretrained`` follows. ``parse(str(ref)) == ref`` for every ref.

A delta may be given with a weight, ``org/name:0.7``: see ``parse_weighted``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hubdiff.errors import RefError

ACCEPTED = '"org/name", "org/name@revision", "hf://org/name@revision", or a path such as "./folder"'

_SCHEME = "hf://"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}(?:/{_PART})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
# What git forbids in the name of a branch or tag (git-check-ref-format).
_BAD_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^/|/$|\.$|\.lock$")


@dataclass(frozen=True)
class ModelRef:
    """A ref as asked, not yet resolved: a repo with perhaps a revision, or a folder."""

    repo: str | None
    revision: str | None
    path: Path | None

    def __post_init__(self) -> None:
        if (self.repo is None) == (self.path is None):
            raise ValueError("a ref is either a repo or a path")
        if self.repo is None and self.revision is not None:
            raise ValueError("a folder has no revision")

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> ModelRef:
        """Read a ref; a ``Path`` object is always a folder. Raises ``RefError``."""
        if isinstance(text, os.PathLike):
            return cls(repo=None, revision=None, path=_path(os.fspath(text)))
        if not text.strip() or "\0" in text:
            raise RefError(f"{text!r} is not a ref", next_step=f"Write {ACCEPTED}.")
        if text.startswith(_SCHEME):
            return _parse_repo(text, text.removeprefix(_SCHEME))
        if _looks_like_path(text) or os.path.isdir(text):
            return cls(repo=None, revision=None, path=_path(text))
        return _parse_repo(text, text)

    def __str__(self) -> str:
        if self.path is not None:
            return _print_path(self.path)
        text = f"{self.repo}@{self.revision}" if self.revision else f"{self.repo}"
        return _SCHEME + text if os.path.isdir(text) else text


@dataclass(frozen=True)
class PinnedRef:
    """A ref resolved: ``commit`` is 40 hex digits for a repo and None for a folder; ``ref`` is what
    was asked."""

    repo: str | None
    commit: str | None
    path: Path | None
    ref: ModelRef

    def __post_init__(self) -> None:
        if (self.repo is None) == (self.path is None):
            raise ValueError("a pinned ref is either a repo or a path")
        if self.repo is None and self.commit is not None:
            raise ValueError("a folder has no commit")
        if self.repo is not None and not _COMMIT.fullmatch(self.commit or ""):
            raise ValueError(f"{self.commit!r} is not a commit (40 hex digits)")

    @classmethod
    def folder(cls, ref: ModelRef) -> PinnedRef:
        return cls(repo=None, commit=None, path=ref.path, ref=ref)

    def __str__(self) -> str:
        return _print_path(self.path) if self.path is not None else f"{self.repo}@{self.commit}"

    @property
    def again(self) -> str | Path:
        """As a caller names this very commit, or folder, whatever else is called like it."""
        return self.path if self.path is not None else f"{_SCHEME}{self.repo}@{self.commit}"


def parse_weighted(text: str | os.PathLike[str]) -> tuple[ModelRef, float]:
    """A ref with its weight: what follows the last ``:`` when that is a number and a ref stands
    before it, else 1. A folder or file whose own name ends so is that, without a weight. Raises
    ``RefError``; whether float32 can hold the weight is not asked here."""
    if isinstance(text, os.PathLike) or os.path.exists(os.path.expanduser(text)):
        return ModelRef.parse(text), 1.0
    head, colon, tail = text.rpartition(":")
    if not colon or not _WEIGHT.fullmatch(tail):
        return ModelRef.parse(text), 1.0
    return ModelRef.parse(head), float(tail)


def _looks_like_path(text: str) -> bool:
    return text in (".", "..") or text.startswith(("./", "../", "~")) or os.path.isabs(text)


def _path(text: str) -> Path:
    # Expanded as text: Path("./~x") has lost the "./" that says "~x" is not a home.
    return Path(os.path.expanduser(text))


def _print_path(path: Path) -> str:
    if path.is_absolute() or path.parts[:1] == ("..",) or path == Path():
        return str(path)
    return f"./{path}"


def _parse_repo(text: str, rest: str) -> ModelRef:
    # The first "@" ends the name: a repo name can't hold one, a revision can.
    repo, at, revision = rest.partition("@")
    if _wrong_repo(repo):
        raise RefError(
            f"{text!r} is neither a repo name nor a folder that exists",
            next_step=f"Write {ACCEPTED}.",
        )
    if at and (not revision or _BAD_REVISION.search(revision)):
        raise RefError(
            f"{revision!r} in {text!r} can't be the name of a branch, tag or commit",
            next_step=f"Write {ACCEPTED}.",
        )
    return ModelRef(repo=repo, revision=revision if at else None, path=None)


def _wrong_repo(repo: str) -> bool:
    """The Hub's own rules for a repo name."""
    return (
        not _REPO.fullmatch(repo)
        or len(repo) > 96
        or "--" in repo
        or ".." in repo
        or repo.endswith(".git")
    )
