from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hubdiff.devhub import DevHub

AUTH = {"Authorization": "Bearer hf_alice"}


def send(http: httpx2.Client, repo: str, *operations: dict[str, Any]) -> httpx2.Response:
    lines = [{"key": "header", "value": {"summary": "by hand"}}, *operations]
    body = "\n".join(json.dumps(line) for line in lines)
    return http.post(f"/api/models/{repo}/commit/main", content=body, headers=AUTH)


def file(path: str, content: bytes = b"x") -> dict[str, Any]:
    encoded = base64.b64encode(content).decode()
    return {"key": "file", "value": {"path": path, "content": encoded, "encoding": "base64"}}


def lfs_file(path: str, oid: str, **more: Any) -> dict[str, Any]:
    return {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, **more}}


def content(api: HfApi, repo: str, path: str, revision: str | None = None) -> bytes:
    with open(api.hf_hub_download(repo, path, revision=revision), "rb") as opened:
        return opened.read()


def test_operations_apply_in_order(alice: HfApi, repo: str) -> None:
    alice.create_commit(
        repo,
        [CommitOperationAdd(path, b"1") for path in ("a.txt", "old/b.txt", "old/c.txt", 'q"é.txt')],
        commit_message="first",
    )
    alice.create_commit(
        repo,
        [
            CommitOperationDelete("old/"),
            CommitOperationAdd("old/d.txt", b"2"),
            CommitOperationDelete("a.txt"),
        ],
        commit_message="second",
        commit_description="with a body",
    )
    assert set(alice.list_repo_files(repo)) == {".gitattributes", "old/d.txt", 'q"é.txt'}
    newest = next(iter(alice.list_repo_commits(repo)))
    assert (newest.title, newest.message) == ("second", "with a body")


def test_stale_parent_is_refused_and_nothing_moves(alice: HfApi, repo: str) -> None:
    parent = alice.model_info(repo).sha
    alice.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo, parent_commit=parent)
    with pytest.raises(HfHubHTTPError) as error:
        alice.upload_file(
            path_or_fileobj=b"2", path_in_repo="b", repo_id=repo, parent_commit=parent
        )
    assert error.value.response.status_code == 412
    assert "b" not in alice.list_repo_files(repo)


def test_a_file_that_is_there_already_makes_no_commit(hub: DevHub, alice: HfApi, repo: str) -> None:
    for _ in range(2):
        alice.upload_file(path_or_fileobj=b"same", path_in_repo="a.txt", repo_id=repo)
        alice.upload_file(path_or_fileobj=b"\0same", path_in_repo="a.bin", repo_id=repo)
    assert hub.log.count(kind="commit", repo=repo) == 2


@pytest.mark.parametrize(
    ("path", "data", "large"),
    [
        ("config.json", b"{}", False),
        ("model.safetensors", b"{}", True),
        ("deep/model.gguf", b"\0\1", True),
        ("empty.bin", b"", False),
    ],
)
def test_large_means_by_pattern_or_not_text(
    alice: HfApi, repo: str, path: str, data: bytes, large: bool
) -> None:
    alice.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=repo)
    (info,) = alice.get_paths_info(repo, path)
    assert (info.lfs is not None) == large
    assert content(alice, repo, path) == data


def test_large_by_size(alice: HfApi) -> None:
    with DevHub(users={"alice": "hf_alice"}, large_file_bytes=1000) as hub:
        api = HfApi(endpoint=hub.url, token="hf_alice")
        api.create_repo("alice/sizes")
        for size in (999, 1000):
            path = f"{size}.txt"
            api.upload_file(path_or_fileobj=b"a" * size, path_in_repo=path, repo_id="alice/sizes")
            (info,) = api.get_paths_info("alice/sizes", path)
            assert (info.lfs is not None) == (size == 1000)


def test_copies_inside_a_repo(alice: HfApi, repo: str) -> None:
    alice.upload_file(path_or_fileobj=b"\0big", path_in_repo="a.bin", repo_id=repo)
    alice.upload_file(path_or_fileobj=b"small", path_in_repo="a.txt", repo_id=repo)
    alice.create_commit(
        repo,
        [CommitOperationCopy("a.bin", "b.bin"), CommitOperationCopy("a.txt", "b.txt")],
        commit_message="copy",
    )
    assert content(alice, repo, "b.bin") == b"\0big"
    assert content(alice, repo, "b.txt") == b"small"


def test_copies_need_to_see_the_source_and_to_write_the_target(
    hub: DevHub, alice: HfApi, bob: HfApi, repo: str
) -> None:
    alice.upload_file(path_or_fileobj=b"\0big", path_in_repo="a.bin", repo_id=repo)
    copy = [CommitOperationCopy("a.bin", "b.bin", src_repo_id=repo, src_repo_type="model")]
    bob.create_repo("bob/copies", exist_ok=True)
    bob.create_commit("bob/copies", copy, commit_message="copy")
    assert content(bob, "bob/copies", "b.bin") == b"\0big"
    assert hub.log.count(kind="copy", repo=repo) == 1
    alice.update_repo_settings(repo, visibility="private")
    with pytest.raises(RepositoryNotFoundError):
        bob.create_commit("bob/copies", copy, commit_message="copy")


def test_an_object_of_another_repo_must_be_copied_first(
    alice: HfApi, http: httpx2.Client, repo: str
) -> None:
    alice.create_repo("alice/other-objects")
    alice.upload_file(
        path_or_fileobj=b"\0private", path_in_repo="a.bin", repo_id="alice/other-objects"
    )
    oid = hashlib.sha256(b"\0private").hexdigest()
    assert send(http, repo, lfs_file("b.bin", oid)).status_code == 400
    assert send(http, "alice/other-objects", lfs_file("b.bin", oid)).status_code == 200


def test_an_object_that_was_never_uploaded_is_refused(http: httpx2.Client, repo: str) -> None:
    assert send(http, repo, lfs_file("b.bin", "0" * 64)).status_code == 400


def test_a_wrong_size_is_refused(alice: HfApi, http: httpx2.Client, repo: str) -> None:
    alice.upload_file(path_or_fileobj=b"\0four", path_in_repo="a.bin", repo_id=repo)
    oid = hashlib.sha256(b"\0four").hexdigest()
    assert send(http, repo, lfs_file("b.bin", oid, size=6)).status_code == 400
    assert send(http, repo, lfs_file("b.bin", oid, size=5)).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["../a", "a/../../b", "/etc/passwd", "a//b", "./a", ".git/config", "a\\..\\b", "", "a\0b"],
)
def test_paths_that_leave_the_repo_are_refused(
    alice: HfApi, http: httpx2.Client, repo: str, path: str
) -> None:
    before = alice.model_info(repo).sha
    assert send(http, repo, file(path)).status_code == 400
    assert send(http, repo, {"key": "deletedFile", "value": {"path": path}}).status_code == 400
    assert alice.model_info(repo).sha == before


def test_deleting_what_is_not_there_is_refused(http: httpx2.Client, repo: str) -> None:
    answer = send(http, repo, {"key": "deletedFile", "value": {"path": "missing"}})
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "EntryNotFound")


def test_unknown_branch_and_unknown_operation(alice: HfApi, http: httpx2.Client, repo: str) -> None:
    with pytest.raises(RevisionNotFoundError):
        alice.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, revision="nowhere")
    assert send(http, repo, {"key": "renamedFile", "value": {"path": "a"}}).status_code == 400


def test_concurrent_commits_all_arrive(alice: HfApi, repo: str) -> None:
    futures = [
        alice.upload_file(
            path_or_fileobj=b"x", path_in_repo=f"{number}.txt", repo_id=repo, run_as_future=True
        )
        for number in range(4)
    ]
    for future in futures:
        future.result()
    assert len(alice.list_repo_files(repo)) == 1 + 4


def test_malformed_commits_are_refused(alice: HfApi, http: httpx2.Client, repo: str) -> None:
    before = alice.model_info(repo).sha
    header = b'{"key": "header", "value": {"summary": "s"}}\n'
    bad_content = {"key": "file", "value": {"path": "a", "content": "!", "encoding": "base64"}}
    for body in (b"", b"not json", b"[]", header + b"{", header + json.dumps(bad_content).encode()):
        answer = http.post(f"/api/models/{repo}/commit/main", content=body, headers=AUTH)
        assert answer.status_code == 400
    assert alice.model_info(repo).sha == before
