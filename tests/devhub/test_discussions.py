from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from hubdiff.devhub import DevHub


def propose(api: HfApi, repo: str, path: str, data: bytes, **options: object) -> int:
    done = api.create_commit(
        repo,
        [CommitOperationAdd(path, data)],
        commit_message=f"propose {path}",
        commit_description="why",
        create_pr=True,
        **options,
    )
    assert done.pr_num is not None
    return int(done.pr_num)


def test_anyone_may_propose_and_the_owner_merges(alice: HfApi, bob: HfApi, repo: str) -> None:
    number = propose(bob, repo, "w.bin", b"\0weights")
    revision = f"refs/pr/{number}"
    assert "w.bin" not in bob.list_repo_files(repo)
    assert "w.bin" in bob.list_repo_files(repo, revision=revision)
    with open(bob.hf_hub_download(repo, "w.bin", revision=revision), "rb") as file:
        assert file.read() == b"\0weights"
    shown = bob.get_discussion_details(repo, number)
    assert (shown.status, shown.title, shown.author) == ("open", "propose w.bin", "bob")
    assert shown.is_pull_request
    assert "w.bin" in (shown.diff or "")
    with pytest.raises(HfHubHTTPError) as error:
        bob.merge_pull_request(repo, number)
    assert error.value.response.status_code == 403
    alice.merge_pull_request(repo, number)
    assert "w.bin" in alice.list_repo_files(repo)
    merged = alice.get_discussion_details(repo, number)
    assert merged.status == "merged"
    assert merged.merge_commit_oid == alice.model_info(repo).sha


def test_more_commits_on_a_pull_request(alice: HfApi, bob: HfApi, repo: str) -> None:
    number = propose(bob, repo, "a.txt", b"a")
    revision = f"refs/pr/{number}"
    bob.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id=repo, revision=revision)
    assert {"a.txt", "b.txt"} <= set(alice.list_repo_files(repo, revision=revision))
    refs = alice.list_repo_refs(repo, include_pull_requests=True).pull_requests or []
    assert [ref.ref for ref in refs] == [revision]


def test_conflicts_are_named_and_not_merged(alice: HfApi, repo: str) -> None:
    number = propose(alice, repo, "a.txt", b"theirs")
    alice.upload_file(path_or_fileobj=b"ours", path_in_repo="a.txt", repo_id=repo)
    assert alice.get_discussion_details(repo, number).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError) as error:
        alice.merge_pull_request(repo, number)
    assert error.value.response.status_code == 409


def test_a_pull_request_can_start_from_an_older_commit(alice: HfApi, repo: str) -> None:
    old = alice.model_info(repo).sha
    alice.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=repo)
    number = propose(alice, repo, "a.txt", b"a", parent_commit=old)
    files = alice.list_repo_files(repo, revision=f"refs/pr/{number}")
    assert set(files) == {".gitattributes", "a.txt"}
    alice.merge_pull_request(repo, number)
    assert {"new.txt", "a.txt"} <= set(alice.list_repo_files(repo))


def test_drafts_comments_titles_and_states(
    hub: DevHub, alice: HfApi, bob: HfApi, repo: str
) -> None:
    draft = alice.create_pull_request(repo, "A draft")
    assert draft.status == "draft"
    talk = bob.create_discussion(repo, "A question", description="Why?")
    alice.comment_discussion(repo, talk.num, "Because.")
    alice.rename_discussion(repo, talk.num, "An answer")
    alice.change_discussion_status(repo, talk.num, "closed")
    shown = bob.get_discussion_details(repo, talk.num)
    assert [event.type for event in shown.events] == [
        "comment",
        "comment",
        "title-change",
        "status-change",
    ]
    assert (shown.title, shown.status) == ("An answer", "closed")
    with pytest.raises(HfHubHTTPError) as error:
        alice.merge_pull_request(repo, draft.num)
    assert error.value.response.status_code == 400
    alice.change_discussion_status(repo, draft.num, "open")
    alice.merge_pull_request(repo, draft.num)
    numbers = [one.num for one in alice.get_repo_discussions(repo, discussion_type="pull_request")]
    assert numbers == [draft.num]
    assert [one.num for one in alice.get_repo_discussions(repo)] == [talk.num, draft.num]
