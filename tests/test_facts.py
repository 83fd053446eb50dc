"""What a card says, read from its header."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubdiff.errors import CheckpointError
from hubdiff.facts import RepoFacts, card_facts, facts
from hubdiff.files import LocalTree
from hubdiff.refs import ModelRef


def facts_of(folder: Path, card: str | None) -> RepoFacts:
    if card is not None:
        (folder / "README.md").write_text(card)
    return facts(LocalTree(ModelRef.parse(folder)))


def test_the_card_of_a_folder(tmp_path: Path) -> None:
    card = "---\nlicense: mit\nbase_model: org/base\ntags: [a, b]\n---\n# Title\n"
    assert facts_of(tmp_path, card) == RepoFacts(
        licence="mit",
        base_model=("org/base",),
        tags=("a", "b"),
        card_data={"license": "mit", "base_model": "org/base", "tags": ["a", "b"]},
    )


def test_lists_and_single_values_read_alike(tmp_path: Path) -> None:
    card = "---\nlicense: [mit, apache-2.0]\nbase_model: [org/a, org/b]\ntags: one\n---\n"
    found = facts_of(tmp_path, card)
    assert (found.licence, found.base_model, found.tags) == (
        "mit, apache-2.0",
        ("org/a", "org/b"),
        ("one",),
    )


@pytest.mark.parametrize("card", [None, "", "# Title\n", "---\n---\n", "---\njust text\n---\n"])
def test_no_header_no_facts(tmp_path: Path, card: str | None) -> None:
    assert facts_of(tmp_path, card) == RepoFacts()


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: mit\n---",
        "\ufeff---\r\nlicense: mit\r\n---\r\ntext",
        "\n--- \nlicense: mit\n---\n",
    ],
)
def test_header_spellings(text: str) -> None:
    assert card_facts(text) == {"license": "mit"}


def test_a_broken_header_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"README\.md"):
        card_facts("---\nlicense: [mit\n---\n")
