from __future__ import annotations

import json
import struct
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from hubdiff.devhub import DevHub

CARD = b"""---
license: apache-2.0
library_name: hubdiff
base_model: org/base
base_model_relation: adapter
tags: [diff-vector]
---
# A card
"""


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return int(error.value.response.status_code)


def test_whoami_names_the_user_and_the_orgs(alice: HfApi) -> None:
    me = alice.whoami()
    assert me["name"] == "alice"
    assert [org["name"] for org in me["orgs"]] == ["team"]


def test_bad_token_is_refused_as_a_bad_token_not_as_a_missing_repo(hub: DevHub, repo: str) -> None:
    api = HfApi(endpoint=hub.url, token="hf_wrong")
    with pytest.raises(HfHubHTTPError) as error:
        api.model_info(repo)
    assert status_of(error) == 401
    assert not isinstance(error.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami()


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_create_upload_and_delete(hub: DevHub, alice: HfApi, kind: str) -> None:
    url = alice.create_repo(f"team/new-{kind}", repo_type=kind)
    assert url.repo_id == f"team/new-{kind}"
    alice.upload_file(
        path_or_fileobj=b"\0" * 5000, path_in_repo="a.bin", repo_id=url.repo_id, repo_type=kind
    )
    local = alice.hf_hub_download(url.repo_id, "a.bin", repo_type=kind)
    assert Path(local).read_bytes() == b"\0" * 5000
    alice.delete_repo(url.repo_id, repo_type=kind)
    assert not alice.repo_exists(url.repo_id, repo_type=kind)


def test_creating_twice_is_a_conflict_unless_that_is_fine(alice: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        alice.create_repo(repo)
    assert status_of(error) == 409
    assert alice.create_repo(repo, exist_ok=True).repo_id == repo


@pytest.mark.parametrize("name", ["alice/..", "alice/a--b", "alice/a.git"])
def test_bad_names_are_refused(http: httpx2.Client, name: str) -> None:
    organization, _, plain = name.partition("/")
    answer = http.post(
        "/api/repos/create",
        json={"name": plain, "organization": organization},
        headers={"Authorization": "Bearer hf_alice"},
    )
    assert answer.status_code == 400


def test_only_members_write(alice: HfApi, bob: HfApi, stranger: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        bob.create_repo("team/not-mine")
    assert status_of(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        bob.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo)
    assert status_of(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        stranger.create_repo("alice/anything")
    assert status_of(error) == 401


def test_private_repos_look_missing_to_others(alice: HfApi, bob: HfApi, stranger: HfApi) -> None:
    alice.create_repo("alice/secret", private=True)
    alice.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/secret")
    assert alice.model_info("alice/secret").private is True
    for api, status in ((bob, 404), (stranger, 401)):
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info("alice/secret")
        assert status_of(error) == status
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("alice/secret", "x")
    names = [model.id for model in bob.list_models(search="secret")]
    assert "alice/secret" not in names
    alice.update_repo_settings("alice/secret", visibility="public")
    assert stranger.model_info("alice/secret").private is False


def test_missing_repos(bob: HfApi, stranger: HfApi) -> None:
    for name in ("nobody/nothing", "one-word"):
        for api, status in ((bob, 404), (stranger, 401)):
            with pytest.raises(RepositoryNotFoundError) as error:
                api.model_info(name)
            assert status_of(error) == status


def test_gated_files_need_access_and_the_rest_does_not(
    hub: DevHub, alice: HfApi, bob: HfApi, stranger: HfApi, repo: str
) -> None:
    alice.upload_file(path_or_fileobj=b"\0weights", path_in_repo="w.bin", repo_id=repo)
    hub.set_gated(repo)
    assert bob.model_info(repo).gated == "manual"
    assert "w.bin" in bob.list_repo_files(repo)
    for api, status in ((bob, 403), (stranger, 401)):
        with pytest.raises(GatedRepoError) as error:
            api.hf_hub_download(repo, "w.bin")
        assert status_of(error) == status
    with pytest.raises(GatedRepoError):
        bob.auth_check(repo)
    alice.grant_access(repo, "bob")
    bob.auth_check(repo)
    bob.hf_hub_download(repo, "w.bin")
    alice.hf_hub_download(repo, "w.bin")
    alice.update_repo_settings(repo, gated=False)
    stranger.hf_hub_download(repo, "w.bin")


def test_allow_grants_access_without_a_request(hub: DevHub, alice: HfApi, bob: HfApi) -> None:
    hub.create_repo("elsewhere/base")
    hub.set_gated("elsewhere/base", "auto")
    with pytest.raises(GatedRepoError):
        bob.hf_hub_download("elsewhere/base", ".gitattributes")
    hub.allow("bob", "elsewhere/base")
    bob.hf_hub_download("elsewhere/base", ".gitattributes")


def test_move(alice: HfApi, repo: str) -> None:
    alice.upload_file(path_or_fileobj=b"\0x", path_in_repo="x.bin", repo_id=repo)
    alice.move_repo(repo, "team/moved")
    assert not alice.repo_exists(repo)
    assert "x.bin" in alice.list_repo_files("team/moved")
    alice.create_repo("team/taken")
    with pytest.raises(HfHubHTTPError) as error:
        alice.move_repo("team/moved", "team/taken")
    assert status_of(error) == 409


def test_info_reads_the_card_and_the_weights(alice: HfApi, repo: str) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [0, 12]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
        }
    ).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(16)
    alice.upload_file(path_or_fileobj=CARD, path_in_repo="README.md", repo_id=repo)
    alice.upload_file(path_or_fileobj=weights, path_in_repo="model.safetensors", repo_id=repo)
    info = alice.model_info(repo, files_metadata=True)
    assert info.card_data is not None
    assert info.card_data["base_model"] == "org/base"
    assert info.library_name == "hubdiff"
    assert {"diff-vector", "license:apache-2.0", "base_model:org/base"} <= set(info.tags or [])
    assert "base_model:adapter:org/base" in (info.tags or [])
    assert info.safetensors is not None
    assert info.safetensors.total == 7
    assert info.safetensors.parameters == {"BF16": 6, "F32": 1}
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    assert sizes["model.safetensors"] == len(weights)
    only = alice.model_info(repo, expand=["gated"])
    assert only.gated is False
    assert only.tags is None


def test_safetensors_metadata_of_a_sharded_model(alice: HfApi, repo: str) -> None:
    tensor = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(tensor).encode()
    shard = struct.pack("<Q", len(header)) + header + bytes(4)
    index = {"metadata": {"total_size": 4}, "weight_map": {"a": "one.safetensors"}}
    alice.upload_file(path_or_fileobj=shard, path_in_repo="one.safetensors", repo_id=repo)
    alice.upload_file(
        path_or_fileobj=json.dumps(index).encode(),
        path_in_repo="model.safetensors.index.json",
        repo_id=repo,
    )
    assert alice.get_safetensors_metadata(repo).weight_map == {"a": "one.safetensors"}
    answer = alice.get_sharded_safetensors_metadata(repo)
    assert answer.files_metadata["one.safetensors"].tensors["a"].shape == [1]
    assert answer.metadata == {"total_size": 4}


def test_bad_card_metadata_is_refused_before_the_commit(alice: HfApi, repo: str) -> None:
    with pytest.raises(ValueError, match="Invalid metadata"):
        alice.upload_file(
            path_or_fileobj=b"---\ntags: [unclosed\n---\n", path_in_repo="README.md", repo_id=repo
        )
    assert alice.list_repo_files(repo) == [".gitattributes"]


def test_search_by_lineage_name_and_author_over_pages(alice: HfApi) -> None:
    names = [f"team/child-{number}" for number in range(6)]
    for name in names:
        alice.create_repo(name)
        alice.upload_file(path_or_fileobj=CARD, path_in_repo="README.md", repo_id=name)
    tags = ["base_model:adapter:org/base", "diff-vector"]
    found = [model.id for model in alice.list_models(filter=tags, author="team")]
    assert sorted(found) == names
    assert [model.id for model in alice.list_models(search="CHILD-3")] == ["team/child-3"]
    assert len(list(alice.list_models(author="team", search="child", limit=5))) == 5
    assert list(alice.list_models(filter="base_model:org/other")) == []
    (full,) = alice.list_models(search="child-1", full=True, cardData=True)
    assert full.card_data is not None
    assert full.card_data["license"] == "apache-2.0"
    assert {file.rfilename for file in full.siblings or []} == {".gitattributes", "README.md"}
