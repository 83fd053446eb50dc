"""README's command reference is what the commands say."""

from __future__ import annotations

import pytest

from hubdiff.cli import cli
from hubdiff.cli._reference import BEGIN, END, embed, every_command, reference_markdown
from tests.cli.running import ROOT


def test_the_reference_names_every_command() -> None:
    text = reference_markdown()
    for name, _ in every_command(cli):
        assert f"### `hubdiff {name}`" in text
    assert "| `--tuned-master REF` |" in text


def test_embedding_replaces_what_was_there_and_nothing_else() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = embed(document)
    assert once.startswith(f"before\n{BEGIN}\n### `hubdiff push-delta`")
    assert once.endswith(f"{END}\nafter\n")
    assert "\nold\n" not in once
    assert embed(once) == once


def test_a_document_without_the_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="commands:begin"):
        embed("nothing here")


def test_the_readme_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert embed(readme) == readme, "the command reference is stale: run `make docs`"
