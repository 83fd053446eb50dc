"""recycle: Algorithm 1 over tiny models, really trained. What it makes is what its steps make by
hand, to the bit, also when it is stopped on the way; every delta leads back to those before it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import on_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_llama import make_base, write_task

import hubdiff
from hubdiff.devhub import DevHub
from hubdiff.errors import AuthError, HubdiffError, NotAdvised, OutputExists
from hubdiff.graph import BASE_OF, STARTED_FROM
from hubdiff.jobs import recycle as module
from hubdiff.lab.recycling import read_plan, steps_of

pytest.importorskip("trl")

SETTINGS = {"steps": 4, "batch": 8, "micro_batch": 8, "length": 64, "learning_rate": 3e-3,
            "log_every": 2, "save_every": 2}  # fmt: skip
FAST = tuple(f"{key}={value}" for key, value in SETTINGS.items())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubdiff.jobs.push._picture", lambda _: b"")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, three versions of a base, each a little on from the one before, and
    one that has nothing to do with them."""
    folder = tmp_path_factory.mktemp("family")
    write_task(folder / "train.jsonl")
    make_base(folder / "v1")
    for number in (2, 3):
        new = shutil.copytree(folder / f"v{number - 1}", folder / f"v{number}")
        weights = load_file(new / "model.safetensors")
        generator = torch.Generator().manual_seed(number)
        for name, tensor in weights.items():
            noise = torch.randn(tensor.shape, generator=generator) * 2e-4
            weights[name] = (tensor.float() + noise).bfloat16()
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    make_base(folder / "stranger", seed=5)
    return folder


@pytest.fixture
def here(family: Path, tmp_path: Path) -> Path:
    """A copy of the family that a test may change."""
    return Path(shutil.copytree(family, tmp_path / "here"))


def write_plan(folder: Path, *bases: Any, file: str = "plan.yaml", **more: Any) -> Path:
    plan = {"data": "train.jsonl", "set": SETTINGS, "output": "runs", "bases": list(bases), **more}
    (folder / file).write_text(
        yaml.safe_dump({key: value for key, value in plan.items() if value is not None})
    )
    return folder / file


def weights(folder: Path) -> dict[str, str]:
    """The hashes of all that training and deltas decide; metrics have the time in them."""
    return {
        path: digest
        for path, digest in models.hashes(folder).items()
        if path.endswith(".safetensors")
    }


def made_by_hand(family: Path, folder: Path, method: str) -> Path:
    """The algorithm, step by step, by the commands that there were before."""

    def fine_tune(name: str, version: str, start: str | None) -> None:
        hubdiff.finetune(
            family / version,
            data=family / "train.jsonl",
            output=folder / name,
            settings=FAST,
            from_delta=folder / f"{start}-delta" if start else None,
        )
        hubdiff.push_delta(
            folder / name,
            folder / f"{name}-delta",
            base=family / version,
            tuned_master=folder / name / "master",
        )

    fine_tune("1-v1", "v1", None)
    if method == "direct":
        fine_tune("2-v2-direct", "v2", None)
    fine_tune("2-v2", "v2", "1-v1")
    fine_tune("3-v3", "v3", "2-v2-direct" if method == "direct" else "2-v2")
    return folder


@pytest.fixture(scope="module")
def by_hand(family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hubdiff.jobs.push._picture", lambda _: b"")
        return {
            method: made_by_hand(family, tmp_path_factory.mktemp(method), method)
            for method in ("iterative", "direct")
        }


@pytest.mark.parametrize("method", ["iterative", "direct"])
def test_what_it_makes_is_what_its_steps_make_by_hand(
    here: Path, by_hand: dict[str, Path], method: str
) -> None:
    """Every weight, every master and every delta."""
    made = hubdiff.recycle(write_plan(here, "./v1", "./v2", "./v3", method=method))
    found = weights(here / "runs")
    assert found == weights(by_hand[method])
    names = {path.partition("/")[0] for path in found}
    assert len(names) == (6 if method == "iterative" else 8)
    assert made.report["finished"]
    assert {path.name for path in here.iterdir() if path.name.startswith(".")} == set()
