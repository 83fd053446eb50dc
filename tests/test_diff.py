"""diff: numbers against the same ones from whole models, and what else is found to differ."""

from __future__ import annotations

import json
from pathlib import Path

import models
import numpy as np
import pytest
import torch

import hubdiff
from hubdiff.difference import TensorChange
from hubdiff.errors import CannotDiff
from hubdiff.jobs.diff import Diff, diff

TOKENS = {token: row for row, token in enumerate(["<s>", "</s>", "a", "b", "c"])}


def tokenizer(tokens: dict[str, int]) -> dict[str, str]:
    return {"tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": tokens}})}


def by_name(found: Diff) -> dict[str, TensorChange]:
    return {tensor.name: tensor for tensor in found.tensors}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_numbers_are_those_of_the_whole_models(
    tmp_path: Path, dtype: torch.dtype, shards: int
) -> None:
    old = models.weights(dtype=dtype)
    new = models.moved(old, 1e-3)
    models.save(tmp_path / "old", old)
    models.save(tmp_path / "new", new, shards=shards)
    found = by_name(diff(tmp_path / "old", tmp_path / "new"))
    assert set(found) == set(old)
    for name, before in old.items():
        x, y = (t.double().numpy().reshape(-1) for t in (before, new[name]))
        change = found[name]
        assert change.changed == np.count_nonzero(x != y)
        assert change.old_norm == pytest.approx(np.linalg.norm(x))
        assert change.new_norm == pytest.approx(np.linalg.norm(y))
        assert change.delta_norm == pytest.approx(np.linalg.norm(y - x), rel=1e-4)
        assert change.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def participation(matrix: torch.Tensor) -> float:
    squares = torch.linalg.svdvals(matrix.double()) ** 2
    return float(squares.sum() ** 2 / (squares**2).sum())


@pytest.mark.parametrize("shape", [(300, 40), (64, 64), (7, 5000), (1100, 1000), (520, 2048)])
@pytest.mark.parametrize("rank", [1, 3, None])
def test_rank_counts_directions(tmp_path: Path, shape: tuple[int, int], rank: int | None) -> None:
    """Rows that are cut by a segment (2^20 elements) and by a block are rows all the same."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator)  # noqa: E731
    step = draw(*shape) if rank is None else draw(shape[0], rank) @ draw(rank, shape[1])
    old = draw(*shape)
    models.save(tmp_path / "old", {"a.weight": old})
    models.save(tmp_path / "new", {"a.weight": old + step})
    (found,) = diff(tmp_path / "old", tmp_path / "new").tensors
    assert found.rank == pytest.approx(participation(step), rel=0.2)


def test_what_has_no_rank_says_so(tmp_path: Path) -> None:
    old = {"a.bias": torch.ones(5), "b.weight": torch.ones(4, 4), "c.weight": torch.ones(3, 3)}
    new = {**old, "a.bias": torch.zeros(5), "b.weight": torch.full((4, 4), 2.0)}
    models.save(tmp_path / "old", old)
    models.save(tmp_path / "new", new)
    found = by_name(diff(tmp_path / "old", tmp_path / "new"))
    assert found["a.bias"].rank is None
    assert found["b.weight"].rank == pytest.approx(1)
    assert found["c.weight"].rank is None
    assert found["c.weight"].changed == 0


def test_equal_models_are_the_same(tmp_path: Path) -> None:
    for name, shards in (("old", 1), ("new", 2)):
        models.save(tmp_path / name, models.weights(), shards=shards)
    found = diff(tmp_path / "old", tmp_path / "new")
    assert found.same
    assert found.total == {"relative_norm": 0.0, "cosine": pytest.approx(1), "unchanged_share": 1}


def test_everything_else_that_differs_is_listed(tmp_path: Path) -> None:
    old, new = models.weights(), models.weights()
    old["model.gone"] = torch.ones(2)
    new["model.new"] = torch.ones(2)
    old["model.shape"], new["model.shape"] = torch.ones(2), torch.ones(3)
    old["model.count"], new["model.count"] = torch.arange(4), torch.arange(4).int()
    old["model.index"], new["model.index"] = torch.arange(4), torch.arange(4) * 2
    old["model.wide"] = torch.ones(4).bfloat16()
    new["model.wide"] = torch.tensor([1.0, 1, 1, 2])
    files = {"README.md": "a", "notes.txt": "a", "old.txt": "", **tokenizer(TOKENS)}
    models.save(tmp_path / "old", old, files=files)
    files = {"README.md": "a", "notes.txt": "b", **tokenizer({**TOKENS, "b": 9, "d": 3})}
    models.save(tmp_path / "new", new, files=files, rope_theta=5e5, extra={"a": 1})
    found = diff(tmp_path / "old", tmp_path / "new")
    assert not found.same
    assert (found.added, found.removed) == (("model.new",), ("model.gone",))
    assert {change.what for change in found.unlike} == {"model.shape", "model.count"}
    tensors = by_name(found)
    assert tensors["model.index"].changed == 3
    assert (tensors["model.wide"].changed, tensors["model.wide"].old_dtype) == (1, "BF16")
    config = {change.what: (change.old, change.new) for change in found.config}
    assert config == {"rope_theta": ("10000.0", "500000.0"), "extra": (None, '{"a": 1}')}
    tokens = {change.what: change.new or change.old for change in found.tokenizer}
    assert tokens["tokens added"] == "'d'"
    assert tokens["tokens on other rows"] == "1"
    listed = dict(found.files)
    assert (listed["notes.txt"], listed["old.txt"]) == ("changed", "removed")
    assert "README.md" not in listed
    json.dumps(found.as_json())


def test_names_may_differ_by_a_prefix(tmp_path: Path) -> None:
    old = models.weights()
    models.save(tmp_path / "old", old)
    models.save(tmp_path / "new", {f"language.{n}": t for n, t in models.moved(old).items()})
    found = diff(tmp_path / "old", tmp_path / "new")
    assert (found.added, found.removed) == ((), ())
    assert found.changed[0].name == f"language.{found.changed[0].old_name}"


def test_models_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    models.save(tmp_path / "old", {"a.b.weight": torch.ones(2)})
    models.save(tmp_path / "new", {"c.d.bias": torch.ones(2)})
    with pytest.raises(CannotDiff, match="partner"):
        hubdiff.diff(tmp_path / "old", tmp_path / "new")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    models.save(tmp_path / "old", models.weights())
    models.save(tmp_path / "new", models.moved(models.weights()))
    diff(tmp_path / "old", tmp_path / "new", plot=tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


PEAK = """
import re, sys
from pathlib import Path
from hubdiff.jobs.diff import diff
diff(sys.argv[1], sys.argv[2])
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    import subprocess
    import sys

    peaks = []
    for size in (1, 6):
        folder = tmp_path / str(size)
        old = {
            f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(4096, 4096).bfloat16()
            for i in range(size)
        }
        models.save(folder / "old", old)
        models.save(folder / "new", {n: t + 1 for n, t in old.items()})
        command = [sys.executable, "-c", PEAK, str(folder / "old"), str(folder / "new")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] < peaks[0] + (24 << 20)
    assert peaks[1] < 400e6
