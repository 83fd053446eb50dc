"""What a repo says about itself: licence, gating, the base model its card names.

Taken from the Hub for a Hub repo, from the YAML header of README.md for a folder; the same type
either way. A card is written by its owner: what it says is carried over, never trusted to be right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hubdiff.errors import CheckpointError
from hubdiff.files import FileTree

CARD = "README.md"
_HEADER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class RepoFacts:
    """``licence`` as the card names it ("other" has its name in ``card_data["license_name"]``);
    ``base_model`` as the card lists it, in order; ``card_data`` is the whole header."""

    licence: str | None = None
    gated: bool = False
    private: bool = False
    base_model: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    card_data: dict[str, Any] = field(default_factory=dict)


def facts(tree: FileTree) -> RepoFacts:
    """The facts of a repo at its pinned commit, or of a folder. Raises ``HubError``, or
    ``CheckpointError`` for a card whose header is not YAML."""
    if tree.pin.repo is not None:
        from hubdiff.hub import repo_facts

        return repo_facts(tree.pin)
    if CARD not in tree.files():
        return RepoFacts()
    return facts_from(card_facts(tree.read_bytes(CARD).decode(errors="replace")))


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
        card_data=card_data,
    )


def card_facts(text: str) -> dict[str, Any]:
    """The YAML header of a card as a dict; empty when the card has none."""
    import yaml

    header = _HEADER.match(text)
    if header is None:
        return {}
    try:
        data = yaml.safe_load(header.group(1))
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"the header of {CARD} is not YAML: {error}",
            next_step=f"Correct the lines between the two '---' of {CARD}, or remove them.",
        ) from error
    return data if isinstance(data, dict) else {}


def _texts(value: object) -> tuple[str, ...]:
    """Cards give one value or a list of them."""
    if isinstance(value, (list, tuple)):
        return tuple(str(item) for item in value)
    return () if value is None else (str(value),)
