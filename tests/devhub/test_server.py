from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hubdiff.devhub import DevHub


@contextmanager
def standalone(*arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "hubdiff.devhub", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def test_it_runs_by_itself_and_keeps_everything_in_its_folder(tmp_path: Path) -> None:
    folder = str(tmp_path / "hub")
    with standalone("--folder", folder, "--user", "alice=hf_a") as url:
        api = HfApi(endpoint=url, token="hf_a")
        api.create_repo("alice/kept", private=True)
        operations = [CommitOperationAdd("a.bin", b"\0large"), CommitOperationAdd("a.txt", b"a")]
        done = api.create_commit("alice/kept", operations, commit_message="m", create_pr=True)
        before = api.get_paths_info("alice/kept", "a.bin", revision="refs/pr/1")
    with standalone("--folder", folder, "--user", "alice=hf_a") as url:
        api = HfApi(endpoint=url, token="hf_a")
        assert api.get_paths_info("alice/kept", "a.bin", revision="refs/pr/1") == before
        assert api.get_discussion_details("alice/kept", 1).status == "open"
        assert api.model_info("alice/kept").private is True
        api.merge_pull_request("alice/kept", 1)
        with open(api.hf_hub_download("alice/kept", "a.bin"), "rb") as file:
            assert file.read() == b"\0large"
        assert done.oid in [commit.commit_id for commit in api.list_repo_commits("alice/kept")]


def test_a_given_port_is_used() -> None:
    with DevHub() as first:
        port = int(first.url.rpartition(":")[2])
    with DevHub(port=port) as second:
        assert second.url == first.url


def test_it_listens_on_the_loopback_address_only(hub: DevHub) -> None:
    for url in (hub.url, hub.cdn_url):
        assert url.startswith("http://127.0.0.1:")


def test_every_environment_has_caches_of_its_own(hub: DevHub) -> None:
    one, two = hub.environment("alice"), hub.environment("bob", xet=False)
    assert one["HF_ENDPOINT"] == two["HF_ENDPOINT"] == hub.url
    assert (one["HF_TOKEN"], two["HF_TOKEN"]) == ("hf_alice", "hf_bob")
    assert one["HF_HOME"] != two["HF_HOME"]
    assert one["HF_XET_CACHE"] != two["HF_XET_CACHE"]
    assert (one["HF_HUB_DISABLE_XET"], two["HF_HUB_DISABLE_XET"]) == ("0", "1")


def test_its_own_folder_goes_away_with_it() -> None:
    with DevHub() as hub:
        folder = hub.folder
        assert folder.exists()
    assert not folder.exists()


def test_the_folder_it_was_given_stays(tmp_path: Path) -> None:
    with DevHub(tmp_path / "hub") as hub:
        hub.create_repo("gpt2")
    assert (tmp_path / "hub").exists()
    with DevHub(tmp_path / "hub") as hub:
        info = HfApi(endpoint=hub.url, token=False).model_info("gpt2")
        assert info.id == "gpt2"
        assert [file.rfilename for file in info.siblings or []] == [".gitattributes"]


def test_the_users_git_settings_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gitconfig").write_text("[commit]\n  gpgSign = true\n[init]\n  defaultBranch = x\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    with DevHub() as hub:
        hub.create_repo("demo/x")
        HfApi(endpoint=hub.url, token="hf_demo").super_squash_history("demo/x")


def test_an_error_inside_is_a_500_with_its_reason(
    hub: DevHub, http: httpx2.Client, repo: str
) -> None:
    head = hub.folder / "repos" / "model" / f"{repo}.git" / "HEAD"
    head.rename(hub.folder / "lost")
    answer = http.get(f"/api/models/{repo}/refs")
    (hub.folder / "lost").rename(head)
    assert answer.status_code == 500
    assert "not a git repository" in answer.json()["error"]
    assert http.get(f"/api/models/{repo}/refs").status_code == 200
