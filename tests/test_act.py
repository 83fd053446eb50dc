"""The workflows that are shipped, really executed: a user's repository, what `hubdiff init-ci`
writes into it, jobs by act, a loopback Hub, a stand-in for GitHub. hubdiff is the real one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from act.runner import NAME, Repository
from backport_world import TASK, World
from github_fake import GitHubFake
from tiny_tasks import make_tuned

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="act's wheels are for Linux")

Start = Callable[..., Repository]
HOSTILE = 'x";touch${IFS}PWNED;$(touch${IFS}PWNED)`touch${IFS}PWNED`'


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_tuned(tmp_path_factory.mktemp("family"))


@pytest.fixture
def github() -> Iterator[GitHubFake]:
    with GitHubFake() as running:
        yield running


@pytest.fixture
def start(world: World, github: GitHubFake, tmp_path: Path) -> Start:
    """The world's repository on GitHub, with ``bases`` in its hubdiff.yaml, pushed."""

    def begin(bases: list[str], *, branch: str = "main", **inputs: object) -> Repository:
        secrets = {"HF_TOKEN": world.hub.token("demo")}
        given = {"auth": "token", **inputs}
        made = Repository(tmp_path, world.root, world.hub.url, github, secrets, given, branch)
        configure(made, world, bases)
        world.hub.log.clear()
        return made

    return begin


def configure(repository: Repository, world: World, bases: list[str], **changes: object) -> None:
    """A new hubdiff.yaml, pushed. Nothing is evaluated unless ``changes`` say so: what check says
    is enough where it is all about the workflow."""
    world.write_config(bases, **{"eval": None, "gate": None, **changes})
    repository.commit("configure")


EVALUATED = {"eval": {"tasks": [TASK]}, "gate": {"min": 0.5, "max_drop": 0.0}}


@pytest.fixture
def adopted(start: Start, world: World) -> Repository:
    """After the first run, with a new base that came since."""
    return with_new_base(start(["org/base-1"]), world)


def with_new_base(repository: Repository, world: World, **changes: object) -> Repository:
    """``repository`` with the lock that the first run leaves, and a base that came since."""
    world.adopt()
    world.new_base("base-2")
    configure(repository, world, ["org/base-1", "org/base-2"], **changes)
    return repository


def trust(world: World) -> None:
    """The workflow of the repository is a trusted publisher of the results."""
    world.hub.trust(world.results, repository=NAME, branch="main", workflow="hubdiff.yml")


def writes(world: World) -> list[str]:
    """What was changed on the Hub since its log was last cleared."""
    asked = [one for one in world.hub.log.records if one.method not in ("GET", "HEAD")]
    return [f"{one.method} {one.path}" for one in asked if "preupload" not in one.path]


def pull_requests(world: World) -> list[str]:
    return [one.title for one in world.api.get_repo_discussions(world.results)]


def untouched(*folders: Path) -> bool:
    """No command of a hostile name was run."""
    return not [file for folder in folders for file in folder.rglob("PWNED*")]


def test_the_first_run_adopts_and_the_second_finds_nothing(start, world, github):
    world.new_base("base-2")
    repository = start(["org/base-1", "org/base-2"])

    first = repository.run()

    assert first.code == 0, first.output
    assert first.jobs == {"watch": "success", "record": "success", "report": "success"}
    (entry,) = repository.lock()["items"].values()
    assert entry["status"] == "adopted"
    assert entry["base"].startswith("org/base-2@")
    # The job that pushes has the token, and nobody else came to push.
    assert set(first.pushes) == {"x-access-token"}
    assert writes(world) == []

    before = repository.log()
    second = repository.run()

    assert second.code == 0, second.output
    assert second.jobs == {"watch": "success"}  # a quiet day costs one job
    assert second.plan["items"] == second.plan["adopt"] == []
    assert "0 items to do" in second.summary
    assert repository.log() == before
    assert second.pushes == []
    assert writes(world) == []


def test_a_new_base_becomes_a_pull_request_with_its_numbers(start, world, github):
    """Without a secret anywhere: signed in as a trusted publisher."""
    adopted = with_new_base(start(["org/base-1"], auth="oidc"), world, **EVALUATED)
    adopted.secrets.clear()
    trust(world)

    run = adopted.run("repository_dispatch", payload={"base": "org/base-2"})

    assert run.code == 0, run.output
    (item,) = run.plan["items"]
    id = item["id"]
    every = ("watch", f"port {id}", f"publish {id}", "record", "report")
    assert run.jobs == dict.fromkeys(every, "success")
    assert pull_requests(world) == [f"sort on org/base-2 [hubdiff {id}]"]
    entry = adopted.lock()["items"][item["key"]]
    assert entry["status"] == "done"
    assert entry["value"] > 0.5
    assert entry["output"]["pr_url"] in run.summary
    (issue,) = github.issues[NAME]
    assert entry["output"]["pr_url"] in issue["body"]
    # What travels by artifact: results to all, the delta only to the job that publishes it.
    assert {path.name for path in (run.artifacts / f"result-{id}" / id).iterdir()} == {
        "result.json"
    }
    assert (run.artifacts / f"delta-{id}" / id / "delta" / "hubdiff.json").is_file()

    again = adopted.run()
    assert again.jobs.keys() == {"watch"}
    assert len(github.issues[NAME]) == 1


def test_what_the_gate_refuses_is_reported_and_not_published(adopted, world, github):
    asked = {**EVALUATED, "gate": {"min": 1.01}}
    configure(adopted, world, ["org/base-1", "org/base-2"], **asked)
    world.hub.log.clear()

    run = adopted.run()

    assert run.code == 0, run.output
    (item,) = run.plan["items"]
    assert run.steps[f"publish {item['id']}", "Ask the gate"] == "success"
    assert (f"publish {item['id']}", "Publish") not in run.steps
    assert writes(world) == []
    assert adopted.lock()["items"][item["key"]]["status"] == "rejected"
    assert "1.01" in run.summary
    assert "1.01" in github.issues[NAME][0]["body"]


def test_an_item_that_fails_is_nothing_to_the_others(adopted, world, github):
    world.api.create_repo("org/base-3")
    world.api.upload_file(
        path_or_fileobj=b"no weights", path_in_repo="model.safetensors", repo_id="org/base-3"
    )
    configure(adopted, world, ["org/base-1", "org/base-2", "org/base-3"])

    run = adopted.run()

    good, bad = (
        next(item for item in run.plan["items"] if item["base"].startswith(base))
        for base in ("org/base-2@", "org/base-3@")
    )
    assert run.code == 1
    assert run.failed() == {f"port {bad['id']}"}
    assert run.jobs[f"publish {good['id']}"] == "success"
    entries = adopted.lock()["items"]
    assert (entries[good["key"]]["status"], entries[bad["key"]]["status"]) == ("done", "failed")
    assert "the header claims" in entries[bad["key"]]["why"]
    assert "the header claims" in github.issues[NAME][0]["body"]


def test_a_dry_run_changes_nothing_anywhere(adopted, world, github):
    before, issues = adopted.log(), str(github.issues)
    world.hub.log.clear()

    run = adopted.run("workflow_dispatch", inputs={"dry-run": "true"})

    assert run.code == 0, run.output
    (item,) = run.plan["items"]
    assert run.jobs == {"watch": "success", f"port {item['id']}": "success"}
    assert item["id"] in run.summary
    assert writes(world) == []
    assert adopted.log() == before
    assert run.pushes == []
    assert str(github.issues) == issues
    assert {folder.name for folder in run.artifacts.iterdir()} == {"plan"}


def test_an_event_only_narrows(adopted, world):
    payload = {"base": "org/base-1", "config": "/etc/passwd", "adopted": "true", "only": "toy"}
    run = adopted.run("repository_dispatch", payload=payload)
    assert run.code == 0, run.output
    assert run.plan["items"] == []


def test_a_hostile_name_in_an_event_is_only_a_name(start, world, tmp_path):
    repository = start(["org/base-1"])
    for name in (HOSTILE, "--output=PWNED", "${{ secrets.HF_TOKEN }}", "x\ncount=1\nmatrix={}"):
        run = repository.run("repository_dispatch", payload={"base": name})

        assert run.code == 0, run.output
        assert run.plan["items"] == []
        assert world.hub.token("demo") not in run.output
        assert untouched(tmp_path)


def test_hostile_names_of_branches_and_inputs_are_only_names(start, world, tmp_path):
    branch = HOSTILE.replace("`", "'")
    world.new_base("base-2")
    world.api.create_branch(world.results, branch="x;touch${IFS}PWNED")
    repository = start(["org/base-1", "org/base-2"], branch=branch)

    run = repository.run("workflow_dispatch", inputs={"only": HOSTILE, "adopted": "true"})
    assert run.code == 0, run.output
    assert run.plan["items"] == []

    run = repository.run("workflow_dispatch", inputs={"only": "toy/sort", "adopted": "true"})
    assert run.code == 0, run.output
    assert len(run.plan["items"]) == 1
    assert {entry["status"] for entry in repository.lock()["items"].values()} == {"done"}
    assert untouched(tmp_path)


def test_a_push_that_comes_too_late_is_merged(adopted, world):
    """Somebody pushes at the very moment that record does."""
    marker = adopted.folder / "raced"
    hook = adopted.remote / "hooks" / "pre-receive"
    hook.write_text(
        "#!/bin/sh\n"
        f"[ ! -e '{marker}' ] || exit 0\n"
        f"touch '{marker}'\n"
        "unset GIT_QUARANTINE_PATH GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES\n"
        "who='-c user.name=x -c user.email=x@example.org'\n"
        "new=$(git $who commit-tree -p main -m 'somebody else' 'main^{tree}')\n"
        "git update-ref refs/heads/main $new\n"
    )
    hook.chmod(0o755)

    run = adopted.run()

    assert run.code == 0, run.output
    assert marker.exists()
    assert adopted.log()[:2] == ["hubdiff: record 1 item", "somebody else"]
    assert {entry["status"] for entry in adopted.lock()["items"].values()} == {"done"}


def test_killed_between_publish_and_record_the_next_run_publishes_nothing_twice(adopted, world):
    hook = adopted.remote / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho the disk is full >&2\nexit 1\n")
    hook.chmod(0o755)
    first = adopted.run()
    assert first.failed() == {"record"}
    assert "report" in first.jobs
    titles = pull_requests(world)
    assert len(titles) == 1
    hook.unlink()

    second = adopted.run()

    assert second.code == 0, second.output
    (item,) = second.plan["items"]
    assert pull_requests(world) == titles
    published = second.artifacts / f"published-{item['id']}" / item["id"] / "published.json"
    assert '"reused": true' in published.read_text()
    assert adopted.lock()["items"][item["key"]]["status"] == "done"
