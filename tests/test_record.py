"""record: what the jobs left becomes one commit of the lock, whatever they left and whoever else
pushes. Git is the real one, with a bare repository as the remote."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubdiff.backport import record as module
from hubdiff.backport.lock import Lock, parse_lock, read_lock
from hubdiff.backport.outcomes import (
    Outcome,
    hub_address,
    merge_outcomes,
    now,
    read_outcomes,
    read_planned,
)
from hubdiff.backport.record import record
from hubdiff.errors import HubdiffError
from tests.backport_items import leave, leave_done, make_item, published, ran, write_plan

AUTHOR = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
NAMED = ["-c", "user.name=me", "-c", "user.email=me@example.org"]


def git(folder: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", *NAMED, *command],
        cwd=folder,
        env=os.environ | AUTHOR,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AUTHOR.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("GITHUB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")  # nothing is asked of it
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.0)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A bare repository with one commit on ``main``."""
    bare, first = tmp_path / "remote.git", tmp_path / "first"
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(bare))
    git(tmp_path, "clone", "-q", str(bare), str(first))
    git(first, "checkout", "-q", "-b", "main")
    (first / "hubdiff.yaml").write_text("families: {}\n")
    git(first, "add", ".")
    git(first, "commit", "-q", "-m", "first")
    git(first, "push", "-q", "origin", "main")
    return bare


@pytest.fixture
def clone(remote: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        git(tmp_path, "clone", "-q", str(remote), str(tmp_path / name))
        return tmp_path / name

    return make


@pytest.fixture
def here(clone: Callable[[str], Path]) -> Path:
    return clone("here")


def remote_lock(remote: Path) -> Lock:
    return parse_lock(git(remote, "show", "main:hubdiff.lock"), "remote")


def subjects(folder: Path, ref: str = "main") -> list[str]:
    return git(folder, "log", "--format=%s", ref).splitlines()


def go(folder: Path, plan: Path, results: Path, **options: Any) -> module.Recorded:
    return record(plan, results, lock=folder / "hubdiff.lock", **options)


# --- what becomes of an item ---


def statuses(tmp_path: Path, *items: Any, results: Path) -> dict[str, Outcome]:
    planned = read_planned(write_plan(tmp_path / "p", *items))
    return {one.item.id: one for one in read_outcomes(planned, results)}


def test_each_way_an_item_can_end(tmp_path: Path) -> None:
    items = [make_item(n) for n in range(1, 7)] + [make_item(7, mode="none", to=None)]
    done, refused, worse, unpublished, failed, _, kept = items
    results = tmp_path / "results"
    leave_done(results, done)
    leave(results, refused, result=ran(refused, status="refused", why="another architecture"))
    leave(results, worse, result=ran(worse, value=0.45), published=published(worse))
    leave(results, unpublished, result=ran(unpublished))
    leave(results, failed, result=ran(failed, status="failed", why="no room on the disk"))
    leave(results, kept, result=ran(kept))
    found = statuses(tmp_path, *items, results=results)
    assert [(found[i.id].status, found[i.id].why) for i in items] == [
        ("done", None),
        ("rejected", "another architecture"),
        ("rejected", "sums is 0.45, and must be 0.5 at least"),
        ("failed", "it was not published"),
        ("failed", "no room on the disk"),
        ("failed", "its job left no result"),
        ("done", None),
    ]
    entry = found[done.id].entry("2026-11-28T07:00:00Z")
    assert (entry["scale"], entry["value"], entry["attempts"]) == (0.8, 0.7, 1)
    assert entry["output"]["branch"] == done.branch
    assert found[kept.id].output is None


def test_without_any_results_every_item_failed(tmp_path: Path) -> None:
    found = statuses(tmp_path, make_item(1), make_item(2), results=tmp_path / "none")
    assert {one.status for one in found.values()} == {"failed"}


OUTSIDE = b'{"secret": "outside"}'


def _link_file(folder: Path, outside: Path) -> None:
    (folder / "result.json").unlink()
    (folder / "result.json").symlink_to(outside)


def _link_folder(folder: Path, outside: Path) -> None:
    folder.rename(outside.parent / "moved")
    folder.symlink_to(outside.parent / "moved")


def _pipe(folder: Path, outside: Path) -> None:
    (folder / "result.json").unlink()
    os.mkfifo(folder / "result.json")


def _folder_as_file(folder: Path, outside: Path) -> None:
    (folder / "result.json").unlink()
    (folder / "result.json").mkdir()


def _large(folder: Path, outside: Path) -> None:
    with (folder / "result.json").open("r+b") as file:
        file.truncate(17 << 20)


@pytest.mark.parametrize("spoil", [_link_file, _link_folder, _pipe, _folder_as_file, _large])
def test_nothing_but_a_plain_file_in_its_folder_is_read(
    tmp_path: Path, spoil: Callable[[Path, Path], None]
) -> None:
    item, results = make_item(), tmp_path / "results"
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(ran(item)))
    spoil(leave_done(results, item), outside)
    found = statuses(tmp_path, item, results=results)[item.id]
    assert found.status == "failed"
    assert found.why is not None
    assert "result.json" in found.why


ITEM = make_item()
HOSTILE = {
    "not JSON": b"{",
    "not an object": b"[]",
    "deep": b"[" * 100_000,
    "NaN": json.dumps(ran(ITEM, value=float("nan"))).encode(),
    "huge number": b'{"version": 1, "scale": ' + b"9" * 5000 + b"}",
    "no UTF-8": b"\xff\xfe{}",
    "another version": ran(ITEM, version=2),
    "another item": ran(make_item(2)),
    "no item": ran(ITEM, item=None),
    "no status": ran(ITEM, status=None),
    "scores of another kind": ran(ITEM, scores=[1, 2]),
    "a score of another kind": ran(ITEM, scores={"result": {"sums": {"value": "0.9"}}}),
    "true for a number": ran(ITEM, scores={"result": {"sums": {"value": True}}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_result_that_is_not_one_is_never_done(tmp_path: Path, name: str) -> None:
    leave(tmp_path / "results", ITEM, result=HOSTILE[name], published=published(ITEM))
    found = statuses(tmp_path, ITEM, results=tmp_path / "results")[ITEM.id]
    assert found.status in ("failed", "rejected")
    assert len(found.why or "") <= 500
    json.dumps(found.entry(now()), allow_nan=False)


@pytest.mark.parametrize(
    "said",
    [
        {"to": "you/ports"},
        {"commit": "main"},
        {"branch": "main"},
        {"branch": "refs/pr/x"},
        {"url": "https://huggingface.co.evil.org/me/ports"},
        {"url": "https://huggingface.co/you/ports"},
        {"url": "https://huggingface.co/me/ports-2"},
        {"url": "https://huggingface.co/me/ports/../../you"},
        {"url": "https://huggingface.co/me/ports/)[x](https://evil.org)"},
        {"url": "javascript:alert(1)"},
        {"pr_url": "https://evil.org/"},
        {"pr_url": 5},
    ],
)
def test_only_addresses_of_the_planned_repo_are_kept(tmp_path: Path, said: dict[str, Any]) -> None:
    spoiled = {**published(ITEM), **said}
    leave(tmp_path / "results", ITEM, result=ran(ITEM), published=spoiled)
    found = statuses(tmp_path, ITEM, results=tmp_path / "results")[ITEM.id]
    assert (found.status, found.output) == ("failed", None)
    assert found.why is not None
    assert found.why.startswith("published.json")


def test_what_a_result_says_of_its_item_does_not_count(tmp_path: Path) -> None:
    claims = {**ITEM.as_json(), "gate": {"min": 0.0}, "publish": {"to": "evil/x"}}
    leave(tmp_path / "results", ITEM, result=ran(ITEM, value=0.1, item=claims))
    found = statuses(tmp_path, ITEM, results=tmp_path / "results")[ITEM.id]
    assert found.status == "rejected"
    assert found.entry(now())["base"] == ITEM.base


def test_the_hub_may_be_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1234/")
    assert hub_address("http://127.0.0.1:1234/me/x/discussions/3", "me/x")
    assert hub_address("https://huggingface.co/me/x", "me/x") is None


# --- the commit ---


def test_a_commit_holds_the_lock_and_says_what_became_of_what(
    here: Path, remote: Path, tmp_path: Path
) -> None:
    one, two = make_item(1), make_item(2, base="org/newer")
    leave_done(tmp_path / "results", one)
    plan = write_plan(
        tmp_path / "p",
        one,
        two,
        adopt=(make_item(3),),
        bases={"org/base": {"commit": "1" * 40, "weights": one.weights}},
        deltas={one.source: {"base": "org/old@" + "2" * 40}},
    )
    done = go(here, plan, tmp_path / "results", push=True)
    assert (done.pushed, len(done.outcomes)) == (True, 3)
    assert git(here, "show", "--name-only", "--format=%B", "HEAD").splitlines() == [
        "hubdiff: record 3 items",
        "",
        f"- toy/math on org/base@{one.base[-40:][:12]}: done",
        f"- toy/math on org/newer@{two.base[-40:][:12]}: failed",
        f"- toy/math on org/base@{make_item(3).base[-40:][:12]}: adopted",
        "",
        "",
        "hubdiff.lock",
    ]
    assert git(here, "rev-parse", "HEAD") == git(remote, "rev-parse", "main") == done.commit
    assert git(here, "status", "--porcelain") == ""
    lock = remote_lock(remote)
    assert lock == read_lock(here / "hubdiff.lock")
    assert {entry["status"] for entry in lock.items.values()} == {"done", "failed", "adopted"}
    assert lock.deltas.keys() == {one.source}


def test_recording_twice_is_one_commit(
    here: Path, remote: Path, tmp_path: Path, clone: Callable[[str], Path]
) -> None:
    item, results = make_item(), tmp_path / "results"
    leave_done(results, item)
    plan = write_plan(tmp_path / "p", item, make_item(2), adopt=(make_item(3),))
    stale = clone("stale")  # as a job that is run again checks out the commit of the first time
    assert go(here, plan, results, push=True).commit
    again = go(here, plan, results, push=True)
    assert (again.commit, again.outcomes) == (None, ())
    assert go(stale, plan, results, push=True).commit is None
    assert len(subjects(remote)) == 2


def test_a_job_that_is_run_again_and_succeeds_replaces_its_failure(
    here: Path, remote: Path, tmp_path: Path
) -> None:
    item, results = make_item(), tmp_path / "results"
    plan = write_plan(tmp_path / "p", item)
    go(here, plan, results, push=True)
    assert remote_lock(remote).items[item.key]["status"] == "failed"
    leave_done(results, item)
    go(here, plan, results, push=True)
    assert remote_lock(remote).items[item.key]["status"] == "done"
    (results / item.id / "result.json").unlink()
    assert go(here, plan, results, push=True).commit is None


def test_an_older_run_undoes_nothing(here: Path, tmp_path: Path) -> None:
    """A run whose artifacts are gone is recorded again, after a later attempt."""
    first, second = make_item(attempt=1), make_item(attempt=2)
    old, empty = write_plan(tmp_path / "old", first), tmp_path / "empty"
    go(here, write_plan(tmp_path / "new", second), empty)
    assert go(here, old, empty).commit is None
    leave(tmp_path / "r", second, result=ran(second, value=0.1))
    go(here, write_plan(tmp_path / "new", second), tmp_path / "r")
    assert go(here, write_plan(tmp_path / "new", second), empty).commit is None
    entry = read_lock(here / "hubdiff.lock").items[first.key]
    assert (entry["status"], entry["attempts"]) == ("rejected", 2)


def test_other_settings_are_another_try(here: Path, tmp_path: Path) -> None:
    rejected = make_item(attempt=2)
    leave(tmp_path / "r", rejected, result=ran(rejected, value=0.1))
    go(here, write_plan(tmp_path / "p", rejected), tmp_path / "r")
    changed = replace(rejected, settings="6" * 64, attempt=1)
    assert go(here, write_plan(tmp_path / "q", changed), tmp_path / "none").commit
    entry = read_lock(here / "hubdiff.lock").items[changed.key]
    assert (entry["status"], entry["attempts"], entry["settings"]) == ("failed", 1, "6" * 64)


def test_attempts_are_counted(here: Path, tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        item = make_item(attempt=attempt)
        go(here, write_plan(tmp_path / "p", item), tmp_path / "results")
        entry = read_lock(here / "hubdiff.lock").items[item.key]
        assert (entry["status"], entry["attempts"]) == ("failed", attempt)


def test_nothing_to_record_is_no_commit(here: Path, remote: Path, tmp_path: Path) -> None:
    for push in (False, True):
        done = go(here, write_plan(tmp_path / "p"), tmp_path / "results", push=push)
        assert (done.commit, done.message) == (None, None)
    assert not (here / "hubdiff.lock").exists()
    assert subjects(remote) == ["first"]


def test_a_base_that_merely_moved_is_no_commit_but_a_new_one_is(
    here: Path, remote: Path, tmp_path: Path
) -> None:
    def look(**bases: str) -> module.Recorded:
        seen = {name: {"commit": commit * 40, "weights": "0"} for name, commit in bases.items()}
        return go(here, write_plan(tmp_path / "p", bases=seen), tmp_path / "r", push=True)

    assert look(a="1").message == "hubdiff: record what is watched"
    assert look(a="2").commit is None
    assert look(a="3", b="1").commit
    assert remote_lock(remote).bases["a"]["commit"] == "3" * 40
    assert len(subjects(remote)) == 3


def test_a_dry_run_says_it_and_changes_nothing(here: Path, remote: Path, tmp_path: Path) -> None:
    item = make_item()
    leave_done(tmp_path / "results", item)
    plan = write_plan(tmp_path / "p", item)
    said = go(here, plan, tmp_path / "results", push=True, dry_run=True)
    assert (said.commit, said.pushed, said.dry_run) == (None, False, True)
    assert not (here / "hubdiff.lock").exists()
    done = go(here, plan, tmp_path / "results", push=True)
    assert said.message == done.message
    assert [one["status"] for one in said.outcomes] == [one["status"] for one in done.outcomes]
    assert subjects(remote) == ["hubdiff: record 1 item", "first"]


def test_what_is_changed_or_staged_stays_as_it_is(here: Path, remote: Path, tmp_path: Path) -> None:
    (here / "hubdiff.yaml").write_text("changed\n")
    (here / "staged").write_text("staged\n")
    git(here, "add", "staged")
    (here / "untracked").write_text("untracked\n")
    before = git(here, "status", "--porcelain")
    go(here, write_plan(tmp_path / "p", make_item()), tmp_path / "results", push=True)
    assert git(here, "status", "--porcelain") == before
    assert git(remote, "ls-tree", "--name-only", "main").split() == ["hubdiff.lock", "hubdiff.yaml"]
    assert git(remote, "show", "main:hubdiff.yaml") == "families: {}"


def test_commits_that_are_not_pushed_yet_are_not_pushed_with_it(
    here: Path, remote: Path, tmp_path: Path
) -> None:
    (here / "draft").write_text("not ready")
    git(here, "add", "draft")
    git(here, "commit", "-q", "-m", "draft")
    mine = git(here, "rev-parse", "HEAD")
    go(here, write_plan(tmp_path / "p", make_item()), tmp_path / "results", push=True)
    assert subjects(remote) == ["hubdiff: record 1 item", "first"]
    assert git(here, "rev-parse", "HEAD") == mine


def test_without_push_it_stays_here_until_there_is_one(
    here: Path, remote: Path, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path / "p", make_item())
    assert go(here, plan, tmp_path / "results").commit == git(here, "rev-parse", "HEAD")
    assert subjects(remote) == ["first"]
    assert git(here, "status", "--porcelain") == ""
    assert go(here, plan, tmp_path / "results", push=True).pushed
    assert set(remote_lock(remote).items) == {make_item().key}


def test_the_lock_may_lie_in_a_folder(here: Path, remote: Path, tmp_path: Path) -> None:
    (here / "ci").mkdir()
    plan = write_plan(tmp_path / "p", make_item())
    for _ in range(2):
        record(plan, tmp_path / "results", lock=here / "ci" / "hubdiff.lock", push=True)
    assert git(remote, "ls-tree", "-r", "--name-only", "main").split() == [
        "ci/hubdiff.lock",
        "hubdiff.yaml",
    ]
    assert git(here, "status", "--porcelain") == ""


def test_a_shallow_checkout_with_a_detached_head_as_on_github(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{remote}", str(tmp_path / "shallow"))
    git(tmp_path / "shallow", "checkout", "-q", "--detach")
    plan = write_plan(tmp_path / "p", make_item())
    with pytest.raises(HubdiffError, match="no branch is checked out"):
        go(tmp_path / "shallow", plan, tmp_path / "results", push=True)
    monkeypatch.setenv("GITHUB_REF", "refs/heads/main")
    assert go(tmp_path / "shallow", plan, tmp_path / "results", push=True).pushed
    assert subjects(remote) == ["hubdiff: record 1 item", "first"]


def test_who_commits_where_git_does_not_know(here: Path, tmp_path: Path) -> None:
    go(here, write_plan(tmp_path / "p", make_item(1)), tmp_path / "results")
    assert git(here, "log", "-1", "--format=%an %cn") == "github-actions[bot] github-actions[bot]"
    git(here, "config", "user.name", "Ada")
    git(here, "config", "user.email", "ada@example.org")
    go(here, write_plan(tmp_path / "p", make_item(2)), tmp_path / "results")
    assert git(here, "log", "-1", "--format=%an <%ce>") == "Ada <ada@example.org>"


def test_without_git_around_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(HubdiffError, match="does not lie in a git repository"):
        go(tmp_path, write_plan(tmp_path / "p", make_item()), tmp_path / "results")


def test_a_remote_without_any_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "--bare", "-b", "main", "empty.git")
    git(tmp_path, "clone", "-q", "empty.git", "new")
    git(tmp_path / "new", "checkout", "-q", "-b", "main")
    plan = write_plan(tmp_path / "p", make_item())
    assert go(tmp_path / "new", plan, tmp_path / "results", push=True).pushed
    assert subjects(tmp_path / "empty.git") == ["hubdiff: record 1 item"]
    assert git(tmp_path / "new", "status", "--porcelain") == ""


# --- others push too ---


def push_in_between(here: Path, other: Path, times: int) -> None:
    """Whenever ``here`` pushes, the next of ``times`` commits that wait in ``other`` is pushed
    before: git runs this hook when it has looked at the remote and before it sends anything."""
    hook = here / ".git" / "hooks" / "pre-push"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(
        "#!/bin/sh\n"
        f"cd {other} || exit 1\n"
        "unset $(git rev-parse --local-env-vars)\n"
        "n=$(cat ../pushes 2>/dev/null || echo 0)\n"
        f'[ "$n" -ge {times} ] && exit 0\n'
        "echo $((n + 1)) > ../pushes\n"
        f'git push -q origin "$(git rev-list --reverse origin/main..main | head -n 1)":main\n'
    )
    hook.chmod(0o755)


def waiting(folder: Path, plans: Path, results: Path, count: int) -> list[str]:
    """Commits of other items, made and not pushed."""
    items = [make_item(100 + n) for n in range(count)]
    for n, item in enumerate(items):
        go(folder, write_plan(plans / str(n), item), results)
    return [item.key for item in items]


@pytest.mark.parametrize("times", [1, 4])
def test_who_is_slower_merges_and_both_are_kept(
    here: Path, clone: Callable[[str], Path], remote: Path, tmp_path: Path, times: int
) -> None:
    other = clone("other")
    theirs = waiting(other, tmp_path / "theirs", tmp_path / "none", times)
    push_in_between(here, other, times)
    item = make_item()
    leave_done(tmp_path / "results", item)
    done = go(here, write_plan(tmp_path / "p", item), tmp_path / "results", push=True)
    assert done.pushed
    lock = remote_lock(remote)
    assert set(lock.items) == {item.key, *theirs}
    assert lock.items[item.key]["status"] == "done"
    assert len(subjects(remote)) == 2 + times
    assert read_lock(here / "hubdiff.lock") == lock
    assert git(here, "status", "--porcelain") == ""


def test_after_five_tries_it_is_said_and_nothing_is_lost(
    here: Path, clone: Callable[[str], Path], remote: Path, tmp_path: Path
) -> None:
    other = clone("other")
    theirs = waiting(other, tmp_path / "theirs", tmp_path / "none", 5)
    push_in_between(here, other, 5)
    item = make_item()
    leave_done(tmp_path / "results", item)
    plan = write_plan(tmp_path / "p", item)
    before = git(here, "rev-parse", "HEAD")
    with pytest.raises(HubdiffError, match="before each of 5 tries") as error:
        go(here, plan, tmp_path / "results", push=True)
    assert "Run it again" in str(error.value.next_step)
    assert git(here, "rev-parse", "HEAD") == before
    assert git(here, "status", "--porcelain") == ""
    assert set(remote_lock(remote).items) == set(theirs)
    assert go(here, plan, tmp_path / "results", push=True).pushed
    assert set(remote_lock(remote).items) == {item.key, *theirs}


def test_a_change_here_that_is_in_the_way_is_kept(
    here: Path, clone: Callable[[str], Path], remote: Path, tmp_path: Path
) -> None:
    other = clone("other")
    (other / "hubdiff.yaml").write_text("theirs\n")
    git(other, "commit", "-q", "-am", "theirs")
    push_in_between(here, other, 1)
    (here / "hubdiff.yaml").write_text("mine\n")
    done = go(here, write_plan(tmp_path / "p", make_item()), tmp_path / "results", push=True)
    assert done.pushed
    assert (here / "hubdiff.yaml").read_text() == "mine\n"
    assert git(remote, "show", "main:hubdiff.yaml") == "theirs"
    assert set(remote_lock(remote).items) == {make_item().key}


def refuse(remote: Path, words: str) -> None:
    hook = remote / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
    hook.chmod(0o755)


def test_a_protected_branch_says_why_and_nothing_changes(
    here: Path, remote: Path, tmp_path: Path
) -> None:
    refuse(remote, "error: GH006: Protected branch update failed for refs/heads/main.")
    before = git(here, "rev-parse", "HEAD")
    with pytest.raises(HubdiffError, match="GH006: Protected branch") as error:
        go(here, write_plan(tmp_path / "p", make_item()), tmp_path / "results", push=True)
    assert "protected" in str(error.value.next_step)
    assert git(here, "rev-parse", "HEAD") == before
    assert not (here / "hubdiff.lock").exists()


def test_no_password_is_shown(here: Path, remote: Path, tmp_path: Path) -> None:
    refuse(remote, "https://me:hunter2@github.com denied; Authorization: Basic aHVudGVyMg==")
    with pytest.raises(HubdiffError) as error:
        go(here, write_plan(tmp_path / "p", make_item()), tmp_path / "results", push=True)
    assert "denied" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert "aHVudGVyMg" not in str(error.value)
    git(here, "remote", "set-url", "origin", "http://me:hunter2@127.0.0.1:9/x.git")
    with pytest.raises(HubdiffError) as error:
        go(here, write_plan(tmp_path / "p", make_item()), tmp_path / "results", push=True)
    assert "hunter2" not in f"{error.value}{error.value.__cause__}"


def test_the_push_goes_where_only_pushes_go(here: Path, remote: Path, tmp_path: Path) -> None:
    git(here, "remote", "set-url", "origin", "https://github.invalid/me/models")
    git(here, "remote", "set-url", "--push", "origin", str(remote))
    assert go(here, write_plan(tmp_path / "p", make_item()), tmp_path / "r", push=True).pushed
    assert set(remote_lock(remote).items) == {make_item().key}


class GitServer:
    """Bare repositories over HTTP, for who sends the right header, by git's own CGI program."""

    def __init__(self, folder: Path, header: str) -> None:
        backend = f"{git(folder, '--exec-path')}/git-http-backend"

        class Handler(BaseHTTPRequestHandler):
            def serve(self) -> None:
                if self.headers.get("Authorization") != header:
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", "Basic")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                path, _, query = self.path.partition("?")
                environment = {
                    **os.environ,
                    "GIT_PROJECT_ROOT": str(folder),
                    "GIT_HTTP_EXPORT_ALL": "1",
                    "REMOTE_USER": "me",
                    "REQUEST_METHOD": self.command,
                    "PATH_INFO": path,
                    "QUERY_STRING": query,
                    "CONTENT_TYPE": self.headers.get("Content-Type") or "",
                    "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding") or "",
                    "GIT_PROTOCOL": self.headers.get("Git-Protocol") or "",
                }
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                done = subprocess.run(
                    [backend], input=body, env=environment, capture_output=True, check=True
                )
                head, _, content = done.stdout.partition(b"\r\n\r\n")
                fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
                self.send_response(int(fields.pop("Status", "200").split()[0]))
                for name, value in {**fields, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = serve  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> GitServer:
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_the_right_to_push_comes_from_the_environment_and_is_kept_nowhere(
    here: Path, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(tmp_path / "p", make_item())
    with GitServer(tmp_path, "basic c2VjcmV0") as server:
        git(here, "remote", "set-url", "origin", f"{server.url}/remote.git")
        with pytest.raises(HubdiffError, match="terminal prompts disabled") as error:
            go(here, plan, tmp_path / "results", push=True)
        assert "contents: write" in str(error.value.next_step)
        monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
        monkeypatch.setenv("GIT_CONFIG_KEY_0", f"http.{server.url}/.extraheader")
        monkeypatch.setenv("GIT_CONFIG_VALUE_0", "AUTHORIZATION: basic c2VjcmV0")
        made = go(here, plan, tmp_path / "results", push=True)
        assert made.pushed
        refuse(remote, "no")
        with pytest.raises(HubdiffError, match="pre-receive hook declined") as error:
            go(here, write_plan(tmp_path / "q", make_item(2)), tmp_path / "results", push=True)
    assert set(remote_lock(remote).items) == {make_item().key}
    kept = [path for path in (here / ".git").rglob("*") if path.is_file()]
    assert not [path for path in kept if b"c2VjcmV0" in path.read_bytes()]
    assert "c2VjcmV0" not in f"{error.value} {made.as_json()}"


def test_a_lock_that_is_broken_on_the_remote_is_not_replaced(
    here: Path, clone: Callable[[str], Path], remote: Path, tmp_path: Path
) -> None:
    other = clone("other")
    (other / "hubdiff.lock").write_text("<<<<<<< mine\n")
    git(other, "add", ".")
    git(other, "commit", "-q", "-m", "broken")
    git(other, "push", "-q", "origin", "main")
    with pytest.raises(HubdiffError, match="is not JSON"):
        go(here, write_plan(tmp_path / "p", make_item()), tmp_path / "results", push=True)
    assert subjects(remote)[0] == "broken"


# --- the schedule is kept alive ---


def test_after_45_quiet_days_a_date_is_committed(
    here: Path, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.time()
    item = make_item()
    leave_done(tmp_path / "results", item)
    go(here, write_plan(tmp_path / "p", item), tmp_path / "results", push=True)
    empty = write_plan(tmp_path / "empty")

    def after(days: float) -> str | None:
        monkeypatch.setattr(module.time, "time", lambda: began + days * 86_400)
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began + days * 86_400))
        monkeypatch.setattr(module, "now", lambda: moment)
        return go(here, empty, tmp_path / "results", push=True).message

    assert after(44) is None
    assert after(46) == "hubdiff: looked, nothing is new"
    assert remote_lock(remote).checked_at is not None
    assert after(90) is None
    assert after(92) == "hubdiff: looked, nothing is new"
    assert len(subjects(remote)) == 4


def test_a_repository_with_no_lock_is_as_old_as_its_last_commit(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.time()
    monkeypatch.setattr(module.time, "time", lambda: began + 46 * 86_400)
    done = go(here, write_plan(tmp_path / "p"), tmp_path / "results")
    assert done.message == "hubdiff: looked, nothing is new"


# --- hypothesis: outcomes and the lock ---

TIMES = st.sampled_from(["2026-11-01T00:00:00Z", "2026-11-28T07:00:00Z"])
ENTRIES = st.builds(
    lambda n, status, attempts, at, value: {
        "key": f"{n:064x}",
        "status": status,
        "attempts": attempts,
        "at": at,
        "value": value,
    },
    st.integers(0, 3),
    st.sampled_from(["adopted", "done", "rejected", "failed"]),
    st.integers(0, 3),
    TIMES,
    st.sampled_from([None, 0.5]),
)
OUTCOMES = st.lists(ENTRIES, unique_by=lambda one: one["key"])


@settings(deadline=None)
@given(OUTCOMES, OUTCOMES)
def test_what_was_recorded_is_no_news(before: list[Any], fresh: list[Any]) -> None:
    known = Lock().after({}, before)
    after = known.after({}, merge_outcomes(known, fresh))
    later = [{**one, "at": "2026-12-24T00:00:00Z", "run": "again"} for one in fresh]
    assert merge_outcomes(after, later) == []
    assert set(after.items) == {one["key"] for one in [*before, *fresh]}


@settings(deadline=None)
@given(OUTCOMES, OUTCOMES)
def test_what_is_done_stays_done_and_what_was_tried_is_not_forgotten(
    before: list[Any], fresh: list[Any]
) -> None:
    known = Lock().after({}, before)
    after = known.after({}, merge_outcomes(known, fresh))
    for key, entry in known.items.items():
        if entry["status"] == "done":
            assert after.items[key]["status"] == "done"
        if entry["status"] != "adopted":
            assert after.items[key]["status"] != "adopted"


@pytest.mark.parametrize("options", [[], ["--depth=1"]])
def test_what_an_old_checkout_has_does_not_come_back(remote, tmp_path, options):
    """A job checks out what its event was about, which may be hours old, or weeks when it is run
    again: what was changed or removed since stays so."""
    items = [make_item(number) for number in (1, 2, 3, 4)]
    before, fresh = (
        write_plan(tmp_path / str(n), *part) for n, part in ((0, items[:3]), (1, items[3:]))
    )
    for item in items[:3]:
        leave(tmp_path / "results", item, result={**ran(item), "status": "refused", "why": "no"})
    git(tmp_path, "clone", "-q", str(remote), "there")
    there = tmp_path / "there"
    go(there, before, tmp_path / "results", push=True)
    git(tmp_path, "clone", "-q", *options, f"file://{remote}", "old")
    # Somebody asks for the first again; the second is tried with other settings, and fails.
    known = read_lock(there / "hubdiff.lock")
    failed = {**known.items[items[1].key], "status": "failed", "settings": "6" * 64}
    rest = {items[1].key: failed, items[2].key: known.items[items[2].key]}
    (there / "hubdiff.lock").write_text(replace(known, items=rest).dumps())
    git(there, "commit", "-q", "-a", "-m", "again, please")
    git(there, "push", "-q")
    leave_done(tmp_path / "results", items[3])
    assert go(tmp_path / "old", fresh, tmp_path / "results", push=True).pushed
    found = remote_lock(remote).items
    assert {key: one["status"] for key, one in found.items()} == {
        items[1].key: "failed",
        items[2].key: "rejected",
        items[3].key: "done",
    }
