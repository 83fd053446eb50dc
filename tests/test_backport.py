"""watch → run → gate → publish, against the loopback Hub, with a delta that was really trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from backport_world import TASK, World, upload
from safetensors.torch import load_file
from tiny_tasks import make_tuned

import hubdiff
from hubdiff.backport.gate import gate_item
from hubdiff.backport.items import planned_item
from hubdiff.backport.publish import publish_item


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_tuned(tmp_path_factory.mktemp("family"))


def to_do(world: World, **changes: object) -> tuple[Path, str]:
    """A plan with the one item that a new base makes, and its id."""
    world.write_config(["org/base-1"], **changes)
    assert world.adopt().items == ()
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"], **changes)
    (item,) = world.watch().items
    return world.plan(), item.id


def text(world: World, revision: str, path: str = "README.md", repo: str = "") -> str:
    file = world.api.hf_hub_download(repo or world.results, path, revision=revision)
    return Path(file).read_text()


def test_a_new_base_becomes_a_pull_request(world):
    plan, item = to_do(world)
    results = world.root / "results"
    made = world.command("backport", "run", "plan.json", "results", "--item", item)
    assert made["check"]["verdict"] == "go"
    assert made["scores"]["result"][TASK]["value"] > 0.8 > made["scores"]["base"][TASK]["value"]
    assert gate_item(plan, results, item=item).passed
    done = publish_item(plan, results, item=item)
    assert done.pr_url
    assert done.pr_url.endswith("/demo/backports/discussions/1")

    # Its card has the numbers, names the repo it stands in, and the way back.
    card = text(world, "refs/pr/1")
    assert "model-index" in card
    assert f"| {TASK} | 0.95 ± 0.035 | 0 ± 0 |" in card
    assert "hubdiff apply demo/backports --to org/base-2@" in card
    nodes = hubdiff.lineage("hf://demo/backports@refs/pr/1").nodes
    assert {"demo/sort-delta", "org/base-1", "org/base-2"} <= set(nodes)
    # What it makes of the new base is what the old delta makes of it, bit by bit.
    for name, ref in (("new", "hf://demo/backports@refs/pr/1"), ("old", f"hf://{world.source}")):
        hubdiff.apply(ref, "hf://org/base-2", output=world.root / name)
    new, old = (load_file(world.root / name / "model.safetensors") for name in ("new", "old"))
    assert all((new[name] == old[name]).all() for name in old)
    # The key is in the commit; nothing is done twice.
    last = world.api.list_repo_commits(world.results, revision="refs/pr/1")[0]
    assert last.title == f"sort on org/base-2 [hubdiff {item}]"
    assert f"hubdiff-key: {planned_item(plan, item).key}" in last.message
    again = publish_item(plan, results, item=item)
    assert again.reused
    assert again.pr_url == done.pr_url
    assert len(list(world.api.get_repo_discussions(world.results))) == 1
    world.done(world.watch())
    assert world.watch().items == ()


def test_of_several_scales_the_best_is_taken_and_judged_on_the_other_half(world, family):
    tuned = upload(world.hub, "demo/tuned-2", family[1])
    gate = {"min": 0.8, "recovery": 0.8, "tuned": tuned}
    plan, item = to_do(world, scales=[0.1, 1.0], gate=gate)
    made = world.command("backport", "run", "plan.json", "results", "--item", item)
    assert made["scale"] == 1.0
    scores = [made["scores"][side][TASK] for side in ("result", "base", "tuned")]
    assert [score["examples"] for score in scores] == [20, 20, 20]  # of 40: the half that judged
    assert [one["scale"] for one in made["curve"]] == [0.1, 1.0]
    assert made["curve"][0]["value"] < 0.5 < made["curve"][1]["value"]
    said = gate_item(plan, world.root / "results", item=item)
    value, base, best = (score["value"] for score in scores)
    assert said.passed
    assert said.numbers["recovery"] == (value - base) / (best - base)


def test_a_task_that_fails_leaves_a_result_that_says_so(world):
    plan, item = to_do(world)
    (world.root / TASK).unlink()
    failed = world.command("backport", "run", "plan.json", "results", "--item", item, code=1)
    assert "sort_letters" in failed["error"]["message"]
    said = gate_item(plan, world.root / "results", item=item)
    assert "sort_letters" in said.reasons[0]
