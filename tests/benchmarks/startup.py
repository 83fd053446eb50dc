"""How long a command takes that does nothing heavy: fresh processes, from start to exit.

    python tests/benchmarks/startup.py --json startup.json --readme README.md

``inspect`` is shown a delta with the 291 tensors of Llama-3-8B (narrow ones: only the manifest is
read), in a folder and on a loopback Hub. Beside it: Python itself, ``import
torch``, and mergekit's ``--help``; mergekit has nothing to inspect. Contenders take turns; a first
round, which fills the page cache, is not counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from drawn import KINDS, Llama, write_model
from harness import (
    Goal,
    Peers,
    Row,
    arguments,
    goals_table,
    main,
    origin,
    process,
    spread,
    table,
)

from hubdiff.devhub import DevHub

NARROW, LAYERS = Llama(128, 256, 128, 256), 32
HELP, INSPECT, INSPECT_HUB = "hubdiff --help", "hubdiff inspect, folder", "hubdiff inspect, Hub"
LIMITS = {HELP: 0.2, INSPECT: 0.4, INSPECT_HUB: 0.4}


def commands(folder: Path, others: Peers) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "hubdiff"]
    found = {
        HELP: [*ours, "--help"],
        INSPECT: [*ours, "inspect", str(folder / "delta")],
        INSPECT_HUB: [*ours, "inspect", "demo/delta"],
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }
    if "mergekit" not in others.missing:
        found["mergekit-yaml --help"] = [str(others.python.with_name("mergekit-yaml")), "--help"]
    return found


def seconds(command: list[str], env: Mapping[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, env=os.environ | env, check=True, capture_output=True)
    return time.perf_counter() - began


def measure(options: argparse.Namespace, others: Peers) -> Row:
    folder = options.folder / "startup"
    shutil.rmtree(folder, ignore_errors=True)
    for kind in KINDS[:2]:
        write_model(folder / kind, kind, NARROW, LAYERS)
    process("hubdiff", "push-delta", "./tuned", "./delta", "--base", "./base", cwd=folder)
    with DevHub() as hub:
        env = hub.environment()
        process("huggingface_hub.cli.hf", "upload", "demo/delta", folder / "delta", env=env)
        contenders = commands(folder, others)
        rounds = [
            {name: seconds(command, env) for name, command in contenders.items()}
            for _ in range(1 + options.runs)
        ]
    shutil.rmtree(folder)
    times = {name: [one[name] for one in rounds[1:]] for name in contenders}
    return {"seconds": times, "failed": others.missing}


def render(document: Row) -> str:
    times = document["seconds"]
    rows = [[name, spread(values, 3)] for name, values in times.items()]
    failed = [f"{name} did not run: {why}." for name, why in document["failed"].items()]
    goals = [Goal(name, times[name], limit, "s", digits=3) for name, limit in LIMITS.items()]
    return "\n\n".join([origin(document), table(["", "wall s"], rows), *failed, goals_table(goals)])


if __name__ == "__main__":
    main("startup", arguments(__doc__, runs=11).parse_args(), measure, render)
