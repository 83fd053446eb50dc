"""Tasks for lm-evaluation-harness with data of their own: a model's letters, sorted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_llama import make_base

import hubdiff
from hubdiff.toy_family import LETTERS

LEARN = (
    *("steps=300", "batch=16", "micro_batch=16", "length=64"),
    *("learning_rate=1e-2", "log_every=50"),
)
HELD_OUT = tuple(a + b + c for a in "jhfdb" for b in "igec" for c in "af")


def make_tuned(folder: Path, **sizes: int) -> tuple[Path, Path, Path]:
    """A base that knows nothing, its fine-tune that sorts letters, and the delta."""
    base = make_base(folder / "base", **sizes)
    words = ["".join(word) for word in itertools.permutations(LETTERS, 3)]
    words = sorted(set(words) - set(HELD_OUT), key=lambda word: sha256(word.encode()).digest())
    data = _write_examples(folder / "train.jsonl", words)
    tuned, delta = folder / "tuned", folder / "delta"
    train(base, data, tuned)
    hubdiff.push_delta(tuned, delta, base=base, tuned_master=tuned / "master")
    return base, tuned, delta


def train(base: Path, data: Path, output: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where other tests run beside
    hubdiff.finetune(base, data=data, output=output, settings=LEARN)
    torch.set_num_threads(threads)


def sort_task(folder: Path, name: str = "sort_letters", **changes: Any) -> Path:
    """What comes after ``sort cba = ``, word for word."""
    return _write(
        folder,
        name,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{completion}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
            "metric_list": [_metric("exact_match")],
            **changes,
        },
    )


def choice_task(folder: Path, name: str = "pick_letters", **changes: Any) -> Path:
    """The same as a choice between two, by likelihood."""
    return _write(
        folder,
        name,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt.strip()}}",
            "doc_to_choice": "{{[completion, prompt[5:8]]}}",
            "doc_to_target": 0,
            "metric_list": [_metric("acc")],
            **changes,
        },
    )


def _write_examples(file: Path, words: Sequence[str]) -> Path:
    lines = [{"prompt": f"sort {w} = ", "completion": "".join(sorted(w))} for w in words]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _write(folder: Path, name: str, task: dict[str, Any]) -> Path:
    data = folder / "held_out.jsonl"
    if not data.exists():
        _write_examples(data, HELD_OUT)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data)},
        "test_split": "train",
        "metadata": {"version": 1.0},
        **task,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
