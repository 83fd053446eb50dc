"""Writing repos: one commit, nothing needed after it was added, nothing sent twice."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubdiff import errors
from hubdiff.devhub import DevHub
from hubdiff.hub import HubTree, HubUpload, retry, upload
from hubdiff.refs import ModelRef, PinnedRef

PutRepo = Callable[..., str]
NewName = Callable[[], str]

WEIGHTS = os.urandom(300_000)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.001)


def content(repo: str) -> dict[str, bytes]:
    """What a reader finds there, without the file every new repo has."""
    tree = HubTree(ModelRef.parse(repo))
    return {path: tree.read_bytes(path) for path in tree.files() if path != ".gitattributes"}


def pin_of(repo: str) -> PinnedRef:
    return HubTree(ModelRef.parse(repo)).pin


def test_one_commit_of_everything(devhub: DevHub, new_name: NewName, tmp_path: Path) -> None:
    repo, local = new_name(), tmp_path / "model.safetensors"
    local.write_bytes(WEIGHTS)
    upload = HubUpload(repo)
    upload.add("model.safetensors", local)
    local.unlink()
    upload.add_bytes("tuned/config.json", b"{}")
    upload.add_bytes("empty.txt", b"")
    done = upload.commit("Add it", "All of it.")
    assert content(repo) == {
        "model.safetensors": WEIGHTS,
        "tuned/config.json": b"{}",
        "empty.txt": b"",
    }
    assert devhub.log.count(kind="commit", repo=repo) == 1
    assert done.oid == pin_of(repo).commit
    assert done.pr_url is None
    assert done.url == f"{devhub.url}/{repo}/commit/{done.oid}"
    last = HfApi(endpoint=devhub.url).list_repo_commits(repo)[0]
    assert (last.title, last.message) == ("Add it", "All of it.")


def test_a_large_file_is_stored_when_it_is_added(
    devhub: DevHub, new_name: NewName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "IN_MEMORY", 1000)
    repo, local = new_name(), tmp_path / "shard"
    sending = HubUpload(repo)
    devhub.log.clear()
    for number in range(3):
        local.write_bytes(WEIGHTS + bytes([number]))
        sending.add(f"model-{number}.safetensors", local)
        local.unlink()
    assert devhub.log.count(kind="xet") + devhub.log.count(kind="lfs") >= 3
    assert content(repo) == {}
    devhub.log.clear()
    sending.commit("All")
    assert set(content(repo)) == {f"model-{number}.safetensors" for number in range(3)}
    assert content(repo)["model-2.safetensors"] == WEIGHTS + b"\2"


def test_many_small_files_are_sent_as_they_add_up(
    devhub: DevHub, new_name: NewName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "IN_MEMORY", 1000)
    repo = new_name()
    sending = HubUpload(repo)
    for number in range(10):
        sending.add_bytes(f"{number}.json", b"x" * 300)
    sending.commit("All")
    assert len(content(repo)) == 10
    assert devhub.log.count(kind="commit", repo=repo) == 1


def test_existing_files_replace_and_delete(put_repo: PutRepo) -> None:
    repo = put_repo({"old.json": b"1", "config.json": b"1", "model.safetensors": WEIGHTS})
    upload = HubUpload(repo)
    existing = upload.existing_files()
    assert existing["model.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    upload.delete("old.json")
    upload.delete("model.safetensors")
    upload.add_bytes("config.json", b"2")
    upload.commit("Change")
    assert content(repo) == {"config.json": b"2"}


def test_copies_move_no_weights(put_repo: PutRepo, devhub: DevHub, new_name: NewName) -> None:
    source = put_repo({"model.safetensors": WEIGHTS, "config.json": b"{}"})
    pin = pin_of(source)
    put_repo({"model.safetensors": b"newer", "config.json": b"newer"}, source)
    repo = new_name()
    upload = HubUpload(repo)
    upload.copy("weights/model.safetensors", pin, "model.safetensors")
    upload.copy("config.json", pin, "config.json")
    upload.commit("Copy")
    assert devhub.log.count(kind="copy", repo=source) == 1
    assert devhub.log.bytes_served(source, "model.safetensors") == 0
    assert content(repo) == {"weights/model.safetensors": WEIGHTS, "config.json": b"{}"}


def test_a_copy_inside_one_repo(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo({"model.safetensors": WEIGHTS})
    upload = HubUpload(repo)
    upload.copy("copy.safetensors", pin_of(repo), "model.safetensors")
    upload.commit("Copy")
    assert devhub.log.bytes_served(repo) == 0
    assert content(repo) == {"model.safetensors": WEIGHTS, "copy.safetensors": WEIGHTS}


def test_what_storage_cannot_copy_goes_through_this_machine(
    put_repo: PutRepo, devhub: DevHub, new_name: NewName, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = put_repo({"model.safetensors": WEIGHTS})
    described = upload._describe

    def before_xet(*args: PinnedRef | str) -> object:
        entry = described(*args)  # type: ignore[arg-type]
        entry.xet_hash = None
        return entry

    monkeypatch.setattr(upload, "_describe", before_xet)
    repo = new_name()
    sending = HubUpload(repo)
    sending.copy("model.safetensors", pin_of(source), "model.safetensors")
    sending.commit("Copy")
    assert devhub.log.count(kind="copy") == 0
    assert content(repo) == {"model.safetensors": WEIGHTS}


def test_a_copy_of_nothing_is_refused_when_it_is_asked_for(
    put_repo: PutRepo, new_name: NewName
) -> None:
    pin = pin_of(put_repo({"config.json": b"{}"}))
    with pytest.raises(errors.RemoteFileNotFound, match=r"nope\.json"):
        HubUpload(new_name()).copy("x", pin, "nope.json")


def test_a_pull_request_leaves_the_branch_alone(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo({"config.json": b"1"})
    upload = HubUpload(repo, create_pr=True)
    upload.add_bytes("config.json", b"2")
    upload.add_bytes("model.safetensors", WEIGHTS)
    done = upload.commit("Propose")
    assert done.pr_url == f"{devhub.url}/{repo}/discussions/1"
    assert content(repo) == {"config.json": b"1"}
    assert content(f"{repo}@refs/pr/1") == {"config.json": b"2", "model.safetensors": WEIGHTS}


def test_a_stranger_may_open_a_pull_request(
    put_repo: PutRepo, devhub: DevHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = put_repo({"config.json": b"1"})
    monkeypatch.setenv("HF_TOKEN", devhub.token("other"))
    upload = HubUpload(repo, create_pr=True)
    upload.add_bytes("model.safetensors", WEIGHTS)
    assert upload.commit("Propose").pr_url


def test_a_branch_may_be_named(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo({"config.json": b"1"})
    HfApi(endpoint=devhub.url, token=devhub.token()).create_branch(repo, branch="dev/x")
    upload = HubUpload(repo, revision="dev/x")
    upload.add_bytes("config.json", b"2")
    upload.commit("Change")
    assert content(repo) == {"config.json": b"1"}
    assert content(f"{repo}@dev/x") == {"config.json": b"2"}


def test_someone_who_commits_meanwhile_is_not_overwritten(put_repo: PutRepo) -> None:
    repo = put_repo({"config.json": b"1"})
    upload = HubUpload(repo)
    upload.add_bytes("config.json", b"2")
    put_repo({"other.json": b"theirs"}, repo)
    with pytest.raises(errors.HubConflict, match="someone committed meanwhile") as caught:
        upload.commit("Change")
    assert "Run the same again" in (caught.value.next_step or "")
    assert content(repo) == {"config.json": b"1", "other.json": b"theirs"}


def test_what_is_there_already_makes_no_commit(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo({"config.json": b"1", "model.safetensors": WEIGHTS})
    upload = HubUpload(repo)
    upload.add_bytes("config.json", b"1")
    upload.add_bytes("model.safetensors", WEIGHTS)
    assert upload.commit("Same").oid == pin_of(repo).commit
    assert devhub.log.count(kind="commit") == 0


def test_a_gitignore_drops_nothing(devhub: DevHub, new_name: NewName) -> None:
    repo = new_name()
    upload = HubUpload(repo)
    upload.add_bytes(".gitignore", b"*.safetensors\n*.json\n")
    upload.add_bytes("model.safetensors", WEIGHTS)
    upload.add_bytes("config.json", b"{}")
    upload.commit("All")
    assert set(content(repo)) == {".gitignore", "model.safetensors", "config.json"}


def test_private_is_private(devhub: DevHub, new_name: NewName, put_repo: PutRepo) -> None:
    repo = new_name()
    HubUpload(repo, private=True)
    assert HfApi(endpoint=devhub.url, token=devhub.token()).model_info(repo).private
    assert HubUpload(repo, private=True).existing_files()
    public = put_repo({"config.json": b"1"})
    with pytest.raises(errors.HubConflict, match="is public"):
        HubUpload(public, private=True)


def test_no_right_to_write(
    put_repo: PutRepo, devhub: DevHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = put_repo({"config.json": b"1"})
    monkeypatch.setenv("HF_TOKEN", devhub.token("other"))
    upload = HubUpload(repo)
    upload.add_bytes("config.json", b"2")
    with pytest.raises(errors.AuthError) as caught:
        upload.commit("Change")
    assert "hf auth login" in (caught.value.next_step or "")
    with pytest.raises(errors.AuthError, match="namespace org"):
        HubUpload("org/of-someone-else")


def test_no_token(devhub: DevHub, new_name: NewName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(errors.AuthError) as caught:
        HubUpload(new_name())
    assert "hf auth login" in (caught.value.next_step or "")


def test_unsafe_names_are_refused(devhub: DevHub, new_name: NewName, tmp_path: Path) -> None:
    upload = HubUpload(new_name())
    (tmp_path / "x").write_bytes(b"")
    for act in (
        lambda: upload.add("../x", tmp_path / "x"),
        lambda: upload.add_bytes("/x", b""),
        lambda: upload.delete("a/../x"),
    ):
        with pytest.raises(errors.UnsafePath):
            act()


def test_a_card_the_hub_refuses_is_an_error(new_name: NewName, devhub: DevHub) -> None:
    upload = HubUpload(new_name())
    upload.add_bytes("README.md", b"---\nlicense: [mit\n---\n")
    with pytest.raises(errors.HubError, match=r"README\.md"):
        upload.commit("Card")


SCRIPT = """
import json, sys
from pathlib import Path
from hubdiff.hub import HubTree, HubUpload
from hubdiff.refs import ModelRef

folder, repo, copy = Path(sys.argv[1]), "org/" + sys.argv[2], "org/" + sys.argv[2] + "-copy"
upload = HubUpload(repo)
for path in sorted(folder.iterdir()):
    upload.add(path.name, path)
    path.unlink()
upload.commit("All")
pin = HubTree(ModelRef.parse(repo)).pin
upload = HubUpload(copy)
for path in HubTree(ModelRef.parse(repo)).files():
    upload.copy(path, pin, path)
upload.commit("Copy")
files = HubTree(ModelRef.parse(copy)).files().values()
print(json.dumps({info.path: info.sha256 for info in files}))
"""


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_both_transports_carry_every_byte(devhub: DevHub, tmp_path: Path, xet: bool) -> None:
    big, small = os.urandom(20_000_000), WEIGHTS
    (tmp_path / "big.safetensors").write_bytes(big)
    (tmp_path / "small.safetensors").write_bytes(small)
    (tmp_path / "config.json").write_bytes(b"{}")
    name = f"both-{'xet' if xet else 'lfs'}"
    environment = os.environ | devhub.environment("demo", xet=xet)
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]  # hubdiff is silent by itself
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    found = json.loads(ran.stdout)
    assert found["big.safetensors"] == hashlib.sha256(big).hexdigest()
    assert found["small.safetensors"] == hashlib.sha256(small).hexdigest()
    assert found["config.json"] is None
    assert devhub.log.count(kind="xet" if xet else "lfs") > 0
    assert devhub.log.count(kind="lfs" if xet else "xet") == 0
    assert devhub.log.count(kind="copy") == 1
    assert devhub.log.bytes_served(f"org/{name}", "*.safetensors") == 0
