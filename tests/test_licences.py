"""Licences of what a delta or a result is made of: worded, and followed from card to card."""

from __future__ import annotations

from pathlib import Path

import models
import on_hub
import pytest
from on_hub import NewName, PutRepo, contents

import hubdiff
from hubdiff.devhub import DevHub
from hubdiff.errors import HubConflict
from hubdiff.facts import card_facts
from hubdiff.licences import Side, conflicts, notices


@pytest.mark.parametrize(
    ("licences", "words"),
    [
        ([], []),
        (["mit", None, "apache-2.0"], []),
        (["llama3.1"], ["Built with Llama", "Llama 3.1 Community License"]),
        (["llama2", "mit"], ["LLAMA 2 Community License"]),
        (["gemma"], ["ai.google.dev/gemma/terms"]),
        (["llama3.1", "gemma, llama3.1"], ["Built with Llama", "Llama 3.1", "Gemma Terms"]),
    ],
)
def test_notices(licences: list[str | None], words: list[str]) -> None:
    said = notices(licences)
    assert len(said) == len(words)
    for line, word in zip(said, words, strict=True):
        assert word in line


@pytest.mark.parametrize(
    ("licences", "words"),
    [
        (["mit", "apache-2.0", "llama3"], []),
        (["gpl-3.0", "mit", "gpl-3.0"], []),
        (["gpl-3.0", "llama3"], ["no further restrictions"]),
        (["cc-by-sa-4.0", "cc-by-nc-4.0"], ["no further restrictions"]),
        (["cc-by-nd-4.0", "mit"], ["forbids sharing"]),
        (["gpl-2.0", "gpl-3.0"], ["under their own licence"]),
        (["cc-by-sa-4.0", "gpl-3.0"], ["under their own licence"]),
        (["gpl-3.0", "agpl-3.0"], []),
        ([None, "gpl-3.0"], []),
    ],
)
def test_conflicts_are_named(licences: list[str | None], words: list[str]) -> None:
    sides = [Side(f"side {number}", licence) for number, licence in enumerate(licences)]
    said = conflicts(sides)
    assert len(said) == len(words), said
    for line, word in zip(said, words, strict=True):
        assert word in line
        assert "side 0" in line


def model(folder: Path, name: str, tensors: on_hub.Tensors, **card: str) -> Path:
    return models.save(folder / name, tensors, files={"README.md": on_hub.card(**card)})


def test_the_chain_is_followed_from_base_to_result(tmp_path: Path) -> None:
    base = models.weights()
    model(tmp_path, "base", base, license="llama3.1")
    model(tmp_path, "tuned", models.moved(base), license="apache-2.0")
    model(tmp_path, "target", models.moved(base, 1e-3, 7), license="gpl-3.0")
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    card = (tmp_path / "delta" / "README.md").read_text()
    assert card_facts(card)["license"] == "llama3.1"
    assert "Built with Llama" in card
    hubdiff.apply(tmp_path / "delta", tmp_path / "target", output=tmp_path / "result")
    card = (tmp_path / "result" / "README.md").read_text()
    assert card_facts(card)["license"] == "llama3.1"
    assert "> Built with Llama" in card
    assert "contradict each other" in card
    assert "no further restrictions" in card
    checked = hubdiff.check(tmp_path / "delta", tmp_path / "target")
    assert checked.verdict.level == "doubtful"
    assert "licence" in checked.verdict.why


@pytest.fixture
def gated(devhub: DevHub, put_repo: PutRepo, tmp_path: Path) -> tuple[str, str, str]:
    """A gated base and a public tune of it, and a public target."""
    base = models.weights()
    repos = []
    for name, tensors in (
        ("base", base),
        ("tuned", models.moved(base)),
        ("target", models.moved(base, 1e-3, 7)),
    ):
        repos.append(put_repo(contents(model(tmp_path, name, tensors, license="llama3.1"))))
    devhub.set_gated(repos[0])
    return repos[0], repos[1], repos[2]


def is_private(hub: DevHub, repo: str) -> bool:
    return bool(on_hub.api(hub).model_info(repo).private)


def test_a_delta_of_a_gated_model_is_private_unless_told_otherwise(
    devhub: DevHub, gated: tuple[str, str, str], new_name: NewName
) -> None:
    base, tuned, target = gated
    delta, open_delta = new_name(), new_name()
    hubdiff.push_delta(tuned, delta, base=base)
    assert is_private(devhub, delta)
    hubdiff.push_delta(tuned, open_delta, base=base, public=True)
    assert not is_private(devhub, open_delta)
    # And so is a result, also of a delta that is public itself.
    result, open_result = new_name(), new_name()
    hubdiff.apply(open_delta, target, push_to=result)
    assert is_private(devhub, result)
    hubdiff.apply(open_delta, target, push_to=open_result, public=True)
    assert not is_private(devhub, open_result)
    # A repo that is public already is not filled with it.
    with pytest.raises(HubConflict, match="public"):
        hubdiff.push_delta(tuned, open_delta, base=base, force=True)


def test_a_delta_of_public_models_is_public(
    devhub: DevHub, gated: tuple[str, str, str], new_name: NewName
) -> None:
    _, tuned, target = gated
    delta = new_name()
    hubdiff.push_delta(tuned, delta, base=target, force=True)
    assert not is_private(devhub, delta)
