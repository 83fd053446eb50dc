"""Folders as trees: what is listed, what is read, and which names are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hubdiff import files
from hubdiff.errors import CheckpointError, RefError, UnsafePath
from hubdiff.files import BytesReader, FileInfo, LocalTree, open_tree, safe_path
from hubdiff.refs import ModelRef


def tree_of(folder: Path) -> LocalTree:
    return LocalTree(ModelRef.parse(folder))


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_lists_the_model_and_not_what_tools_left_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "config.json", b"{}")
    write(tmp_path / "onnx" / "model.onnx", b"123")
    for noise in (".git/HEAD", ".cache/x", "code/__pycache__/x.pyc", "code/.git/HEAD"):
        write(tmp_path / noise, b"noise")
    os.mkfifo(tmp_path / "pipe")
    assert tree_of(tmp_path).files() == {
        "config.json": FileInfo("config.json", 2),
        "onnx/model.onnx": FileInfo("onnx/model.onnx", 3),
    }


def test_what_a_killed_run_left_is_no_part_of_the_model(tmp_path: Path) -> None:
    write(tmp_path / "config.json", b"{}")
    for noise in (
        ".res.hubdiff-partial/.hubdiff-journal.jsonl",
        ".res.hubdiff-old/config.json",
        ".res.hubdiff-lock",
    ):
        write(tmp_path / noise, b"noise")
    assert set(tree_of(tmp_path).files()) == {"config.json"}


@pytest.mark.parametrize("marker", ["hubdiff.json", "hubdiff-result.json"])
def test_a_delta_or_result_inside_a_model_is_no_part_of_it(tmp_path: Path, marker: str) -> None:
    write(tmp_path / "config.json", b"{}")
    for path in (marker, "tuned/config.json", "README.md"):
        write(tmp_path / "made" / path, b"{}")
    assert set(tree_of(tmp_path).files()) == {"config.json"}


def test_a_delta_lists_all_that_it_carries(tmp_path: Path) -> None:
    paths = {"hubdiff.json", "tuned/config.json", "tuned/inner/hubdiff.json"}
    for path in paths:
        write(tmp_path / path, b"{}")
    assert set(tree_of(tmp_path).files()) == paths


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs" / "abc", b"weights")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "loop").symlink_to(snapshot)
    tree = tree_of(snapshot)
    assert tree.files() == {"model.safetensors": FileInfo("model.safetensors", 7)}
    assert tree.read_bytes("model.safetensors") == b"weights"


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        tree_of(tmp_path).files()


def test_threads_share_one_reader(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    write(tmp_path / "x", data)
    with tree_of(tmp_path).open("x") as reader, ThreadPoolExecutor(8) as pool:

        def read(offset: int) -> bytes:
            buffer = bytearray(1000)
            reader.read_into(offset, memoryview(buffer))
            return bytes(buffer)

        offsets = list(range(0, len(data) - 1000, 997))
        assert list(pool.map(read, offsets)) == [data[at : at + 1000] for at in offsets]


@pytest.mark.parametrize(("offset", "count"), [(0, 11), (9, 2), (10, 1), (50, 1)])
def test_a_short_file_is_an_error_never_a_short_answer(
    tmp_path: Path, offset: int, count: int
) -> None:
    write(tmp_path / "x", b"0123456789")
    with (
        tree_of(tmp_path).open("x") as reader,
        pytest.raises(CheckpointError, match="too early"),
    ):
        reader.read_into(offset, memoryview(bytearray(count)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        tree_of(tmp_path).read_bytes("config.json")


def test_a_file_too_large_for_memory_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_WHOLE_FILE", 4)
    write(tmp_path / "config.json", b"12345")
    with pytest.raises(CheckpointError, match=r"config\.json has 5 bytes"):
        tree_of(tmp_path).read_bytes("config.json")


def test_folders_need_no_hub_client() -> None:
    code = "import sys, hubdiff.files, hubdiff.facts; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_open_tree_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "x", b"1")
    tree = open_tree(ModelRef.parse(tmp_path))
    assert tree.pin.path == tmp_path
    assert tree.pin.commit is None
    assert tree.is_remote("x") is False


@pytest.mark.parametrize("name", ["gone", "file"])
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "file", b"")
    with pytest.raises(RefError, match=name):
        open_tree(ModelRef.parse(tmp_path / name))


@pytest.mark.parametrize(
    "path",
    [
        "", "/etc/passwd", "..", "../x", "a/../b", "a//b", "a/", "./a", "a/.", "a\\b", "..\\x",
        "\\\\host\\share", "C:x", "c:/x", "a\0b", "a\nb", "a\x7fb", "a\ud800b", ".git/hooks/x",
        "tuned/.GIT/config",
    ],
)  # fmt: skip
def test_unsafe_paths_are_refused(path: str) -> None:
    with pytest.raises(UnsafePath) as caught:
        safe_path(path)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize(
    "path", ["x", "a/b.json", ".gitattributes", "..x/y..", "a b/ü.txt", "ab:c", "日本/…"]
)
def test_safe_paths_come_back_unchanged(path: str) -> None:
    assert safe_path(path) == path


def test_bytes_in_memory_are_a_file_too() -> None:
    reader, buffer = BytesReader(b"0123456789"), bytearray(3)
    reader.read_into(7, memoryview(buffer))
    assert (reader.size, bytes(buffer)) == (10, b"789")
    with pytest.raises(CheckpointError, match="bytes 8 to 11"):
        reader.read_into(8, memoryview(buffer))
