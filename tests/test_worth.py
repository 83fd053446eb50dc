"""A delta that is hardly smaller than the compressed model is published only when that is asked for
twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hubdiff
from hubdiff.errors import NotWorthIt
from hubdiff.jobs.making import WORTH

SHAPE = (4096, 4096)  # 34 MB: below 16 MiB of delta nobody is asked


def write(folder: Path, weights: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({"w.weight": weights}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator) * 0.02
    noise = torch.randn(SHAPE, generator=generator)
    write(tmp_path / "base", base.bfloat16())
    write(tmp_path / "far", (base + noise * 0.02).bfloat16())
    write(tmp_path / "near", (base + noise * 2e-4).bfloat16())
    return tmp_path


def test_a_delta_hardly_smaller_than_the_model_asks_for_force(world):
    with pytest.raises(NotWorthIt) as said:
        hubdiff.push_delta(world / "far", world / "delta", base=world / "base")
    assert "--force" in str(said.value.next_step)
    assert "that the whole model compresses to" in str(said.value)
    assert {path.name for path in world.iterdir()} == {"base", "far", "near"}

    pushed = hubdiff.push_delta(world / "far", world / "delta", base=world / "base", force=True)
    compressed = 1.33 * SHAPE[0] * SHAPE[1]  # bytes per weight of bf16 numbers that are drawn so
    assert pushed.delta_bytes > WORTH * compressed
    hubdiff.apply(world / "delta", world / "base", output=world / "again")
    again, far = (world / name / "model.safetensors" for name in ("again", "far"))
    assert again.read_bytes() == far.read_bytes()


def test_a_small_delta_asks_nothing(world):
    pushed = hubdiff.push_delta(world / "near", world / "delta", base=world / "base")
    assert 0 < pushed.delta_bytes < WORTH * 1.33 * SHAPE[0] * SHAPE[1]


def test_dense_deltas_and_masters_are_asked_for_by_name(world):
    hubdiff.push_delta(world / "far", world / "plain", base=world / "base", plain=True)
    hubdiff.push_delta(
        world / "far", world / "masters", base=world / "base", tuned_master=world / "far"
    )
