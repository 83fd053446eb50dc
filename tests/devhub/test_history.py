from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFolder

from hubdiff.devhub import DevHub

from .conftest import PAGE_SIZE


def add(api: HfApi, repo: str, *paths: str, **options: object) -> str:
    operations = [CommitOperationAdd(path, path.encode()) for path in paths]
    done = api.create_commit(repo, operations, commit_message=f"add {paths[0]}", **options)
    return str(done.oid)


def test_tree_by_level_and_recursive_over_pages(alice: HfApi, repo: str) -> None:
    add(alice, repo, *(f"f{number}.txt" for number in range(PAGE_SIZE)), "a b/c/d.txt", "a b/e.txt")
    top = {entry.path: entry for entry in alice.list_repo_tree(repo)}
    assert isinstance(top["a b"], RepoFolder)
    assert len(top) == PAGE_SIZE + 2
    assert {entry.path for entry in alice.list_repo_tree(repo, "a b")} == {"a b/c", "a b/e.txt"}
    deep = {entry.path for entry in alice.list_repo_tree(repo, "a b", recursive=True)}
    assert deep == {"a b/c", "a b/c/d.txt", "a b/e.txt"}
    with pytest.raises(EntryNotFoundError):
        list(alice.list_repo_tree(repo, "nowhere"))


def test_expanded_paths_say_their_last_commit(alice: HfApi, repo: str) -> None:
    first = add(alice, repo, "one.txt")
    add(alice, repo, "two.txt")
    (info,) = alice.get_paths_info(repo, ["one.txt", "missing.txt"], expand=True)
    assert info.last_commit is not None
    assert (info.last_commit.oid, info.last_commit.title) == (first, "add one.txt")


def test_a_commit_id_is_a_revision_for_ever(hub: DevHub, alice: HfApi, repo: str) -> None:
    first = add(alice, repo, "one.txt")
    add(alice, repo, "two.txt")
    assert alice.model_info(repo, revision=first).sha == first
    assert "two.txt" not in alice.list_repo_files(repo, revision=first)
    assert "two.txt" in alice.list_repo_files(repo)


@pytest.mark.parametrize("revision", ["nowhere", "main~1", "HEAD^", "0" * 40, "refs/pr/7"])
def test_unknown_revisions(alice: HfApi, repo: str, revision: str) -> None:
    with pytest.raises(RevisionNotFoundError):
        alice.model_info(repo, revision=revision)
    with pytest.raises(RevisionNotFoundError):
        list(alice.list_repo_tree(repo, revision=revision))
    with pytest.raises(RevisionNotFoundError):
        alice.hf_hub_download(repo, ".gitattributes", revision=revision)


def test_missing_file_names_the_commit(alice: HfApi, repo: str) -> None:
    with pytest.raises(EntryNotFoundError) as error:
        alice.hf_hub_download(repo, "missing.txt")
    assert error.value.response.headers["X-Repo-Commit"] == alice.model_info(repo).sha


def test_branches(alice: HfApi, repo: str) -> None:
    first = add(alice, repo, "one.txt")
    add(alice, repo, "two.txt")
    alice.create_branch(repo, branch="feature/x", revision=first)
    with pytest.raises(HfHubHTTPError) as error:
        alice.create_branch(repo, branch="feature/x")
    assert error.value.response.status_code == 409
    alice.create_branch(repo, branch="feature/x", exist_ok=True)
    oid = add(alice, repo, "three.txt", revision="feature/x")
    assert set(alice.list_repo_files(repo, revision="feature/x")) == {
        ".gitattributes",
        "one.txt",
        "three.txt",
    }
    assert alice.hf_hub_download(repo, "three.txt", revision="feature/x")
    branches = {ref.name: ref.target_commit for ref in alice.list_repo_refs(repo).branches}
    assert branches["feature/x"] == oid
    alice.delete_branch(repo, branch="feature/x")
    assert [ref.name for ref in alice.list_repo_refs(repo).branches] == ["main"]
    with pytest.raises(HfHubHTTPError):
        alice.delete_branch(repo, branch="main")


@pytest.mark.parametrize("message", [None, "annotated"])
def test_tags(alice: HfApi, repo: str, message: str | None) -> None:
    first = add(alice, repo, "one.txt")
    alice.create_tag(repo, tag="v1", tag_message=message)
    add(alice, repo, "two.txt")
    with pytest.raises(HfHubHTTPError) as error:
        alice.create_tag(repo, tag="v1")
    assert error.value.response.status_code == 409
    assert alice.model_info(repo, revision="v1").sha == first
    assert [ref.target_commit for ref in alice.list_repo_refs(repo).tags] == [first]
    alice.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        alice.delete_tag(repo, tag="v1")


def test_commits_newest_first_over_pages(alice: HfApi, repo: str) -> None:
    oids = [add(alice, repo, f"{number}.txt") for number in range(PAGE_SIZE + 1)]
    listed = list(alice.list_repo_commits(repo))
    assert [commit.commit_id for commit in listed[:-1]] == oids[::-1]
    assert listed[0].title == f"add {PAGE_SIZE}.txt"
    assert listed[0].authors == ["alice"]


def test_super_squash_keeps_the_files_only(alice: HfApi, repo: str) -> None:
    add(alice, repo, "one.txt")
    add(alice, repo, "two.txt")
    files = alice.list_repo_files(repo)
    alice.super_squash_history(repo, commit_message="once")
    assert [commit.title for commit in alice.list_repo_commits(repo)] == ["once"]
    assert alice.list_repo_files(repo) == files
