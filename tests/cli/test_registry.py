"""list, search, lineage, tag, alias and diff as commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import hubdiff as library
from hubdiff.devhub import DevHub
from tests.cli.running import Family, Said

Run = Callable[..., Said]


@pytest.fixture
def delta(devhub: DevHub, new_name: Callable[[], str], family: Family) -> str:
    name = new_name()
    library.push_delta(family.tuned, name, base=family.base)
    return name


def test_list_and_search(hubdiff: Run, delta: str) -> None:
    for words in (("list", "--author", "org"), ("search", delta)):
        said = hubdiff(*words)
        assert said.code == 0, said.err
        assert delta in said.out
        document = json.loads(hubdiff(*words, "--json").out)
        assert delta in {entry["repo"] for entry in document["deltas"]}
    assert hubdiff("search", "nothing-has-this-name").out == "No delta was found.\n"
    assert hubdiff("search").code == 2


def test_lineage(hubdiff: Run, delta: str, tmp_path: Path) -> None:
    said = hubdiff("lineage", delta)
    assert said.code == 0, said.err
    assert said.out.startswith(f"{delta} (delta")
    assert "base of the delta: base (folder) (model)" in said.out
    assert hubdiff("lineage", delta, "--format", "mermaid").out.startswith("flowchart")
    assert hubdiff("lineage", delta, "--format", "dot").out.startswith("digraph")
    for words in (("--json",), ("--format", "json")):
        assert json.loads(hubdiff("lineage", delta, *words).out)["root"] == delta
    page = tmp_path / "page.html"
    assert hubdiff("lineage", delta, "--html", str(page)).code == 0
    assert page.read_text().startswith("<!doctype html>")
    said = hubdiff("lineage", delta, "--html", str(tmp_path / "no" / "x.html"))
    assert said.code == 1


def test_tag_and_alias(hubdiff: Run, delta: str) -> None:
    said = hubdiff("tag", delta, "v1.0")
    assert said.code == 0, said.err
    assert f"{delta}@v1.0" in said.out
    assert (
        json.loads(hubdiff("alias", f"{delta}@v1.0", "production", "--json").out)["before"] is None
    )
    assert hubdiff("inspect", f"{delta}@production").code == 0
    assert hubdiff("alias", delta, "production", "--move", "--remove").code == 2
    assert "is gone" in hubdiff("alias", delta, "production", "--remove").out
    assert hubdiff("tag", delta, "latest").code == 1


def test_diff(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    said = hubdiff("diff", family.base, family.tuned, "--plot", str(picture))
    assert said.code == 0, said.err
    assert picture.exists()
    for words in ("By layer and kind", "The tensors that moved most", "Files", "README.md: added"):
        assert words in said.out
    document = json.loads(hubdiff("diff", family.base, family.tuned, "--json").out)
    assert document["tensors"][0]["name"]
    assert "yes: every weight" in hubdiff("diff", family.base, family.base).out
