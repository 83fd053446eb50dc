"""Which files are a model's weights, and what is refused before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save
from safetensors.torch import save_file

from hubdiff.checkpoint import INDEX, Checkpoint, open_checkpoint
from hubdiff.errors import BadIndex, BadSafetensors, CheckpointError, IsADelta, NoWeights
from hubdiff.files import LocalReader, LocalTree
from hubdiff.refs import ModelRef

WEIGHTS = {"a": torch.zeros(2, 3), "b": torch.ones(4), "c": torch.zeros(1)}


def tree(folder: Path) -> LocalTree:
    return LocalTree(ModelRef.parse(folder))


def read(folder: Path) -> Checkpoint:
    """Opened, and closed again: what it says stays."""
    with open_checkpoint(tree(folder)) as checkpoint:
        return checkpoint


def write(folder: Path, *files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(WEIGHTS, folder / file)
    return folder


def test_a_single_file_is_the_weights(tmp_path: Path) -> None:
    checkpoint = read(save(tmp_path / "m", WEIGHTS))
    assert list(checkpoint.shards) == ["model.safetensors"]
    assert set(checkpoint.tensors) == set(WEIGHTS)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.index is None


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", WEIGHTS, shards=2)
    checkpoint = read(folder)
    assert list(checkpoint.shards) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert {n: p.file[6:11] for n, p in checkpoint.tensors.items()} == {
        "a": "00001",
        "c": "00001",
        "b": "00002",
    }
    assert checkpoint.index == (folder / INDEX).read_bytes()


def test_a_single_file_goes_before_an_index_as_from_pretrained_does(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", WEIGHTS, shards=2)
    write(folder, "model.safetensors")
    assert list(read(folder).shards) == ["model.safetensors"]


def test_other_weights_of_the_repo_are_not_the_models(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "m",
        "model.safetensors",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "vae/model.safetensors",
    )
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert list(read(folder).shards) == ["model.safetensors"]


def test_the_only_safetensors_file_may_have_any_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", "weights.safetensors", "onnx/model.safetensors")
    assert list(read(folder).shards) == ["weights.safetensors"]


def test_a_variant_beside_an_index_is_left_alone(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", WEIGHTS, shards=2)
    write(folder, "consolidated.00.safetensors")
    assert "consolidated.00.safetensors" not in read(folder).shards


def test_a_model_of_no_config_opens(tmp_path: Path) -> None:
    assert read(write(tmp_path / "m", "model.safetensors")).config == {}


# --- refused ---

Spoil = Callable[[Path], object]


def shard_named_as_the_card(folder: Path) -> None:
    (folder / SHARD_1).rename(folder / "README.md")
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(SHARD_1, "README.md"))


def edit_index(change: Callable[[dict[str, str]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_bytes())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BAD_INDEX: dict[str, tuple[Spoil, str]] = {
    "names a tensor the shard lacks": (edit_index(lambda m: m.update(d=SHARD_1)), "'d'"),
    "names the wrong shard": (edit_index(lambda m: m.update(a=SHARD_2)), "'a'"),
    "forgets a tensor": (edit_index(lambda m: m.pop("a")), "does not list 'a'"),
    "names a file that is gone": (edit_index(lambda m: m.update(a="gone.safetensors")), "gone"),
    "leaves the folder": (edit_index(lambda m: m.update(a="../x.safetensors")), "not a file name"),
    "leaves it by an absolute path": (edit_index(lambda m: m.update(a="/etc/passwd")), "not a fil"),
    "leaves it by a backslash": (edit_index(lambda m: m.update(a="..\\x.safetensors")), "not a f"),
    "a folder": (edit_index(lambda m: m.update(a="..")), "not a file name"),
    "a number": (edit_index(lambda m: m.update(a=3)), "not a file name"),  # type: ignore[arg-type]
    "the card": (shard_named_as_the_card, "README.md, which is no .safetensors"),
    "nothing": (edit_index(lambda m: m.clear()), "no weight_map"),
    "a list": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), "no weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_a_stale_or_hostile_index_is_refused(tmp_path: Path, case: str) -> None:
    spoil, words = BAD_INDEX[case]
    folder = save(tmp_path / "m", WEIGHTS, shards=2)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")  # it must not be reached
    spoil(folder)
    with pytest.raises(BadIndex, match=INDEX) as caught:
        read(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.next_step


@pytest.mark.parametrize("text", ["{", "[]", "\ufffd", "[" * 100_000, "9" * 5000])
@pytest.mark.parametrize("file", [INDEX, "config.json"])
def test_json_that_is_none_is_refused_by_name(tmp_path: Path, file: str, text: str) -> None:
    folder = save(tmp_path / "m", WEIGHTS, shards=2)
    (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=f"{file} is not"):
        read(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", WEIGHTS, shards=2)
    save_file({"b": WEIGHTS["b"], "a": WEIGHTS["a"]}, folder / SHARD_2)
    with pytest.raises(CheckpointError, match=f"'a' is in both {SHARD_1} and {SHARD_2}") as caught:
        read(folder)
    assert caught.value.next_step


def test_a_shard_that_is_no_safetensors_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", WEIGHTS, shards=2)
    (folder / SHARD_2).write_bytes((folder / SHARD_2).read_bytes()[:-1])
    with pytest.raises(BadSafetensors, match=f"{SHARD_2}: .*truncated"):
        read(folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["pytorch_model.bin"], "only as pickle"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "only as pickle"),
        (["consolidated.00.pth"], "only as pickle"),
        (["model.gguf"], "no safetensors weights"),
        ([], "no safetensors weights"),
    ],
)
def test_weights_that_can_not_be_read_say_why(tmp_path: Path, files: list[str], words: str) -> None:
    for file in ["config.json", *files]:
        (tmp_path / file).write_text("{}")
    with pytest.raises(NoWeights, match=words) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.next_step


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(NoWeights, match="PEFT adapter") as caught:
        read(write(tmp_path / "m", "adapter_model.safetensors"))
    assert "merge_and_unload" in str(caught.value.next_step)


def test_several_files_without_an_index_are_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(NoWeights, match=r"2 safetensors files .*a\.safetensors, b\.safetensors"):
        read(write(tmp_path / "m", "a.safetensors", "b.safetensors"))


def test_a_delta_is_not_a_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", "delta-00001-of-00001.safetensors")
    (folder / "hubdiff.json").write_text("{}")
    with pytest.raises(IsADelta, match="is a delta") as caught:
        read(folder)
    assert "hubdiff apply" in str(caught.value.next_step)


def test_opening_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "m", "model.safetensors")
    ends = []
    read_into = LocalReader.read_into

    def watched(self: LocalReader, offset: int, buffer: memoryview) -> None:
        ends.append(offset + len(buffer))
        read_into(self, offset, buffer)

    monkeypatch.setattr(LocalReader, "read_into", watched)
    checkpoint = read(folder)
    assert max(ends) == len(checkpoint.shards["model.safetensors"].raw)
