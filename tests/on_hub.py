"""Models on the loopback Hub, and what it lists of them: the other side of every comparison."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import models
import torch
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from safetensors.torch import save_file

from hubdiff.devhub import DevHub
from hubdiff.devhub.log import DOWNLOADS, LogRecord

PutRepo = Callable[..., str]
NewName = Callable[[], str]
Tensors = dict[str, torch.Tensor]

# Files of a repo that no delta carries, and the one that apply adds.
NOT_OURS = {".gitattributes", "hubdiff-result.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def api(hub: DevHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token())


def listing(hub: DevHub, repo: str, revision: str | None = None) -> dict[str, str]:
    """What the Hub lists: path → sha256 of a large file, git's blob id of a small one."""
    entries = api(hub).list_repo_tree(repo, recursive=True, revision=revision)
    return {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in entries
        if isinstance(entry, RepoFile) and entry.path not in NOT_OURS
    }


def ids(folder: Path, like: Mapping[str, str]) -> dict[str, str]:
    """A folder's files under the ids that ``like``, a listing, gives them."""
    return {
        path: _blob_id(data) if len(like.get(path, "")) == 40 else hashlib.sha256(data).hexdigest()
        for path, data in contents(folder).items()
        if path not in NOT_OURS
    }


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def head(hub: DevHub, repo: str) -> str:
    """The commit that main is at."""
    sha = api(hub).model_info(repo).sha
    assert sha is not None
    return sha


def exists(hub: DevHub, repo: str) -> bool:
    return api(hub).repo_exists(repo)


def sharded(folder: Path, shards: Sequence[Tensors], **changes: object) -> Path:
    """A model folder of several shards, with the tensors of each as given."""
    models.save(folder, {"unused": torch.zeros(1)}, **changes)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def split(tensors: Tensors, count: int) -> list[Tensors]:
    """The tensors in file order, cut into ``count`` shards."""
    names = list(tensors)
    size = -(-len(names) // count)
    return [
        {name: tensors[name] for name in names[start : start + size]}
        for start in range(0, len(names), size)
    ]


@dataclass(frozen=True)
class Family:
    """A base, its fine-tune and another base of the family, in folders and on the Hub."""

    base: Path
    tuned: Path
    target: Path
    base_repo: str
    tuned_repo: str
    target_repo: str


def family(put_repo: PutRepo, folder: Path, *, only: str = "") -> Family:
    """Three bf16 models, the target in three shards. ``only`` limits what the tune changed to the
    tensors that have it in their name."""
    before = models.weights(0)
    after = models.moved(before)
    after = {name: after[name] if only in name else before[name] for name in before}
    base = models.save(folder / "base", before, files={"README.md": card(license="mit")})
    tuned = models.save(
        folder / "tuned",
        after,
        files={
            "README.md": card(license="mit"),
            "chat_template.jinja": "{{ messages }}",
            "tokenizer_config.json": '{"model_max_length": 128}',
        },
        tuned_on="sums",
    )
    other = models.moved(before, step=1e-3, seed=9, frozen="nothing")
    target = sharded(folder / "target", split(other, 3))
    repos = [put_repo(contents(path)) for path in (base, tuned, target)]
    return Family(base, tuned, target, *repos)


def card(text: str = "# A model", **header: str) -> str:
    lines = "".join(f"{key}: {value}\n" for key, value in header.items())
    return f"---\n{lines}---\n\n{text}\n"


def served(hub: DevHub, repo: str, path: str = "*.safetensors") -> int:
    """Bytes of files sent, headers of safetensors files included."""
    return hub.log.bytes_served(repo, path)


def downloads(hub: DevHub, repo: str, path: str) -> list[LogRecord]:
    return [r for r in hub.log.select(repo=repo, file=path) if r.kind in DOWNLOADS]


def run_script(script: str, *arguments: str, **environment: str) -> str:
    """What a Python process of its own prints."""
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
