"""watch → run → gate → publish, against the loopback Hub, with a delta that was really trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from backport_world import TASK, World, make_family, worlds

import hubdiff
from hubdiff.backport.gate import gate_item
from hubdiff.backport.publish import publish_item
from hubdiff.backport.run import run
from hubdiff.devhub import DevHub


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def world(
    devhub: DevHub, family: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield from worlds(devhub, family, tmp_path)


def test_a_new_base_becomes_a_pull_request(world):
    world.write_config(["org/base-1"])
    assert world.adopt().items == ()
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    plan = world.plan()
    (item,) = world.watch().items
    results = world.root / "results"
    made = world.command("backport", "run", "plan.json", "results", "--item", item.id)
    print(json.dumps(made, indent=1)[:3000])
    said = gate_item(plan, results, item=item.id)
    print(said)
    done = publish_item(plan, results, item=item.id)
    print(done)
    again = publish_item(plan, results, item=item.id)
    print(again)
    assert again.reused
    card = world.api.hf_hub_download("demo/backports", "README.md", revision="refs/pr/1")
    print(Path(card).read_text())
    print(hubdiff.lineage("hf://demo/backports@refs/pr/1"))
    print(world.api.list_repo_commits("demo/backports", revision="refs/pr/1")[0])
