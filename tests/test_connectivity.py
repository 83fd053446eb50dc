"""connectivity: losses along a line of real models are those of the models on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import make_base, write_task
from transformers import AutoTokenizer, LlamaForCausalLM

import hubdiff
from hubdiff.errors import HubdiffError, NamesMismatch, ShapeMismatch
from hubdiff.jobs.connectivity import Losses

pytest.importorskip("trl")
SETTINGS = ("steps=60", "batch=8", "micro_batch=8", "length=64", "learning_rate=1e-2")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases of different draws, each trained on the same task, and the first one's delta."""
    folder = tmp_path_factory.mktemp("family")
    data = write_task(folder / "task.jsonl")
    for name, seed in (("one", 1), ("two", 2)):
        base = make_base(folder / f"{name}-base", seed)
        hubdiff.finetune(base, data=data, output=folder / name, settings=SETTINGS)
    hubdiff.push_delta(
        folder / "one", folder / "delta", base=folder / "one-base", plain=True, force=True
    )
    return folder


def loss_of(weights: dict[str, torch.Tensor], family: Path) -> float:
    """By hand: the mean over every token behind the prompt, the end of the text among them."""
    model = LlamaForCausalLM.from_pretrained(family / "one-base", dtype=torch.float32).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    tokenizer = AutoTokenizer.from_pretrained(family / "one-base")
    total, count = 0.0, 0
    for line in (family / "task.jsonl").read_text().splitlines():
        row = json.loads(line)
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(start, len(ids)):
            total, count = total - float(logits[place - 1, ids[place]]), count + 1
    return total / count


def measure(family: Path, one: str, other: str, **more: Any) -> Any:
    options = {"data": family / "task.jsonl", "points": 5, **more}
    return hubdiff.connectivity(family / one, family / other, **options)


def test_the_points_are_the_models_on_the_line(family: Path) -> None:
    found = measure(family, "one", "two")
    one, two = (load_file(family / name / "model.safetensors") for name in ("one", "two"))
    (line,) = found.lines
    assert found.points == (0.0, 0.25, 0.5, 0.75, 1.0)
    for t, loss in zip(found.points, line.losses, strict=True):
        weights = {name: (1 - t) * one[name].float() + t * two[name].float() for name in one}
        assert loss == pytest.approx(loss_of(weights, family), rel=1e-4)


def test_models_of_two_basins_have_a_barrier_between_them(family: Path) -> None:
    apart = measure(family, "one", "two").lines[0]
    near = measure(family, "one-base", "one").lines[0]
    assert max(apart.losses[0], apart.losses[-1]) < 1.0
    assert apart.barrier > 0.5
    assert near.barrier < apart.barrier / 5


def test_a_delta_makes_a_line_from_tuned_to_result(family: Path) -> None:
    found = measure(family, "one-base", "two-base", delta=family / "delta")
    bases, tuned = found.lines
    assert bases.losses == measure(family, "one-base", "two-base").lines[0].losses
    one = load_file(family / "one" / "model.safetensors")
    assert tuned.losses[0] == pytest.approx(loss_of(one, family), rel=1e-2)
    with hubdiff.open_delta(family / "delta") as delta:
        base = load_file(family / "two-base" / "model.safetensors")
        result = {name: base[name].float() + delta.get_tensor(name) for name in base}
    assert tuned.losses[-1] == pytest.approx(loss_of(result, family), rel=1e-4)


def test_a_barrier_is_what_rises_above_the_straight_line() -> None:
    assert Losses.of("", (0.0, 0.5, 1.0), (1.0, 3.0, 2.0)).barrier == 1.5
    assert Losses.of("", (0.0, 0.5, 1.0), (1.0, 0.5, 2.0)).barrier == 0.0


def test_models_of_other_shapes_are_refused(family: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(family / "two" / "model.safetensors")
    for name, error in (("missing", NamesMismatch), ("wide", ShapeMismatch)):
        folder = make_base(tmp_path / name)
        changed = dict(weights)
        if name == "missing":
            del changed["model.norm.weight"]
        else:
            changed["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(error):
            hubdiff.connectivity(family / "one", folder, data=family / "task.jsonl")


def test_nothing_but_prompts_is_refused(family: Path) -> None:
    with pytest.raises(HubdiffError, match=r"no token of .* counts"):
        measure(family, "one", "two", length=4)


def test_the_command_draws_and_prints(family: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "hubdiff", "connectivity", str(family / "one")]
    line += [str(family / "two"), "--data", str(family / "task.jsonl"), "--points", "3"]
    line += ["--plot", str(tmp_path / "line.png")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "barrier, base to target" in done.stdout
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    document = subprocess.run([*line, "--json"], capture_output=True, text=True, check=True)
    assert len(json.loads(document.stdout)["lines"][0]["losses"]) == 3
