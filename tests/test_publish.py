"""run and publish: what is made is what was planned, and nothing is published twice, whatever is
killed when and whoever opens pull requests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import yaml
from backport_world import World
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file

import hubdiff
from hubdiff.backport import publish as publishing
from hubdiff.backport.gate import gate_item
from hubdiff.backport.publish import publish_item
from hubdiff.backport.run import run
from hubdiff.cli import run as cli
from hubdiff.errors import HubdiffError
from hubdiff.jobs import bench
from hubdiff.lab.scores import TaskScore
from tests.github_fake import GitHubFake


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("family")
    base = models.save(folder / "base", models.weights())
    tuned = models.save(folder / "tuned", models.moved(models.weights()))
    return base, tuned, folder / "delta"


class Ready:
    """A plan with one item, nothing measured; ``publish`` as in hubdiff.yaml."""

    def __init__(self, world: World, amount: float = 1e-3, **publish: Any) -> None:
        self.world = world
        settings = {"to": world.results, "as": "delta", "mode": "pr", **publish}
        self._config(["org/base-1"], settings)
        world.adopt()
        world.new_base("base-2", amount=amount)
        self._config(["org/base-1", "org/base-2"], settings)
        (item,) = world.watch().items
        self.plan, self.id, self.key = world.plan(), item.id, item.key
        self.results = world.root / "results"

    def _config(self, bases: list[str], publish: dict[str, Any]) -> None:
        delta = {"source": self.world.source, "publish": publish}
        family = {"bases": bases, "deltas": {"sort": delta}}
        self.world.config.write_text(yaml.safe_dump({"families": {"toy": family}}))

    def run(self, **how: Any):
        return run(self.plan, self.results, item=self.id, **how)

    def publish(self, **how: Any):
        return publish_item(self.plan, self.results, item=self.id, **how)

    def weights(self, revision: str) -> dict[str, torch.Tensor]:
        """What the result at ``revision`` of the repo is: the model, or the delta on its base."""
        out = self.world.root / f"out-{revision.replace('/', '-')}"
        files = self.world.api.list_repo_files(self.world.results, revision=revision)
        if "hubdiff.json" in files:
            hubdiff.apply(f"hf://{self.world.results}@{revision}", "hf://org/base-2", output=out)
            return load_file(out / "model.safetensors")
        path = self.world.api.hf_hub_download(
            self.world.results, "model.safetensors", revision=revision
        )
        return load_file(path)

    def expected(self) -> dict[str, torch.Tensor]:
        out = self.world.root / "expected"
        if not out.exists():
            hubdiff.apply(f"hf://{self.world.source}", "hf://org/base-2", output=out)
        return load_file(out / "model.safetensors")

    def pulls(self) -> list[Any]:
        return list(self.world.api.get_repo_discussions(self.world.results))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("kind", ["delta", "merged"])
@pytest.mark.parametrize("mode", ["pr", "branch"])
def test_published_once_and_the_right_bits(world, kind, mode):
    ready = Ready(world, **{"as": kind}, mode=mode)
    assert ready.run().document["status"] == "ran"
    assert ready.publish(dry_run=True).dry_run
    assert ready.pulls() == []
    done = ready.publish()
    where = "refs/pr/1" if mode == "pr" else f"hubdiff/{ready.id}"
    assert (done.branch, bool(done.pr_url)) == (None if mode == "pr" else where, mode == "pr")
    assert same(ready.weights(where), ready.expected())
    last = world.api.list_repo_commits(world.results, revision=where)[0]
    assert last.commit_id == done.commit
    assert f"hubdiff-key: {ready.key}" in last.message
    card = Path(world.api.hf_hub_download(world.results, "README.md", revision=where)).read_text()
    assert card.count("## How it was ported") == 1
    again = ready.publish()
    assert (again.reused, again.commit) == (True, done.commit)
    assert len(ready.pulls()) == (1 if mode == "pr" else 0)
    assert world.api.model_info(world.results).sha != done.commit  # main is as it was


def test_none_is_measured_only(world):
    ready = Ready(world, mode="none")
    ready.run()
    assert not (ready.results / ready.id / "delta").exists()
    assert ready.publish().url is None


@pytest.mark.parametrize("kind", ["delta", "merged"])
@pytest.mark.parametrize("mode", ["pr", "branch"])
def test_killed_right_after_publishing_the_rerun_finds_it(world, kind, mode):
    """All of the run's files are lost with it, as in a new job; what it made is on the Hub."""
    ready = Ready(world, **{"as": kind}, mode=mode)
    ready.run()
    first = ready.publish()
    shutil.rmtree(ready.results)
    ready.run()
    again = ready.publish()
    assert (again.reused, again.commit) == (True, first.commit)
    assert len(ready.pulls()) == (1 if mode == "pr" else 0)


@pytest.mark.parametrize("mode", ["pr", "branch"])
def test_killed_in_the_middle_of_a_merged_model_the_rerun_completes_it(world, mode, monkeypatch):
    ready = Ready(world, **{"as": "merged"}, mode=mode)
    ready.run()
    real = publishing._Publish._with_section

    def killed(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing._Publish, "_with_section", killed)
    with pytest.raises(KeyboardInterrupt):
        ready.publish()
    monkeypatch.setattr(publishing._Publish, "_with_section", real)
    done = ready.publish()
    where = "refs/pr/1" if mode == "pr" else f"hubdiff/{ready.id}"
    assert same(ready.weights(where), ready.expected())
    card = Path(world.api.hf_hub_download(world.results, "README.md", revision=where)).read_text()
    assert card.count("## How it was ported") == 1
    assert len(ready.pulls()) == (1 if mode == "pr" else 0)
    assert ready.publish().commit == done.commit


@pytest.mark.parametrize("kind", ["delta", "merged"])
@pytest.mark.parametrize("mode", ["pr", "branch"])
def test_what_people_added_to_it_stays(world, kind, mode):
    ready = Ready(world, **{"as": kind}, mode=mode)
    ready.run()
    first = ready.publish()
    where = "refs/pr/1" if mode == "pr" else f"hubdiff/{ready.id}"
    world.api.create_commit(
        world.results,
        [CommitOperationAdd("notes.md", b"mine")],
        commit_message="notes",
        revision=where,
    )
    again = ready.publish()
    assert (again.reused, again.commit) == (True, first.commit)
    assert "notes.md" in world.api.list_repo_files(world.results, revision=where)
    card = Path(world.api.hf_hub_download(world.results, "README.md", revision=where)).read_text()
    assert card.count("## How it was ported") == 1


@pytest.mark.parametrize("kind", ["delta", "merged"])
def test_a_pull_request_of_somebody_else_is_not_ours(world, kind):
    """Anybody may open one with our title, and make the same delta: what else is in it counts."""
    ready = Ready(world, **{"as": kind})
    ready.run()
    delta = ready.results / ready.id / "delta"
    files = [path for path in delta.rglob("*") if path.is_file() and path.name != "README.md"]
    HfApi(endpoint=world.hub.url, token=world.hub.token("other")).create_commit(
        world.results,
        [
            *(CommitOperationAdd(str(path.relative_to(delta)), path) for path in files),
            CommitOperationAdd("README.md", b"# something else"),
        ],
        commit_message=f"sort on org/base-2 [hubdiff {ready.id}]",
        create_pr=True,
    )
    done = ready.publish()
    assert not done.reused
    assert done.pr_url
    assert done.pr_url.endswith("/2")


def test_made_again_with_other_bytes_it_is_still_the_same_item(world):
    """As by another version of hubdiff, whose number stands in the manifest."""
    ready = Ready(world)
    ready.run()
    first = ready.publish()
    manifest = ready.results / ready.id / "delta" / "hubdiff.json"
    document = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps({**document, "hubdiff_version": "9"}))
    again = ready.publish()
    assert (again.reused, again.commit) == (True, first.commit)
    assert len(ready.pulls()) == 1


@pytest.mark.parametrize("kind", ["delta", "merged"])
def test_a_trusted_publisher_finds_what_one_published(world, monkeypatch, kind):
    """Its token is of no user, so nobody can be asked for whose the pull request is."""
    ready = Ready(world, **{"as": kind})
    ready.run()
    world.hub.trust(world.results, repository="me/models", pull_requests=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", world.results)
    words = ["backport", "publish", str(ready.plan), str(ready.results), "--item", ready.id]
    with GitHubFake() as github:
        for name, value in github.environment(repository="me/models").items():
            monkeypatch.setenv(name, value)
        first, again = world.command(*words), world.command(*words)
    assert (again["reused"], again["commit"]) == (True, first["commit"])
    assert [one.author for one in ready.pulls()] == ["[OIDC]"]


def test_the_repo_must_exist(world):
    ready = Ready(world, to="demo/not-there")
    ready.run()
    with pytest.raises(HubdiffError, match="demo/not-there") as caught:
        ready.publish()
    assert "Create it first" in str(caught.value.next_step)
    assert not world.api.repo_exists("demo/not-there")


@pytest.mark.parametrize("kind", ["delta", "merged"])
def test_what_is_gated_does_not_become_public_by_accident(world, kind):
    ready = Ready(world, **{"as": kind})
    ready.run()
    world.api.update_repo_settings("org/base-2", gated="auto")
    with pytest.raises(HubdiffError, match=r"org/base-2@.* is gated or private") as caught:
        ready.publish()
    assert "public: true" in str(caught.value.next_step)
    assert ready.pulls() == []
    world.api.update_repo_settings(world.results, private=True)
    assert ready.publish().pr_url


def test_what_is_gated_becomes_public_where_one_says_so(world):
    ready = Ready(world, public=True)
    ready.run()
    world.api.update_repo_settings("org/base-2", gated="auto")
    assert ready.publish().pr_url


def test_a_token_that_opens_no_pull_requests_gets_a_branch(world, monkeypatch):
    from hubdiff.errors import AuthError
    from hubdiff.hub import HubUpload

    ready = Ready(world)
    ready.run()
    real = HubUpload.commit

    def refused(self: HubUpload, *words: str) -> Any:
        if self._create_pr:
            raise AuthError("403")
        return real(self, *words)

    monkeypatch.setattr(HubUpload, "commit", refused)
    done = ready.publish()
    assert (done.mode, done.branch) == ("branch", f"hubdiff/{ready.id}")
    assert ready.publish().reused


# --- what comes from a job that ran somebody's code ---


def test_the_gate_is_asked_again(world):
    ready = Ready(world)
    ready.run()
    file = ready.results / ready.id / "result.json"
    document = json.loads(file.read_text())
    document["check"]["verdict"] = "doubtful"
    file.write_text(json.dumps(document))
    (file.parent / "gate.json").write_text('{"passed": true}')
    with pytest.raises(HubdiffError, match="check says doubtful"):
        ready.publish()
    assert ready.pulls() == []


def test_a_result_of_another_item_is_not_published(world):
    """Or it would be published, and then recorded as failed."""
    ready = Ready(world)
    ready.run()
    file = ready.results / ready.id / "result.json"
    document = json.loads(file.read_text())
    document["item"]["key"] = "0" * 64
    file.write_text(json.dumps(document))
    for stage in (gate_item, publish_item):
        with pytest.raises(HubdiffError, match="is of another item"):
            stage(ready.plan, ready.results, item=ready.id)


def test_a_delta_of_another_base_is_not_published(world):
    ready = Ready(world)
    ready.run()
    folder = ready.results / ready.id / "delta"
    shutil.rmtree(folder)
    tuned = models.save(world.root / "tuned", models.moved(models.weights(), seed=5))
    hubdiff.push_delta(tuned, folder, base="hf://org/base-1")
    with pytest.raises(HubdiffError, match="is a delta of org/base-1"):
        ready.publish()


def test_a_link_in_the_results_is_not_followed(world):
    ready = Ready(world)
    ready.run()
    (ready.results / ready.id / "delta" / "more.txt").symlink_to("/etc/hostname")
    with pytest.raises(HubdiffError, match="is a link"):
        ready.publish()


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("more.txt", False),
        ("more.txt", True),
        ("tuned/model.pkl", False),
        ("tuned/model.pkl", True),
        ("delta-extra.safetensors", False),
    ],
)
def test_a_file_that_is_no_part_of_a_delta_is_not_published(world, name, listed):
    """Also where the manifest, which the same job wrote, lists it."""
    ready = Ready(world)
    ready.run()
    folder = ready.results / ready.id / "delta"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"cos\nsystem\n")
    if listed:
        file = folder / "hubdiff.json"
        document = json.loads(file.read_text())
        document["side_files"].append({"path": name, "size": 11, "sha256": "0" * 64})
        file.write_text(json.dumps(document))
    with pytest.raises(HubdiffError):
        ready.publish()
    assert ready.pulls() == []


def test_a_scale_that_was_not_to_be_tried_is_refused(world):
    ready = Ready(world)
    ready.run()
    file = ready.results / ready.id / "result.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "scale": 7.0}))
    with pytest.raises(HubdiffError, match="scale 7"):
        ready.publish()


def test_a_card_may_be_any_bytes(world):
    ready = Ready(world)
    ready.run()
    (ready.results / ready.id / "delta" / "README.md").write_bytes(b"\xff ")
    ready.publish()
    card = world.api.hf_hub_download(world.results, "README.md", revision="refs/pr/1")
    assert Path(card).read_text("utf-8").startswith("\ufffd\n\n## How it was ported")


@pytest.mark.parametrize("content", ["{}", '{"items": null}', '{"items": {"a": 1}}'])
def test_what_is_no_plan_is_said(tmp_path, content):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"version": 1, **json.loads(content)}))
    for stage in (run, publish_item, gate_item):
        with pytest.raises(HubdiffError, match="is no plan"):
            stage(plan, tmp_path, item="0" * 12)


@pytest.mark.parametrize("wanted", ["../../etc", "", "0" * 12, "0123456789AB"])
def test_an_item_that_is_not_planned_is_refused(world, wanted):
    ready = Ready(world)
    for stage in (run, publish_item, gate_item):
        with pytest.raises(HubdiffError, match=r"item"):
            stage(ready.plan, ready.results, item=wanted)


# --- run ---


def test_what_does_not_fit_the_disk_is_said_before_the_work(world):
    ready = Ready(world)
    plan = json.loads(ready.plan.read_text())
    plan["items"][0]["disk_gb"] = 0.1
    ready.plan.write_text(json.dumps(plan))
    with pytest.raises(HubdiffError, match=r"needs 0\.3 GB of disk, and 0\.1 GB are there"):
        ready.run()
    document = json.loads((ready.results / ready.id / "result.json").read_text())
    assert document["status"] == "failed"
    assert not gate_item(ready.plan, ready.results, item=ready.id).passed


def test_scores_that_choose_no_scale_are_said_after_the_first_evaluation(world, monkeypatch):
    evaluated = []

    class Perplexity:
        """A bench whose scores are no means over the examples."""

        def __init__(self, *_: Any) -> None:
            pass

        def evaluate(self, subject: bench.Subject) -> Any:
            evaluated.append(subject)
            return SimpleNamespace(
                scores=(
                    TaskScore(
                        name="t",
                        metrics=("word_perplexity",),
                        value=9.0,
                        stderr=None,
                        higher_is_better=False,
                        examples=4,
                        fewshot=0,
                        version="1",
                        dataset=None,
                        dataset_config=None,
                        dataset_commit=None,
                        kind="generate_until",
                        measured=(),
                    ),
                )
            )

    monkeypatch.setattr(bench, "Bench", Perplexity)
    ready = Ready(world)
    plan = json.loads(ready.plan.read_text())
    asked = plan["items"][0]
    asked["evaluation"]["tasks"], asked["gate"]["task"], asked["scales"] = ["t"], "t", [0.5, 1.0]
    ready.plan.write_text(json.dumps(plan))
    with pytest.raises(HubdiffError, match="one half of the examples of t can't choose a scale"):
        ready.run()
    assert len(evaluated) == 1


def test_what_check_refuses_is_not_made(world):
    ready = Ready(world, amount=30.0)
    document = ready.run().document
    assert document["status"] == "refused"
    said = gate_item(ready.plan, ready.results, item=ready.id)
    assert said.reasons == (document["why"],)
    with pytest.raises(HubdiffError, match="is not published"):
        ready.publish()


def test_a_dry_run_leaves_no_file(world):
    ready = Ready(world)
    made = ready.run(dry_run=True)
    assert made.document["check"]["verdict"] == "go"
    assert not ready.results.exists()


def test_the_commands(world, capsys, monkeypatch):
    monkeypatch.chdir(world.root)
    ready = Ready(world)
    where = ["plan.json", "results", "--item", ready.id]
    assert cli(["backport", "run", *where]) == 0
    assert cli(["backport", "gate", *where, "--dry-run"]) == 0
    assert not (ready.results / ready.id / "gate.json").exists()
    assert cli(["backport", "gate", *where]) == 0
    assert cli(["backport", "publish", *where, "--dry-run"]) == 0
    assert cli(["backport", "publish", *where]) == 0
    said = capsys.readouterr().out
    assert "passed" in said
    assert f"published: {world.hub.url}/demo/backports/discussions/1" in said
    file = ready.results / ready.id / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "failed"}))
    assert cli(["backport", "gate", *where]) == 4
    assert cli(["backport", "gate", "plan.json", "nowhere", "--item", ready.id]) == 1
