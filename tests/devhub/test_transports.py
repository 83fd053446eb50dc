"""The unmodified Python client, in a process of its own, with xet on and with xet off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubdiff.devhub import DevHub

from .conftest import PART_BYTES, USERS, RunClient

ROUND_TRIP = """
    import hashlib, json, os, sys
    from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

    repo, size = sys.argv[1], int(sys.argv[2])
    api = HfApi()
    api.create_repo(repo)
    files = {
        "README.md": b"---\\nlicense: mit\\n---\\n# hello",
        "deep/a file.txt": b"text",
        "model.safetensors": os.urandom(size),
        "zeros.bin": bytes(size) + os.urandom(size // 2),
        "again.bin": os.urandom(1000),
    }
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    api.preupload_lfs_files(repo, operations)
    done = api.create_commit(repo, operations, commit_message="all of it")
    folder = snapshot_download(repo, revision=done.oid)
    for path, data in files.items():
        assert open(os.path.join(folder, path), "rb").read() == data, path
    print(json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in files.items()}))
"""

TRANSPORTS = pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])


@TRANSPORTS
def test_files_come_back_as_they_were_sent(
    hub: DevHub, alice: HfApi, run_client: RunClient, xet: bool
) -> None:
    repo = f"alice/round-trip-{xet}"
    sha256s = json.loads(run_client(hub, ROUND_TRIP, repo, 2 * PART_BYTES + 7, xet=xet))
    listed = {file.path: file for file in alice.list_repo_tree(repo, recursive=True)}
    for path in ("model.safetensors", "zeros.bin", "again.bin"):
        assert listed[path].lfs.sha256 == sha256s[path]
    assert listed["README.md"].lfs is None
    assert hub.log.count(kind="commit", repo=repo) == 1
    assert (hub.log.count(kind="lfs", repo=repo) == 0) == xet
    assert (hub.log.count(kind="xet", repo=repo, method="POST") == 0) == (not xet)


@TRANSPORTS
def test_large_files_are_resolved_once_and_read_from_the_other_origin(
    hub: DevHub, run_client: RunClient, xet: bool
) -> None:
    repo = f"alice/origin-{xet}"
    run_client(hub, ROUND_TRIP, repo, PART_BYTES, xet=xet)
    resolves = hub.log.select(kind="resolve", repo=repo, file="model.safetensors")
    assert [(record.method, record.status) for record in resolves] == [("HEAD", 302)]
    assert hub.log.bytes_served(repo, "model.safetensors") == PART_BYTES
    assert hub.log.bytes_served(repo, "deep/a file.txt") == len("text")


def test_multipart_is_used_above_the_part_size(hub: DevHub, run_client: RunClient) -> None:
    run_client(hub, ROUND_TRIP, "alice/parts", 2 * PART_BYTES + 7, xet=False)
    paths = [record.path for record in hub.log.select(kind="lfs", method="PUT", status=200)]
    assert paths.count("/lfs-part") == 3 + 4  # model.safetensors and zeros.bin
    assert paths.count("/lfs-object") == 1


@pytest.fixture(scope="module")
def xet_hub() -> Iterator[DevHub]:
    with DevHub(users=USERS, xet_downloads=True) as hub:
        yield hub


def test_xet_downloads_rebuild_the_files_from_xorbs(xet_hub: DevHub, run_client: RunClient) -> None:
    run_client(xet_hub, ROUND_TRIP, "alice/by-xet", 1_000_000, xet=True)
    data = xet_hub.log.select(kind="data")
    assert data
    assert all(record.path.startswith("/cdn-xorbs/") for record in data)
    # A megabyte of zeros and its chunks that repeat cost next to nothing.
    assert 1_500_000 < xet_hub.log.bytes_served() < 1_700_000


def test_a_client_without_xet_still_downloads_plainly(
    xet_hub: DevHub, run_client: RunClient
) -> None:
    run_client(xet_hub, ROUND_TRIP, "alice/plain", 100_000, xet=False)
    assert xet_hub.log.bytes_served("alice/plain", "model.safetensors") == 100_000


@TRANSPORTS
def test_folder_upload_and_copy_to_another_repo(
    hub: DevHub, alice: HfApi, run_client: RunClient, tmp_path: Path, xet: bool
) -> None:
    source, target = f"alice/folder-{xet}", f"alice/copy-{xet}"
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub" / "weights.safetensors").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "scratch.log").write_text("x")
    (tmp_path / ".gitignore").write_text("*.log\n")
    script = """
        import sys
        from huggingface_hub import CommitOperationCopy, HfApi

        source, target, folder = sys.argv[1:]
        api = HfApi()
        api.create_repo(source)
        api.create_repo(target)
        api.upload_folder(repo_id=source, folder_path=folder)
        names = ["config.json", "sub/weights.safetensors"]
        copies = [
            CommitOperationCopy(name, name, src_repo_id=source, src_repo_type="model")
            for name in names
        ]
        api.create_commit(target, copies, commit_message="copy")
    """
    run_client(hub, script, source, target, tmp_path, xet=xet)
    assert set(alice.list_repo_files(source)) == {
        ".gitattributes",
        ".gitignore",
        "config.json",
        "sub/weights.safetensors",
    }
    (copied,) = alice.get_paths_info(target, "sub/weights.safetensors")
    (original,) = alice.get_paths_info(source, "sub/weights.safetensors")
    assert copied.lfs == original.lfs
    assert hub.log.count(kind="copy", repo=source) == 1
    assert hub.log.bytes_served(source, "*.safetensors") == 0
