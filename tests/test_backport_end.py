"""What comes after run and gate, all of it real: published by a trusted publisher, recorded with
git, reported to a stand-in for GitHub. Then a poll finds nothing to do."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from backport_world import World
from tiny_tasks import make_tuned

from hubdiff.backport.lock import read_lock
from hubdiff.backport.record import record
from hubdiff.backport.report import report
from tests.github_fake import GitHubFake

GITHUB = "acme/models"
UNMEASURED = {"eval": None, "gate": None}  # tests/test_backport.py measures


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_tuned(tmp_path_factory.mktemp("family"))


@pytest.fixture
def job(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHubFake]:
    """The environment of a job that may have ID tokens, and no token of any user."""
    with GitHubFake() as github:
        claims = {
            "repository": GITHUB,
            "ref": "refs/heads/main",
            "workflow_ref": f"{GITHUB}/.github/workflows/hubdiff.yml@refs/heads/main",
        }
        for name, value in github.environment(**claims).items():
            monkeypatch.setenv(name, value)
        yield github


def git(folder: Path, *command: str) -> str:
    named = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    done = subprocess.run(
        ["git", *named, *command], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def under_git(world: World) -> Path:
    """The user's repository, with a bare remote that has its first commit."""
    remote = world.root.parent / "remote.git"
    git(world.root, "init", "-q", "-b", "main")
    git(world.root, "add", "hubdiff.yaml", "tasks")
    git(world.root, "commit", "-q", "-m", "first")
    git(world.root.parent, "init", "-q", "--bare", "-b", "main", str(remote))
    git(world.root, "remote", "add", "origin", str(remote))
    git(world.root, "push", "-q", "-u", "origin", "main")
    return remote


def test_published_without_secrets_recorded_and_reported(
    world: World, job: GitHubFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a branch, where the token opens no pull requests; with them: tests/test_act.py."""
    world.hub.trust(
        world.results,
        repository=GITHUB,
        workflow="hubdiff.yml",
        branch="main",
        pull_requests=False,
    )
    world.write_config(["org/base-1"], **UNMEASURED)
    remote = under_git(world)
    results = world.root.parent / "results"
    # Adopted at first: one commit, nothing else.
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"], **UNMEASURED)
    plan = world.plan()
    assert record(plan, results, lock=world.lock, push=True).pushed
    assert [entry["status"] for entry in world_lock(world)] == ["adopted"]
    # A new base.
    world.new_base("base-3", seed=3)
    world.write_config(["org/base-1", "org/base-2", "org/base-3"], **UNMEASURED)
    (item,) = world.watch().items
    plan = world.plan()
    world.command("backport", "run", str(plan), str(results), "--item", item.id)
    with monkeypatch.context() as publisher:
        publisher.delenv("HF_TOKEN")
        publisher.setenv("HF_OIDC_RESOURCE", world.results)
        done = world.command("backport", "publish", str(plan), str(results), "--item", item.id)
        again = world.command("backport", "publish", str(plan), str(results), "--item", item.id)
    assert done["pr_url"] is None
    assert again["reused"]
    assert (again["pr_url"], again["commit"]) == (done["pr_url"], done["commit"])
    last = world.api.list_repo_commits(world.results, revision=item.branch)[0]
    assert last.authors == ["[OIDC]"]

    told = report(plan, results, lock=world.lock, issue=GITHUB)
    assert told.action == "created"
    made = record(plan, results, lock=world.lock, push=True)
    assert made.outcomes[0]["status"] == "done"
    assert made.outcomes[0]["output"]["pr_url"] == done["pr_url"]
    assert git(remote, "log", "--format=%s", "main").splitlines() == [
        "hubdiff: record 1 item",
        "hubdiff: record 1 item",
        "first",
    ]
    (issue,) = job.issues[GITHUB]
    assert f"[branch]({again['url']})" in issue["body"]
    # And that is all: nothing is to be done, told or recorded.
    assert world.watch().items == ()
    plan = world.plan()
    assert record(plan, results, lock=world.lock, push=True).commit is None
    assert report(plan, results, lock=world.lock, issue=GITHUB).action == "unchanged"


def world_lock(world: World) -> list[dict[str, object]]:
    return list(read_lock(world.lock).items.values())


def test_a_publisher_of_another_repository_publishes_nothing(
    world: World, job: GitHubFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.hub.trust(world.results, repository="acme/other")
    world.write_config(["org/base-1"], **UNMEASURED)
    world.adopt()
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"], **UNMEASURED)
    (item,) = world.watch().items
    plan, results = world.plan(), world.root.parent / "results"
    world.command("backport", "run", str(plan), str(results), "--item", item.id)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", world.results)
    said = world.command("backport", "publish", str(plan), str(results), "--item", item.id, code=1)
    assert "error" in said
    assert list(world.api.get_repo_discussions(world.results)) == []
    assert [ref.name for ref in world.api.list_repo_refs(world.results).branches] == ["main"]
