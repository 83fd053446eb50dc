"""Each extra alone brings what its commands need, tried with one or two of them. The tests' own
environment has all extras, and would hide what one forgot: here a process sees hubdiff, what it
requires, and one extra.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import models
import pytest
from backport_world import World
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_signing import new_key
from tiny_llama import make_base, write_task
from tiny_tasks import sort_task

ROOT = Path(__file__).parents[1]


def required(*extras: str) -> set[str]:
    """The distributions that ``hubdiff[extras]`` brings."""
    found: set[str] = set()
    open_ends = [("hubdiff", frozenset(extras))]
    seen = set(open_ends)
    while open_ends:
        name, wanted = open_ends.pop()
        found.add(name)
        for line in metadata.requires(name) or ():
            one = Requirement(line)
            where = [{"extra": extra} for extra in ("", *wanted)]
            if one.marker and not any(one.marker.evaluate(extra) for extra in where):
                continue
            end = canonicalize_name(one.name), frozenset(one.extras)
            if end not in seen and _is_here(end[0]):
                seen.add(end)
                open_ends.append(end)
    return found


def _is_here(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _packages(names: set[str]) -> Iterator[Path]:
    """What lies in site-packages of these distributions: packages, modules, and their metadata."""
    for name in names - {"hubdiff"}:
        distribution = metadata.distribution(name)
        for file in distribution.files or ():
            if file.parts[0] not in ("..", "__pycache__"):
                yield Path(str(distribution.locate_file(file.parts[0])))


def site(folder: Path, *extras: str) -> Path:
    """A folder with links to what a plain ``pip install hubdiff[EXTRAS]`` would bring."""
    folder.mkdir()
    for package in set(_packages(required(*extras))):
        (folder / package.name).symlink_to(package)
    for name in ("hubdiff", "templates"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def python(folder: Path, *words: str, **environment: str) -> str:
    """Run Python beside ``folder``, whose packages it sees and no others. What it printed."""
    done = subprocess.run(
        [sys.executable, "-S", *words],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def hubdiff(folder: Path, *words: str, **environment: str) -> Any:
    """The JSON that a command prints."""
    return json.loads(python(folder, "-m", "hubdiff", *words, "--json", **environment))


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, its fine-tune, and a place for their delta."""
    base = models.weights()
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "tuned", models.moved(base))
    return tmp_path / "base", tmp_path / "tuned", tmp_path / "delta"


@pytest.mark.usefixtures("family")
def test_hubdiff_alone_makes_and_applies_deltas(tmp_path: Path) -> None:
    plain = site(tmp_path / "site")
    hubdiff(plain, "push-delta", "./tuned", "./delta", "--base", "./base")
    hubdiff(plain, "inspect", "./delta")
    hubdiff(plain, "check", "./delta", "--to", "./base")
    hubdiff(plain, "apply", "./delta", "--to", "./base", "--output", "out")
    made = models.hashes(tmp_path / "out")
    del made["hubdiff-result.json"]
    assert made == models.hashes(tmp_path / "tuned")
    code = "import hubdiff; print(type(hubdiff.load('./delta', './base')).__name__)"
    assert python(plain, "-c", code).strip() == "LlamaForCausalLM"


@pytest.mark.usefixtures("family")
def test_sign_brings_what_signing_needs(tmp_path: Path) -> None:
    private, public = new_key(tmp_path, "mine")
    signing = site(tmp_path / "site", "sign")
    hubdiff(signing, "push-delta", "./tuned", "./delta", "--base", "./base")
    hubdiff(signing, "sign", "./delta", "--key", str(private))
    hubdiff(signing, "verify", "./delta", "--key", str(public))


def test_finetune_brings_what_training_needs(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    write_task(tmp_path / "task.jsonl")
    training = site(tmp_path / "site", "finetune")
    few = ("steps=1", "batch=2", "length=64", "lora.rank=4")
    settings = [word for one in few for word in ("--set", one)]
    data = ("--data", "task.jsonl")
    hubdiff(training, "finetune", "./base", *data, "--output", "tuned", *settings)
    hubdiff(training, "connectivity", "./base", "./base", *data, "--points", "2")


def test_eval_brings_what_evaluating_needs(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    sort_task(tmp_path)
    evaluating = site(tmp_path / "site", "eval")
    hubdiff(evaluating, "eval", "./base", "--tasks", "sort_letters.yaml", "--limit", "2")


def test_backport_brings_what_watching_needs(world: World, tmp_path: Path) -> None:
    newer = world.new_base("base-2")
    world.write_config([world.base, newer])
    watching = site(tmp_path / "site", "backport")
    where = ("--config", str(world.config), "--lock", str(world.lock))
    found = hubdiff(watching, "watch", *where)
    assert [item["base"].partition("@")[0] for item in found["adopt"]] == [newer]


def test_devhub_brings_what_a_loopback_hub_needs(tmp_path: Path) -> None:
    serving = site(tmp_path / "site", "devhub")
    code = """
from huggingface_hub import HfApi
from hubdiff.devhub import DevHub

with DevHub(users={"demo": "hf_demo"}) as hub:
    print(HfApi(endpoint=hub.url, token="hf_demo").whoami()["name"])
"""
    assert python(serving, "-c", code).strip() == "demo"
