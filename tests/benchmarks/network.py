"""Bytes over the network: target + Δ with nothing cached, by hubdiff and by mergekit.

    python tests/benchmarks/network.py --json network.json --readme README.md

Three models with the tensor shapes of Llama-3-8B (bf16, drawn weights, ``drawn.py``) on a loopback
Hub, of --layers decoder layers each, so that they fit on a disk: 2 make 3.0 GB, all 32 would be 16.
Embeddings and head are whole and so weigh more than in the real model; the delta's share of a model
is the same for both. Bytes are those of the Hub's request log, files of all kinds.

- "push-delta": hubdiff makes the delta, as a repo.
- "apply": hubdiff puts the delta on the target, into a folder.
- "mergekit linear": the same sum by ``mergekit-yaml``, from the Hub.
- "apply --push-to": a delta of one layer's MLP only (``--include``), the result a repo of its own:
  shards that do not change are copied by the Hub. "sent" are the files handed to the Hub's client.

Every run starts with empty caches. Bytes do not vary between runs; the runs show it. Needs disk for
ten models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from drawn import KINDS, LLAMA_3_8B, write_model
from harness import (
    Goal,
    PeerFailed,
    Peers,
    Row,
    arguments,
    goals_table,
    main,
    origin,
    process,
    table,
)
from speed import RECIPE, write_recipe

from hubdiff.devhub import DevHub

BASE, TUNED, TARGET = (f"demo/{kind}" for kind in KINDS)
DELTA, PARTIAL, RESULT = "demo/delta", "demo/partial-delta", "demo/result"
PART = "model.layers.0.mlp.*"
PUSH, APPLY, MERGEKIT = "push-delta", "apply", "mergekit linear"
PUSH_TO = "apply --push-to, partial delta"


def publish(hub: DevHub, folder: Path, layers: int) -> int:
    """The models on the Hub, by xet, which server-side copies need; the size of one."""
    for kind in KINDS:
        size = write_model(folder / kind, kind, LLAMA_3_8B, layers, sharded=True)
        with newcomer(hub, folder) as env:
            words = ("upload", f"demo/{kind}", folder / kind)
            process("huggingface_hub.cli.hf", *words, env=env)
        shutil.rmtree(folder / kind)
    return size


@contextmanager
def newcomer(hub: DevHub, folder: Path) -> Iterator[dict[str, str]]:
    """The environment of someone who has nothing cached, and an empty log; what they cache goes."""
    home = folder / "home"
    hub.log.clear()
    yield hub.environment(home=home)
    shutil.rmtree(home, ignore_errors=True)


def read_by_repo(hub: DevHub) -> dict[str, int]:
    return {record.repo: hub.log.bytes_served(record.repo) for record in hub.log if record.repo}


def push(hub: DevHub, folder: Path, repo: str, *options: str) -> Row:
    words = ("push-delta", TUNED, repo, "--base", BASE, "--json", *options)
    with newcomer(hub, folder) as env:
        ran = process("hubdiff", *words, env=env)
    sent = sum(file["size"] for file in json.loads(ran["output"])["files"])
    return {"read": read_by_repo(hub), "peak": ran["peak"], "sent": sent}


def apply(hub: DevHub, folder: Path) -> Row:
    words = ("apply", DELTA, "--to", TARGET, "--output", folder / "out")
    with newcomer(hub, folder) as env:
        ran = process("hubdiff", *words, env=env)
    shutil.rmtree(folder / "out")
    return {"read": read_by_repo(hub), "peak": ran["peak"]}


def merge(hub: DevHub, folder: Path, others: Peers) -> Row:
    write_recipe(folder / RECIPE, TARGET, TUNED, BASE)
    with newcomer(hub, folder) as env:
        words = ("mergekit.scripts.run_yaml", RECIPE, "out", "--quiet")
        ran = others.process("mergekit", *words, cwd=folder, env=env)
    shutil.rmtree(folder / "out")
    return {"read": read_by_repo(hub), "peak": ran["peak"]}


def push_to(hub: DevHub, folder: Path, number: int) -> Row:
    words = ("apply", PARTIAL, "--to", TARGET, "--push-to", f"{RESULT}-{number}", "--json")
    with newcomer(hub, folder) as env:
        ran = process("hubdiff", *words, env=env)
    told = json.loads(ran["output"])
    sent = {file["path"]: file["size"] for file in told["files"]}
    copied = [file["bytes"] for file in told["plan"]["files"] if file["path"] not in sent]
    return {
        "read": read_by_repo(hub),
        "peak": ran["peak"],
        "sent": sum(sent.values()),
        "copied": sum(copied),
        "copies": len(copied),
        "copy_requests": hub.log.count(kind="copy", status=200),
    }


def measure(options: argparse.Namespace, others: Peers) -> Row:
    folder = options.folder / "network"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows: dict[str, list[Row]] = {PUSH: [], APPLY: [], MERGEKIT: [], PUSH_TO: []}
    failed = {}
    with DevHub(folder / "hub") as hub:
        size = publish(hub, folder, options.layers)
        push(hub, folder, PARTIAL, "--include", PART)
        for number in range(options.runs):
            rows[PUSH].append(push(hub, folder, DELTA))
            rows[APPLY].append(apply(hub, folder))
            if MERGEKIT not in failed:
                try:
                    rows[MERGEKIT].append(merge(hub, folder, others))
                except PeerFailed as reason:
                    failed[MERGEKIT] = str(reason)
            rows[PUSH_TO].append(push_to(hub, folder, number))
            print(f"round {number + 1} of {options.runs}", flush=True)
    shutil.rmtree(folder)
    return {
        "layers": options.layers,
        "model_bytes": size,
        "rows": rows,
        "failed": failed,
    }


def render(document: Row) -> str:
    size = document["model_bytes"]
    text = (
        f"Tensor shapes of Llama-3-8B, {document['layers']} of its 32 layers: "
        f"{size / 1e9:.2f} GB a model. {PUSH_TO}: only {PART} changed, one of the target's "
        f"{document['layers'] + 2} shards."
    )
    repos = ("target", "tuned", "base", "delta")
    head = ["GB", *repos, "read", "of 3 models", "sent", "copied by Hub", "peak MB"]
    rows = [_cells(job, runs, size) for job, runs in document["rows"].items() if runs]
    failed = [f"{job} did not run: {reason}." for job, reason in document["failed"].items()]
    return "\n\n".join(
        [origin(document), text, table(head, rows), *failed, goals_table(goals(document))]
    )


def _cells(job: str, runs: Sequence[Row], size: int) -> list[str]:
    def gigabytes(values: Sequence[int]) -> str:
        return f"{statistics.median(values) / 1e9:.3f}" if any(values) else ""

    by_repo = [
        gigabytes([sum(run["read"].get(repo, 0) for repo in repos) for run in runs])
        for repos in ((TARGET,), (TUNED,), (BASE,), (DELTA, PARTIAL))
    ]
    total = [sum(run["read"].values()) for run in runs]
    copies = max(run.get("copies", 0) for run in runs)
    copied = gigabytes([run.get("copied", 0) for run in runs])
    return [
        job,
        *by_repo,
        gigabytes(total),
        f"{statistics.median(total) / (3 * size):.1%}",
        gigabytes([run.get("sent", 0) for run in runs]),
        f"{copied} ({copies} files)" if copies else "",
        f"{max(run['peak'] for run in runs) / 1e6:.0f}",
    ]


def goals(document: Row) -> list[Goal]:
    size = document["model_bytes"]
    shares = [100 * sum(run["read"].values()) / (3 * size) for run in document["rows"][APPLY]]
    shards = document["layers"] + 2
    return [
        Goal("apply: read, of tuned + base + target", shares, 45, "%", digits=1),
        Goal(
            f"{PUSH_TO}: shards copied by the Hub, of {shards}",
            [run["copies"] for run in document["rows"][PUSH_TO]],
            shards - 1,
            at_least=True,
            digits=0,
        ),
    ]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers, 2 by default")
    main("network", parser.parse_args(), measure, render)
