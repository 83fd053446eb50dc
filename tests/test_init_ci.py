"""`hubdiff init-ci` in real git repositories, as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import git
import pytest

from hubdiff._version import __version__
from hubdiff.backport import init_ci as module
from hubdiff.backport.config import read_config
from hubdiff.backport.init_ci import init_ci
from hubdiff.errors import HubdiffError

COMMIT, OTHER = "a" * 40, "b" * 40
WORKFLOW, CONFIG, PAGE = ".github/workflows/hubdiff.yml", "hubdiff.yaml", ".github/HUBDIFF.md"
CONFIGURED = f"""
families:
  one:
    bases: [org/base]
    deltas:
      a: {{source: me/a@{COMMIT}, publish: {{to: me/results, mode: pr}}}}
      b: {{source: me/b@{OTHER}, publish: {{to: me/results, mode: branch}}}}
      c: {{source: me/c@{"c" * 40}, publish: {{to: me/more, mode: pr, as: merged}}}}
      d: {{source: me/d@{"d" * 40}, publish: {{to: me/never, mode: none}}}}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    with git.Repo.init(root, initial_branch="main") as repo:
        repo.create_remote("origin", "git@github.com:acme/models.git")
    return root


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """hubdiff's own repository as it is on GitHub, with this version's tag; its commit."""
    home = tmp_path / "hubdiff-home"
    with git.Repo.init(home) as repo:
        actor = git.Actor("a", "a@example.org")
        commit = repo.index.commit("release", author=actor, committer=actor)
        repo.index.commit("later", author=actor, committer=actor)
        with repo.git.custom_environment(GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a@b.org"):
            repo.git.tag("-a", f"v{__version__}", "-m", "release", commit.hexsha)
    reroute(monkeypatch, home)
    return str(commit.hexsha)


def reroute(monkeypatch: pytest.MonkeyPatch, to: Path) -> None:
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{to}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", module.HOME_URL)


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hubdiff", "init-ci", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_files_are_written_with_the_commit_of_this_version(repository, released):
    done = command(cwd=repository)
    assert done.returncode == 0, done.stderr
    workflow = (repository / WORKFLOW).read_text()
    assert f"backport.yml@{released} # v{__version__}\n" in workflow
    assert "<<" not in workflow + (repository / CONFIG).read_text()
    page = (repository / PAGE).read_text()
    assert "| repository | acme/models |" in page
    assert released in page
    assert "fill in hubdiff.yaml" in done.stdout
    read_config(repository / CONFIG)


def test_a_lightweight_tag_will_do(repository, tmp_path, monkeypatch):
    home = tmp_path / "hubdiff-home"
    with git.Repo.init(home) as repo:
        actor = git.Actor("a", "a@example.org")
        commit = repo.index.commit("release", author=actor, committer=actor)
        repo.create_tag(f"v{__version__}")
    reroute(monkeypatch, home)
    assert init_ci(repository).commit == commit.hexsha


@pytest.mark.parametrize("there", [True, False])
def test_where_the_commit_cannot_be_asked_for_it_must_be_given(
    repository, tmp_path, monkeypatch, there
):
    home = tmp_path / "no-such-place"
    if there:
        git.Repo.init(home).close()
    reroute(monkeypatch, home)
    done = command("--json", cwd=repository)
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert f"v{__version__}" in error["message"]
    assert "--commit" in error["next_step"]
    assert not (repository / CONFIG).exists()
    assert init_ci(repository, commit=COMMIT).commit == COMMIT


@pytest.mark.parametrize("commit", ["main", "a" * 39, "A" * 40, "v0.1.0", f"{COMMIT}\n", ""])
def test_only_a_whole_commit_is_a_commit(repository, commit):
    with pytest.raises(HubdiffError, match="is not a commit"):
        init_ci(repository, commit=commit)


def test_a_dry_run_says_the_same_and_writes_nothing(repository):
    dry = init_ci(repository, commit=COMMIT, dry_run=True)
    assert sorted(p.name for p in repository.iterdir()) == [".git"]
    made = init_ci(repository, commit=COMMIT)
    assert {**made.as_json(), "dry_run": True} == dry.as_json()


def test_again_it_changes_nothing_and_asks_nobody(repository, tmp_path, monkeypatch):
    init_ci(repository, commit=COMMIT)
    reroute(monkeypatch, tmp_path / "no-such-place")
    again = init_ci(repository)
    assert again.commit == COMMIT
    assert set(again.files.values()) == {"unchanged"}


def test_what_is_there_is_kept(repository):
    (repository / WORKFLOW).parent.mkdir(parents=True)
    (repository / WORKFLOW).write_text("mine\n")
    (repository / CONFIG).write_text(CONFIGURED)
    made = init_ci(repository, commit=COMMIT)
    assert made.files == {WORKFLOW: "kept", CONFIG: "kept", PAGE: "written"}
    assert (repository / WORKFLOW).read_text() == "mine\n"
    done = command("--commit", COMMIT, cwd=repository)
    assert "--force replaces" in done.stdout


def test_force_takes_this_version_and_keeps_the_configuration(repository, released):
    init_ci(repository, commit=COMMIT)
    (repository / CONFIG).write_text(CONFIGURED)
    made = init_ci(repository, force=True)
    assert made.commit == released
    assert made.files == {WORKFLOW: "replaced", CONFIG: "kept", PAGE: "replaced"}
    assert released in (repository / WORKFLOW).read_text()
    assert (repository / CONFIG).read_text() == CONFIGURED


def test_it_says_what_each_target_needs(repository, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT")
    (repository / CONFIG).write_text(CONFIGURED)
    done = command("--commit", COMMIT, "--json", cwd=repository)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["publishers"] == [
        {
            "repo": repo,
            "repository": "acme/models",
            "workflow": "hubdiff.yml",
            "branch": "main",
            "settings": f"https://huggingface.co/{repo}/settings",
        }
        for repo in ("me/results", "me/more")
    ]
    said = command(cwd=repository).stdout
    assert "me/more" in said
    assert "acme/models" in said


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://github.com/acme/models", "acme/models"),
        ("https://github.com/acme/models.git", "acme/models"),
        ("https://token@github.com/acme/models.git/", "acme/models"),
        ("ssh://git@github.com/acme/my.models.git", "acme/my.models"),
        ("git@github.com:acme/models", "acme/models"),
        ("https://gitlab.com/acme/models", None),
        ("https://github.com.example.org/acme/models", None),
        ("/srv/models.git", None),
    ],
)
def test_the_repository_is_the_one_that_origin_names(repository, url, name):
    (repository / CONFIG).write_text(CONFIGURED)
    with git.Repo(repository) as repo:
        repo.remotes.origin.set_url(url)
    made = init_ci(repository, commit=COMMIT)
    assert {one.repository for one in made.publishers} == {name}


def test_the_branch_is_the_default_one_of_origin(repository, tmp_path):
    (repository / CONFIG).write_text(CONFIGURED)
    with git.Repo(repository) as repo:
        actor = git.Actor("a", "a@example.org")
        repo.index.commit("first", author=actor, committer=actor)
        repo.git.update_ref("refs/remotes/origin/trunk", "HEAD")
        repo.git.symbolic_ref("refs/remotes/origin/HEAD", "refs/remotes/origin/trunk")
        repo.git.checkout("-b", "topic")
    assert {one.branch for one in init_ci(repository, commit=COMMIT).publishers} == {"trunk"}


def test_from_a_folder_inside_the_files_go_to_the_top(repository):
    (repository / "deep" / "er").mkdir(parents=True)
    done = command("--commit", COMMIT, cwd=repository / "deep" / "er")
    assert done.returncode == 0, done.stderr
    assert (repository / WORKFLOW).is_file()


def test_outside_a_repository_it_says_so(tmp_path):
    for folder in (tmp_path, tmp_path / "no-such-folder"):
        with pytest.raises(HubdiffError, match="is in no git repository") as error:
            init_ci(folder, commit=COMMIT)
        assert error.value.next_step


def test_a_bare_repository_has_no_place_for_files(tmp_path):
    git.Repo.init(tmp_path / "bare", bare=True).close()
    with pytest.raises(HubdiffError, match="bare"):
        init_ci(tmp_path / "bare", commit=COMMIT)


def test_nothing_is_written_through_a_folder_in_the_way(repository):
    (repository / CONFIG).mkdir()
    with pytest.raises(HubdiffError, match="is not a file"):
        init_ci(repository, commit=COMMIT)
    assert not (repository / WORKFLOW).exists()


def test_a_configuration_that_cannot_be_read_is_told_before_anything_is_written(repository):
    (repository / CONFIG).write_text("families: {one: {}}\n")
    with pytest.raises(HubdiffError, match=r"hubdiff\.yaml:1"):
        init_ci(repository, commit=COMMIT)
    assert not (repository / WORKFLOW).exists()
