"""Layer files: where they end, how much of them is header, and that nothing is lost between."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import hubdiff
from hubdiff import layers
from hubdiff.hashing import hash_bytes
from hubdiff.layers import LayerWriter, header_room
from hubdiff.manifest import Part
from hubdiff.safetensors_io import build_header
from tests.models import hashes, moved, save, weights

PART = Part("delta", ("raw",), "plain", "U16", 0, "0" * 64)
# A name that JSON has to spell out, and one of many letters.
SHAPES = {"ä\n": (3,), "b": (), "c" * 300: (70_000, 7), "empty": (0, 5)}


def _write(folder: Path, group: str, tensors: dict[str, np.ndarray]) -> list[layers.LayerFile]:
    room = header_room((name, array.shape) for name, array in tensors.items())
    with LayerWriter(folder, group, 0, room) as writer:
        for name, array in tensors.items():
            dense = writer.dense(name, array.shape, PART)
            dense.write(0, (array.tobytes(),))
            dense.finish()
        return list(writer.finish())


def _drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 1 << 16, shape, np.uint16) for name, shape in shapes.items()}


@pytest.mark.parametrize("names", [["ä\n"], ["b", "empty"], list(SHAPES), ["c" * 300]])
@pytest.mark.parametrize("group", ["delta", "exact"])
def test_every_tensor_comes_back_however_long_the_header(
    names: list[str], group: str, tmp_path: Path
) -> None:
    tensors = _drawn({name: SHAPES[name] for name in names})
    (file,) = _write(tmp_path, group, tensors)
    path = tmp_path / file.record.path
    data = path.read_bytes()
    assert file.record.size == len(data)
    assert file.record.sha256 == hash_bytes(data)
    path.rename(tmp_path / "layer.safetensors")
    found = load_file(tmp_path / "layer.safetensors")
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    spaces = len(header) - len(header.rstrip())
    assert spaces < max(8, len(data) / 1000)


def test_a_group_without_tensors_has_no_file(tmp_path: Path) -> None:
    assert _write(tmp_path, "exact", {}) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_full_takes_no_more_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "SHARD_BYTES", 10_000)
    base = weights()
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", moved(base))
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    files = sorted(path.name for path in (tmp_path / "delta").glob("delta-*"))
    assert len(files) > 3
    assert files[0] == f"delta-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "delta" / "delta.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    for file in files[:-1]:
        assert (tmp_path / "delta" / file).stat().st_size > 10_000
    with hubdiff.open_delta(tmp_path / "delta") as delta:
        assert torch.isfinite(delta.get_tensor("model.embed_tokens.weight")).all()
    hubdiff.apply(tmp_path / "delta", tmp_path / "base", output=tmp_path / "out")
    rebuilt, tuned = hashes(tmp_path / "out"), hashes(tmp_path / "tuned")
    assert {name: rebuilt[name] for name in tuned} == tuned


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 16), ("F6_E2M3", 24), ("F8_E4M3FNUZ", 32)])
def test_added_tensors_of_less_than_a_byte_come_back(
    dtype: str, nbytes: int, plain: bool, tmp_path: Path
) -> None:
    """No library saves these: the file is written by hand."""
    base = {"w": torch.ones(4, 8, dtype=torch.bfloat16)}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", base)
    header = build_header([("w", "BF16", (4, 8), 64), ("added", dtype, (4, 8), nbytes)], {})
    body = np.random.default_rng(0).bytes(64 + nbytes)
    (tmp_path / "tuned" / "model.safetensors").write_bytes(header + body)
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base", plain=plain)
    hubdiff.apply(tmp_path / "delta", tmp_path / "base", output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == header + body
