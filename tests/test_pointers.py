"""Versions and aliases of deltas, on the loopback Hub and through the client's own eyes."""

from __future__ import annotations

from pathlib import Path

import models
import on_hub
import pytest
from on_hub import NewName, PutRepo, contents

import hubdiff
from hubdiff.devhub import DevHub
from hubdiff.errors import HubConflict, HubUnavailable, NotADelta, RefError, RevisionNotFound


@pytest.fixture
def delta(devhub: DevHub, new_name: NewName, tmp_path: Path) -> str:
    """A delta with two commits."""
    base = models.weights()
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "tuned", models.moved(base))
    models.save(tmp_path / "better", models.moved(base, seed=2))
    name = new_name()
    for tuned in ("tuned", "better"):
        hubdiff.push_delta(tmp_path / tuned, name, base=tmp_path / "base", force=True)
    return name


def commits(hub: DevHub, repo: str) -> list[str]:
    """The last one first."""
    return [commit.commit_id for commit in on_hub.api(hub).list_repo_commits(repo)]


def tags(hub: DevHub, repo: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in on_hub.api(hub).list_repo_refs(repo).tags}


def test_a_version_never_moves(devhub: DevHub, delta: str) -> None:
    last, first = commits(devhub, delta)[:2]
    made = hubdiff.tag(f"{delta}@{first}", "v1.0", message="the first")
    assert (made.commit, made.before, made.ref) == (first, None, f"{delta}@v1.0")
    again = hubdiff.tag(f"{delta}@{first}", "v1.0")
    assert again.before == first
    with pytest.raises(HubConflict, match="never moves"):
        hubdiff.tag(delta, "v1.0")
    hubdiff.tag(delta, "1.1-rc1")
    assert tags(devhub, delta)["1.1-rc1"] == last
    assert hubdiff.inspect(f"{delta}@v1.0").delta == f"{delta}@{first}"


def test_an_alias_moves_when_it_is_told_to(devhub: DevHub, delta: str, tmp_path: Path) -> None:
    last, first = commits(devhub, delta)[:2]
    hubdiff.alias(f"{delta}@{first}", "production")
    with pytest.raises(HubConflict, match=r"production is [0-9a-f]{40}, not"):
        hubdiff.alias(delta, "production")
    assert tags(devhub, delta)["production"] == first
    # Wherever a ref is accepted.
    hubdiff.apply(f"{delta}@production", tmp_path / "base", output=tmp_path / "one")
    assert models.hashes(tmp_path / "one").items() >= models.hashes(tmp_path / "tuned").items()
    moved = hubdiff.alias(delta, "production", move=True)
    assert (moved.before, moved.commit) == (first, last)
    hubdiff.apply(f"{delta}@production", tmp_path / "base", output=tmp_path / "two")
    assert models.hashes(tmp_path / "two").items() >= models.hashes(tmp_path / "better").items()
    gone = hubdiff.alias(delta, "production", remove=True)
    assert (gone.removed, gone.before) == (True, last)
    with pytest.raises(RevisionNotFound):
        hubdiff.inspect(f"{delta}@production")
    with pytest.raises(RefError, match="no alias"):
        hubdiff.alias(delta, "production", remove=True)


def test_an_alias_can_t_be_committed_to(devhub: DevHub, delta: str, tmp_path: Path) -> None:
    """Unlike a branch: that is what makes it a tag."""
    hubdiff.alias(delta, "production")
    before = tags(devhub, delta)
    with pytest.raises(Exception, match=r"404|400|Revision|branch"):
        on_hub.api(devhub).upload_file(
            path_or_fileobj=b"x", path_in_repo="x", repo_id=delta, revision="production"
        )
    assert tags(devhub, delta) == before


def test_an_alias_whose_move_fails_is_put_back(devhub: DevHub, delta: str) -> None:
    first = commits(devhub, delta)[1]
    hubdiff.alias(f"{delta}@{first}", "production")
    devhub.faults.add("500", "/tag/", method="POST")
    with pytest.raises(HubUnavailable):
        hubdiff.alias(delta, "production", move=True)
    assert tags(devhub, delta)["production"] == first


@pytest.mark.parametrize("name", ["v1", "2.0", "Production", "a b", "", "-x", "0123abc", "x/y"])
def test_names_that_are_no_alias(delta: str, name: str) -> None:
    with pytest.raises(RefError):
        hubdiff.alias(delta, name)


@pytest.mark.parametrize("name", ["production", "v", "v1.", "1..2", "", "v1 2", "v1/2"])
def test_names_that_are_no_version(delta: str, name: str) -> None:
    with pytest.raises(RefError):
        hubdiff.tag(delta, name)


def test_a_branch_is_no_alias(devhub: DevHub, delta: str) -> None:
    on_hub.api(devhub).create_branch(delta, branch="staging")
    for name in ("staging", "main"):
        with pytest.raises(HubConflict, match="branch"):
            hubdiff.alias(delta, name)


def test_only_deltas_on_the_hub_have_versions(
    devhub: DevHub, put_repo: PutRepo, tmp_path: Path
) -> None:
    folder = models.save(tmp_path / "model", models.weights())
    with pytest.raises(RefError, match="folder"):
        hubdiff.tag(f"{folder}/", "v1")
    with pytest.raises(NotADelta):
        hubdiff.tag(put_repo(contents(folder)), "v1")
