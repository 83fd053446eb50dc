"""Time and memory of push-delta and apply beside mergekit, residuals and a bare copy.

    python tests/benchmarks/speed.py --gb 1.7 7 --json speed.json --readme README.md

Models are Llama-shaped with drawn weights (``drawn.py``), in folders; every command is a process of
its own, timed from start to exit. Contenders take turns, one round after the other. Before each,
disks are synced, and the page cache holds its inputs, nothing else of ours, and a file that nobody
reads: memory is full, so that no virtual machine takes it back and nobody pays for getting it.

"copy" reads what applying a plain delta reads and writes what it writes, without arithmetic; once
as it is and once with an fsync at the end, as hubdiff has it and the peers do not. mergekit merges
target + tuned − base (``linear``); it has no delta to make. residuals works in float32 on whole
models; where they don't fit into memory, that is said below the table. "wrong" is the share of
elements that are not the correctly rounded target + (tuned − base), or not tuned's bits for the own
base, of the first 2^18 of each tensor, computed here without hubdiff; a float32 result is rounded
to bf16 first. Peaks are the kernel's (VmHWM), pages of mapped files included: mergekit and
residuals map their inputs, and would get by with less. Needs Linux, and disk for seven models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from drawn import KINDS, TINY_LLAMA, bf16, write_model
from harness import (
    PROGRAMS,
    Goal,
    PeerFailed,
    Peers,
    Row,
    arguments,
    filler,
    goals_table,
    main,
    memory,
    origin,
    process,
    settle,
    spread,
    table,
)
from safetensors import safe_open

RECIPE = "mergekit.yml"
CHECKED = 1 << 18  # elements of each tensor
RESIDUALS_MEMORY = 7  # times the bf16 model: two or three models in float32, and their loading

PUSH, PUSH_PLAIN = "push-delta", "push-delta --plain"
PACKED, PLAIN, OWN_BASE = "apply", "apply, plain delta", "apply, own base"
MERGEKIT = "mergekit linear"
RESIDUALS, RESIDUALS_APPLY = "residuals: make the delta", "residuals: apply"
COPY, COPY_SYNC = "copy", "copy + fsync"
OURS = (PUSH, PUSH_PLAIN, PACKED, PLAIN, OWN_BASE)


@dataclass(frozen=True)
class Contender:
    """A command in the models' folder: what it reads, the folder it makes, what ``wrong`` compares
    that with (``target``: the sum; ``base``: tuned)."""

    name: str
    reads: tuple[str, ...]
    makes: str
    run: Callable[[], Row]
    compare: str | None = None


def contenders(folder: Path, others: Peers, size: int) -> list[Contender]:
    def ours(*words: str) -> Callable[[], Row]:
        return lambda: process("hubdiff", *words, cwd=folder)

    def merge() -> Row:
        words = ("mergekit.scripts.run_yaml", RECIPE, "out", "--quiet")
        return others.process("mergekit", *words, cwd=folder)

    def residuals(program: str, *words: str) -> Callable[[], Row]:
        return lambda: _residuals(others, size, folder, program, *words)

    def copy(fsync: str) -> Callable[[], Row]:
        def run() -> Row:
            (folder / "out").mkdir()
            inputs = [folder / "target/model.safetensors"]
            inputs += sorted(folder.glob("plain/*.safetensors"))
            return process(PROGRAMS / "copy.py", "out/copy", fsync, *inputs, cwd=folder)

        return run

    push = ("push-delta", "./tuned")
    to_target, to_base = (
        ("--to", "./target", "--output", "out"),
        ("--to", "./base", "--output", "out"),
    )
    models, plain = ("target", "tuned", "base"), ("target", "plain")
    return [
        Contender(PUSH, KINDS[:2], "delta", ours(*push, "./delta", "--base", "./base")),
        Contender(
            PUSH_PLAIN, KINDS[:2], "plain", ours(*push, "./plain", "--base", "./base", "--plain")
        ),
        Contender(
            PACKED, ("target", "delta"), "out", ours("apply", "./delta", *to_target), "target"
        ),
        Contender(PLAIN, plain, "out", ours("apply", "./plain", *to_target), "target"),
        Contender(OWN_BASE, ("base", "delta"), "out", ours("apply", "./delta", *to_base), "base"),
        Contender(MERGEKIT, models, "out", merge, "target"),
        Contender(
            RESIDUALS,
            KINDS[:2],
            "residuals",
            residuals("make_residuals.py", "./base", "./tuned", "./residuals"),
        ),
        Contender(
            RESIDUALS_APPLY,
            ("target", "residuals"),
            "out",
            residuals("apply_residuals.py", "./residuals", "./target", "./out"),
            "target",
        ),
        Contender(COPY, plain, "out", copy("0")),
        Contender(COPY_SYNC, plain, "out", copy("1")),
    ]


def _residuals(others: Peers, size: int, folder: Path, program: str, *words: str) -> Row:
    needed, free = RESIDUALS_MEMORY * size, memory("MemAvailable")
    if needed > free:
        raise PeerFailed(f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free")
    return others.process("residuals", PROGRAMS / program, *words, cwd=folder)


def write_recipe(path: Path, target: str, tuned: str, base: str) -> None:
    """mergekit's, for target + tuned − base (a JSON document is YAML too)."""
    weights = {target: 1.0, tuned: 1.0, base: -1.0}
    models = [{"model": name, "parameters": {"weight": w}} for name, w in weights.items()]
    recipe = {"merge_method": "linear", "parameters": {"normalize": False}, "models": models}
    path.write_text(json.dumps(recipe | {"dtype": "bfloat16"}))


def measure_size(gigabytes: float, folder: Path, others: Peers, runs: int) -> Row:
    layers = TINY_LLAMA.layers_for(gigabytes * 1e9)
    for kind in KINDS:
        size = write_model(folder / kind, kind, TINY_LLAMA, layers)
    write_recipe(folder / RECIPE, "./target", "./tuned", "./base")
    everyone = contenders(folder, others, size)
    rows: dict[str, Row] = {
        contender.name: {"job": contender.name, "seconds": [], "cpu": [], "peak": []}
        for contender in everyone
    }
    with filler(folder.parent) as filling:
        for number in range(runs):
            for contender in everyone:
                row = rows[contender.name]
                if "failed" not in row:
                    _run(contender, folder, filling, row, check=number == runs - 1)
    sizes = {name: _weights(folder / name) for name in ("delta", "plain", "residuals")}
    return {"model_bytes": size, "delta_bytes": sizes, "rows": list(rows.values())}


def _run(contender: Contender, folder: Path, filling: IO[bytes], row: Row, *, check: bool) -> None:
    made = folder / contender.makes
    shutil.rmtree(made, ignore_errors=True)
    settle(folder, [folder / name for name in contender.reads], filling)
    try:
        ran = contender.run()
    except PeerFailed as reason:
        row["failed"] = str(reason)
        print(f"{contender.name}: {reason}", flush=True)
        return
    for key in ("seconds", "cpu", "peak"):
        row[key].append(ran[key])
    if check and contender.compare:
        row["wrong"] = wrong_share(made, folder, contender.compare)
    print(f"{contender.name}: {ran['seconds']:.2f} s, {ran['peak'] / 1e6:.0f} MB", flush=True)
    if contender.makes == "out":
        shutil.rmtree(made)


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def wrong_share(result: Path, folder: Path, start: str) -> float:
    """The share of elements of ``result`` that are not the bf16 nearest to start + tuned − base."""
    wrong = count = 0
    for file in result.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                got = opened.get_tensor(name).flatten()[:CHECKED].to(torch.bfloat16)
                found = got.view(torch.int16).numpy().view(np.uint16)
                terms = [_first(folder / kind, name) for kind in (start, "tuned", "base")]
                wrong += int((found != nearest(terms[0] + (terms[1] - terms[2]))).sum())
                count += found.size
    return wrong / count


def _first(folder: Path, name: str) -> np.ndarray:
    """In float64 sums of these three are exact: their exponents lie close together."""
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return opened.get_tensor(name).flatten()[:CHECKED].double().numpy()


def nearest(exact: np.ndarray) -> np.ndarray:
    """bf16 bits of float64 values, rounded once: by way of float32 rounded to odd."""
    rounded = exact.astype(np.float32)
    bits = rounded.view(np.uint32) - (np.abs(rounded.astype(np.float64)) > np.abs(exact))
    return bf16((bits | (rounded != exact)).astype(np.uint32).view(np.float32))


def measure(options: argparse.Namespace, others: Peers) -> Row:
    sizes = []
    for gigabytes in options.gb:
        folder = options.folder / f"speed-{gigabytes:g}"
        shutil.rmtree(folder, ignore_errors=True)
        print(f"\n{gigabytes:g} GB", flush=True)
        sizes.append(measure_size(gigabytes, folder, others, options.runs))
        shutil.rmtree(folder)
    return {"sizes": sizes}


def render(document: Row) -> str:
    parts = [origin(document)]
    for size in document["sizes"]:
        share = size["delta_bytes"]["delta"] / size["model_bytes"]
        parts.append(
            f"A model of {size['model_bytes'] / 1e9:.2f} GB in bf16; "
            f"the packed delta is {share:.1%} of it."
        )
        head = ["", "wall s", "CPU s", "GB/s", "peak MB", "wrong"]
        parts.append(table(head, [_cells(row, size["model_bytes"]) for row in size["rows"]]))
        parts.append(
            "Peaks count pages of mapped files too; mergekit and residuals map their inputs."
        )
        parts += [
            f"{row['job']} did not run: {row['failed']}." for row in size["rows"] if "failed" in row
        ]
    return "\n\n".join([*parts, goals_table(goals(document["sizes"]))])


def _cells(row: Row, model_bytes: int) -> list[str]:
    if not row["seconds"]:
        return [row["job"], *["–"] * 5]
    wrong = f"{row['wrong']:.3%}".replace("0.000%", "0") if "wrong" in row else ""
    rate = model_bytes / 1e9 / statistics.median(row["seconds"])
    return [
        row["job"],
        spread(row["seconds"]),
        f"{statistics.median(row['cpu']):.1f}",
        f"{rate:.2f}",
        f"{max(row['peak']) / 1e6:.0f}",
        wrong,
    ]


def goals(sizes: Sequence[Row]) -> list[Goal]:
    """Ratios are taken round by round."""
    found = []
    for size in sizes:
        label, rows = f"{size['model_bytes'] / 1e9:.1f} GB", {r["job"]: r for r in size["rows"]}

        def ratios(above: str, below: str, rows: dict[str, Row] = rows) -> list[float]:
            pairs = zip(rows[above]["seconds"], rows[below]["seconds"], strict=False)
            return [a / b for a, b in pairs]

        for job, limit in ((PLAIN, 4), (PACKED, 3)):
            if times := ratios(MERGEKIT, job):
                what = f"{job}, {label}: faster than {MERGEKIT}"
                found.append(Goal(what, times, limit, "×", at_least=True))
        for copy in (COPY, COPY_SYNC) if size is sizes[-1] else ():
            times = ratios(PLAIN, copy)
            found.append(Goal(f"{PLAIN}, {label}: of the time of {copy}", times, 1.5, "×"))
        rates = [size["model_bytes"] / 1e9 / s for s in rows[PUSH]["seconds"]]
        found.append(Goal(f"{PUSH}, {label}: tuned weights", rates, 0.35, "GB/s", at_least=True))
        peaks = [max(rows[job]["peak"]) / 1e6 for job in OURS]
        found.append(Goal(f"peak memory, {label}: the largest", [max(peaks)], 400, "MB", digits=0))
    if len(sizes) > 1:
        small, large = ({r["job"]: r for r in size["rows"]} for size in (sizes[0], sizes[-1]))
        growth = max(max(large[job]["peak"]) / max(small[job]["peak"]) for job in OURS)
        found.append(Goal("peak memory, largest model over smallest", [growth], 1.1, "×"))
    return found


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--gb", type=float, nargs="+", default=[1.7], help="sizes of the models")
    main("speed", parser.parse_args(), measure, render)
