"""A user's world for the backport tests: bases on the loopback Hub, a trained delta, a place for
results, and a repository with hubdiff.yaml and a task of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tiny_tasks import sort_task

import hubdiff
from hubdiff.backport.lock import ADOPTED, DONE, Lock, read_lock
from hubdiff.backport.watch import Watched, watch
from hubdiff.devhub import DevHub

TASK = "tasks/sort_letters.yaml"


@dataclass
class World:
    """``root`` is the user's repository; ``family`` the folders of base, tuned and delta."""

    hub: DevHub
    root: Path
    family: tuple[Path, Path, Path]
    base: str
    source: str
    results: str

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.hub.url, token=self.hub.token("demo"))

    @property
    def config(self) -> Path:
        return self.root / "hubdiff.yaml"

    @property
    def lock(self) -> Path:
        return self.root / "hubdiff.lock"

    def new_base(self, name: str, seed: int = 1, amount: float = 1e-3) -> str:
        """A version of the base, moved a little; pushed again it is the next commit."""
        return upload(self.hub, f"org/{name}", self.new_base_folder(seed, amount))

    def new_base_folder(self, seed: int, amount: float = 1e-3) -> Path:
        folder = self.root.parent / f"new-{seed}-{amount}"
        if folder.exists():
            return folder
        shutil.copytree(self.family[0], folder)
        weights = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        for tensor in weights.values():
            noise = torch.randn(tensor.shape, generator=generator) * amount * tensor.float().std()
            tensor.copy_((tensor.float() + noise.nan_to_num()).to(tensor.dtype))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    def write_config(self, bases: list[str], **changes: Any) -> None:
        """hubdiff.yaml with one family and one delta; ``changes`` are the delta's, and what is None
        is left out."""
        delta: dict[str, Any] = {
            "source": self.source,
            "eval": {"tasks": [TASK]},
            "gate": {"min": 0.5, "max_drop": 0.0},
            "publish": {"to": self.results, "mode": "pr"},
        }
        kept = {key: value for key, value in {**delta, **changes}.items() if value is not None}
        family = {"bases": bases, "deltas": {"sort": kept}}
        self.config.write_text(yaml.safe_dump({"families": {"toy": family}}, sort_keys=False))

    def watch(self, **how: Any) -> Watched:
        return watch(self.config, lock=self.lock, **how)

    def plan(self, **how: Any) -> Path:
        """The plan of a watch, as a file."""
        file = self.root / "plan.json"
        file.write_text(json.dumps(self.watch(**how).as_json()))
        return file

    def command(self, *words: str, code: int = 0) -> dict[str, Any]:
        """hubdiff in a process of its own (transformers reads HF_ENDPOINT once), its JSON."""
        done = subprocess.run(
            [sys.executable, "-m", "hubdiff", *words, "--json"],
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def adopt(self) -> Watched:
        """The first run: all is recorded."""
        found = self.watch()
        self.note(found, *((item.key, ADOPTED) for item in found.adopt))
        return found

    def note(self, found: Watched, *outcomes: tuple[str, str], **more: Any) -> None:
        """What `record` would write."""
        lock = read_lock(self.lock).after(
            found.as_json(), [{"key": key, "status": status, **more} for key, status in outcomes]
        )
        self.lock.write_text(lock.dumps())

    def done(self, found: Watched) -> Lock:
        for item in found.items:
            self.note(
                found,
                (item.key, DONE),
                delta=f"{item.family}/{item.delta}",
                weights=item.weights,
                settings=item.settings,
            )
        return read_lock(self.lock)


def upload(hub: DevHub, repo: str, folder: Path) -> str:
    api = HfApi(endpoint=hub.url, token=hub.token("demo"))
    api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder)
    return repo


def worlds(hub: DevHub, family: tuple[Path, Path, Path], tmp_path: Path) -> Iterator[World]:
    """One world, its repos removed afterwards, so that the next one may have the same names."""
    base = upload(hub, "org/base-1", family[0])
    hubdiff.push_delta(family[1], "hf://demo/sort-delta", base=f"hf://{base}", force=True)
    root = tmp_path / "repository"
    (root / "tasks").mkdir(parents=True)
    sort_task(root / "tasks")
    api = HfApi(endpoint=hub.url, token=hub.token("demo"))
    api.create_repo("demo/backports", exist_ok=True)
    commit = api.model_info("demo/sort-delta").sha
    hub.log.clear()
    yield World(hub, root, family, base, f"demo/sort-delta@{commit}", "demo/backports")
    for model in list(api.list_models()):
        if model.id.startswith(("org/base-", "demo/")):
            api.delete_repo(model.id)
