"""The size of a delta beside zipnn, pcodec, zstd and XOR + byte planes, on real fine-tunes.

    python tests/benchmarks/sizes.py --json sizes.json --readme README.md

Models are trained here (``training.py``), in bf16: the real all-MiniLM-L6-v2, fine-tuned with
float32 masters, or wholly in bf16 at a tiny learning rate as reinforcement learning does it
("RL-like"), and a small Llama trained from scratch. A run is a seed, another order of the data.
What was trained stays in --folder and is used again.

A size is that of the whole model, embeddings included, in % of its bf16 weights. hubdiff's are the
files on disk: "delta + exact" what rebuilds tuned bit for bit (checked here, by sha256), "repo" all
files of the delta, manifest, card and picture too. The peers compress tensor by tensor, and what
they make is put into one safetensors file, as hubdiff's is; their Δ is rounded to bf16, which loses
what makes hubdiff's exact. XOR needs the base to be undone,
so it gives tuned back and can't go to another base. "entropy" is the order-0 entropy of every
tensor's Δ, rounded to bf16, added up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import (
    PROGRAMS,
    Goal,
    PeerFailed,
    Peers,
    Row,
    arguments,
    goals_table,
    main,
    order0_bytes,
    origin,
    process,
    spread,
    table,
)
from safetensors.numpy import save
from safetensors.torch import load_file, save_file
from training import llama, minilm, tune_llama, tune_minilm
from transformers.utils import logging

BASE_STEPS = 300
WEIGHTS = "model.safetensors"
# what is compressed → with which codecs
CONTENTS = {
    "tuned": ("zipnn",),
    "Δ": ("zipnn", "pcodec", "zstd-19"),
    "XOR": ("planes-zstd-1", "planes-zstd-19"),
}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Regime:
    """A kind of training, by learning rate. ``limit`` is the goal for size over entropy."""

    name: str
    base: str
    rate: float
    limit: float | None = 1.07
    dtype: torch.dtype = torch.float32
    answers: bool = True

    def tune(self, base: Path, folder: Path, *, steps: int, seed: int) -> list[float]:
        if self.base == "minilm":
            tune = partial(tune_minilm, dtype=self.dtype)
        else:
            tune = partial(tune_llama, answers=self.answers)
        return tune(base, folder, rate=self.rate, steps=steps, seed=seed)


REGIMES = (
    Regime("MiniLM RL-like 1e-6", "minilm", 1e-6, 1.3, torch.bfloat16),
    Regime("MiniLM SFT 5e-6", "minilm", 5e-6),
    Regime("MiniLM SFT 2e-5", "minilm", 2e-5),
    Regime("MiniLM SFT 1e-4", "minilm", 1e-4),
    Regime("Llama 34M SFT 2e-5", "llama", 2e-5),
    Regime("Llama 34M more pre-training 5e-4", "llama", 5e-4, None, answers=False),
)


def made(folder: Path, make: Callable[[Path], object]) -> Path:
    """``folder``, made unless it is there: whole or not at all."""
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def measure_pair(base: Path, tuned: Path, place: Path, others: Peers) -> Row:
    process("hubdiff", "push-delta", tuned, "./delta", "--base", base, cwd=place)
    process("hubdiff", "apply", "./delta", "--to", base, "--output", "./rebuilt", cwd=place)
    rebuilt, wanted = (sha256(folder / WEIGHTS) for folder in (place / "rebuilt", tuned))
    if rebuilt != wanted:
        raise ValueError(f"{tuned} did not come back")
    before, after = load_file(base / WEIGHTS), load_file(tuned / WEIGHTS)
    delta = {name: (after[name].float() - before[name].float()).bfloat16() for name in before}
    entropies = {
        name: tensor.numel() * order0_bytes(bits(tensor)) for name, tensor in delta.items()
    }
    steps = torch.cat([(after[name].float() - before[name].float()).flatten() for name in before])
    norm = torch.cat([tensor.float().flatten() for tensor in before.values()]).norm()
    changed = sum(int((bits(after[name]) != bits(before[name])).sum()) for name in before)
    return {
        "model_bytes": 2 * steps.numel(),
        "unchanged": 1 - changed / steps.numel(),
        "relative_norm": float(steps.norm() / norm),
        "entropy": sum(entropies.values()),
        "hubdiff": hubdiff_sizes(place / "delta", entropies),
        "peers": peer_sizes(before, after, delta, place, others),
    }


def hubdiff_sizes(folder: Path, entropies: dict[str, float]) -> Row:
    """Files on disk; and of the matrices alone, without embeddings, payload over entropy."""

    manifest = json.loads((folder / "hubdiff.json").read_text(encoding="utf-8"))
    layers = {g: sum(f["size"] for f in files) for g, files in manifest["layers"].items()}
    payload = entropy = 0.0
    for tensor in manifest["tensors"]:
        if len(tensor["shape"]) == 2 and "embed" not in tensor["name"]:
            payload += sum(part["bytes"] for part in tensor["parts"])
            entropy += entropies[tensor["name"]]
    return {
        "layers": sum(layers.values()),
        "exact": layers["exact"],
        "repo": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "matrices": payload / entropy,
    }


def peer_sizes(
    before: Tensors, after: Tensors, delta: Tensors, place: Path, others: Peers
) -> dict[str, Row]:
    xor = {name: after[name].view(torch.int16) ^ before[name].view(torch.int16) for name in before}
    sizes = {}
    for content, tensors in (("tuned", after), ("Δ", delta), ("XOR", xor)):
        whole = {name: tensor.view(torch.int16).contiguous() for name, tensor in tensors.items()}
        save_file(whole, place / "content.safetensors")
        words = (PROGRAMS / "peer_codecs.py", place / "content.safetensors", "0")
        for codec in CONTENTS[content]:
            try:
                found = json.loads(others.process("zstandard", *words, codec)["output"])[codec]
            except PeerFailed as reason:
                found = {"failed": str(reason)}
            if "failed" not in found:
                payloads = {k: np.zeros(row["bytes"], np.uint8) for k, row in found.items()}
                found = {"bytes": len(save(payloads))}
            sizes[f"{codec} on {content}"] = found
    return sizes


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.flatten().view(torch.int16).numpy().view(np.uint16)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure(options: argparse.Namespace, others: Peers) -> Row:
    logging.disable_progress_bar()
    folder = options.folder / "sizes"
    folder.mkdir(exist_ok=True)
    bases = {
        "minilm": made(folder / "minilm", minilm),
        "llama": made(folder / "llama", lambda path: llama(path, BASE_STEPS)),
    }
    rows: dict[str, list[Row]] = {regime.name: [] for regime in REGIMES}
    for seed in range(options.runs):
        for regime in REGIMES:
            base, name = bases[regime.base], f"{regime.name}, {options.steps} steps, seed {seed}"
            tuned = made(folder / name, partial(regime.tune, base, steps=options.steps, seed=seed))
            place = folder / "work"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            row = measure_pair(base, tuned, place, others)
            rows[regime.name].append(row)
            ratio = row["hubdiff"]["layers"] / row["entropy"]
            print(f"{name}: {ratio:.3f} × entropy", flush=True)
            shutil.rmtree(place)
    return {"steps": options.steps, "rows": rows}


def render(document: Row) -> str:
    regimes = document["rows"]
    codecs = list(next(iter(regimes.values()))[0]["peers"])
    head = ["in % of the model", "unchanged", "entropy", "delta + exact", "repo", *codecs]
    rows = [[name, *_shares(runs, codecs)] for name, runs in regimes.items()]
    ratios = [[name, *_ratios(runs)] for name, runs in regimes.items()]
    failed = {
        f"{codec} did not run: {row['failed']}."
        for runs in regimes.values()
        for codec, row in runs[0]["peers"].items()
        if "failed" in row
    }
    parts = [
        f"{origin(document)} A run: {document['steps']} steps of each training, with another seed.",
        table(head, rows),
        *sorted(failed),
        table(["‖Δ‖ / ‖base‖, and size / entropy", "‖Δ‖", "whole model", "matrices"], ratios),
        goals_table(goals(regimes)),
    ]
    return "\n\n".join(parts)


def _shares(runs: Sequence[Row], codecs: Sequence[str]) -> list[str]:
    def share(values: Sequence[float]) -> str:
        wholes = [run["model_bytes"] for run in runs]
        middle = statistics.median(v / w for v, w in zip(values, wholes, strict=True))
        return f"{100 * middle:.3g}"

    peers_bytes = [[run["peers"][codec].get("bytes") for run in runs] for codec in codecs]
    return [
        f"{100 * statistics.median(run['unchanged'] for run in runs):.3g}",
        share([run["entropy"] for run in runs]),
        share([run["hubdiff"]["layers"] for run in runs]),
        share([run["hubdiff"]["repo"] for run in runs]),
        *("–" if None in values else share(values) for values in peers_bytes),
    ]


def _ratios(runs: Sequence[Row]) -> list[str]:
    norm = statistics.median(run["relative_norm"] for run in runs)
    whole = [run["hubdiff"]["layers"] / run["entropy"] for run in runs]
    return [
        f"{norm:.2g}",
        spread(whole, 3),
        spread([run["hubdiff"]["matrices"] for run in runs], 3),
    ]


def goals(regimes: dict[str, list[Row]]) -> list[Goal]:
    found = []
    for regime in REGIMES:
        if regime.limit and regime.name in regimes:
            runs = regimes[regime.name]
            ratios = [run["hubdiff"]["layers"] / run["entropy"] for run in runs]
            found.append(Goal(f"{regime.name}: over entropy", ratios, regime.limit, "×", digits=3))
    for name, runs in regimes.items():
        ratios = []
        for run in runs:
            sizes = {k: row["bytes"] for k, row in run["peers"].items() if "bytes" in row}
            best = min(sizes, key=lambda codec: sizes[codec])
            ratios.append(run["hubdiff"]["layers"] / sizes[best])
        found.append(Goal(f"{name}: over the best peer, {best}", ratios, 1.0, "×", digits=3))
    return found


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of each fine-tune")
    main("sizes", parser.parse_args(), measure, render)
