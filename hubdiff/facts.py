"""What a repo says about itself: licence, gating, the base model its card names.

Taken from the Hub for a Hub repo, from the YAML header of README.md for a folder; the same type
either way. A card is written by its owner: what it says is carried over, never trusted to be right,
and a card that can't be read says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from hubdiff.errors import CheckpointError
from hubdiff.files import FileTree
from hubdiff.markdown import is_repo_id
from hubdiff.progress import Progress
from hubdiff.refs import ModelRef

CARD = "README.md"
STARTED_FROM = "started_from"
_COMMIT = re.compile(r"[0-9a-f]{40}")
HEADER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Start:
    """The delta that was on the base when training began. ``repo`` and ``commit`` are None for a
    folder; ``closed``: it is gated or private, or what it was made of is."""

    name: str
    repo: str | None
    commit: str | None
    closed: bool

    @classmethod
    def read(cls, said: object) -> Start | None:
        """From a card; None for what is no name, with the pin of a repo or without one."""
        if not isinstance(said, dict):
            return None
        name, repo, commit = (said.get(key) for key in ("name", "repo", "commit"))
        pinned = is_repo_id(repo) and isinstance(commit, str) and _COMMIT.fullmatch(commit)
        if not isinstance(name, str) or not name or not (pinned or repo is commit is None):
            return None
        return cls(name, repo, commit, said.get("closed") is True)


@dataclass(frozen=True)
class RepoFacts:
    """``licence`` as the card names it ("other" has its name in ``card_data["license_name"]``);
    ``base_model`` as the card lists it, in order; ``start`` of a fine-tune that began with a delta
    on its base; ``card_data`` is the whole header. ``problem`` says why the card could not be read,
    if so."""

    licence: str | None = None
    gated: bool = False
    private: bool = False
    base_model: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    start: Start | None = None
    card_data: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


# A tree is pinned: what it says is asked for once.
_KNOWN: WeakKeyDictionary[FileTree, RepoFacts] = WeakKeyDictionary()


def facts(tree: FileTree) -> RepoFacts:
    """The facts of a repo at its pinned commit, or of a folder. Raises ``HubError``."""
    if tree not in _KNOWN:
        _KNOWN[tree] = _ask(tree)
    return _KNOWN[tree]


def _ask(tree: FileTree) -> RepoFacts:
    if tree.pin.repo is None:
        return facts_in(tree, CARD)
    from hubdiff.hub import repo_facts

    return repo_facts(tree.pin)


def facts_in(tree: FileTree, path: str) -> RepoFacts:
    """The facts in a card that is a file of ``tree``; none where there is no such file."""
    if path not in tree.files():
        return RepoFacts()
    try:
        return facts_from(card_facts(tree.read_bytes(path).decode(errors="replace")))
    except CheckpointError as error:
        return RepoFacts(problem=f"{tree.pin}/{path} is left out of account: {error}")


def note_problems(known: Iterable[RepoFacts], progress: Progress) -> None:
    """Tell of the cards that could not be read: the work goes on without what they say."""
    for one in known:
        if one.problem is not None:
            progress.note(one.problem)


def keeps_private(
    known: Iterable[RepoFacts],
    destination: ModelRef,
    private: bool,
    public: bool,
    progress: Progress,
) -> bool:
    """Whether what is made of these goes to a private repo: asked for, or because one of them is
    gated or private itself and nobody said ``public``."""
    closed = any(one.gated or one.private for one in known)
    if private or public or not closed or destination.repo is None:
        return private
    progress.note(
        f"{destination.repo} is made private, as what it is made of is gated or private (--public "
        "if its terms allow otherwise)"
    )
    return True


def facts_from(
    card_data: dict[str, Any],
    *,
    gated: bool = False,
    private: bool = False,
    tags: tuple[str, ...] | None = None,
) -> RepoFacts:
    """Facts out of a card's header; ``tags`` are the Hub's own, else the card's."""
    return RepoFacts(
        licence=", ".join(_texts(card_data.get("license"))) or None,
        gated=gated,
        private=private,
        base_model=_texts(card_data.get("base_model")),
        tags=_texts(card_data.get("tags")) if tags is None else tags,
        start=Start.read(card_data.get(STARTED_FROM)),
        card_data=card_data,
    )


def card_facts(text: str) -> dict[str, Any]:
    """The YAML header of a card as a dict; empty when the card has none. Raises
    ``CheckpointError``."""
    import yaml

    header = HEADER.match(text)
    if header is None:
        return {}
    try:
        data = yaml.safe_load(header.group(1))
    except (yaml.YAMLError, *_UNREADABLE) as error:
        raise CheckpointError(
            f"the header of {CARD} is not YAML: {error}",
            next_step=f"Correct the lines between the two '---' of {CARD}, or remove them.",
        ) from error
    return data if isinstance(data, dict) else {}


# What PyYAML raises besides its own: for a value that is not of the type it is tagged with or looks
# like (a 45th of the month), and for lists in lists without end.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def _texts(value: object) -> tuple[str, ...]:
    """Cards give one value or a list of them. Anything deeper is not a text: written out, a few
    aliases of aliases are gigabytes."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(str(item) for item in items if isinstance(item, (str, int, float)))
