"""The matrix M_i + Δ_j: what a fine-tune's difference is worth on other versions of its base.

    python tests/benchmarks/transfer_matrix.py --json transfer_matrix.json --readme README.md
    python tests/benchmarks/transfer_matrix.py --size small
    python tests/benchmarks/transfer_matrix.py --size smollm2 --runs 1 --task OpenBookQA

A run is a family of its own (``transfer_families.py``): M1…M5 with a change of stage between M3 and
M4, each fine-tuned on one task. Every Δ_j is pushed, checked against every M_i, added to it and
scored; the sums with the Δ of the version before and with that of the first are trained on, by the
recipe that FT(M_i) has; and the paper's Algorithm 1 runs through all versions. What was trained is
kept in --folder, so a run that was stopped goes on. Half of the families choose the limits of
``hubdiff/verdict.py``, the others judge them. The exit status is 1 if a finding that must hold does
not. ``toy`` takes five minutes a family on one core, ``small`` wants a GPU, and ``smollm2`` needs
``pip install gguf accelerate``; it has one stage and three versions. There are no peers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Peers, Row, arguments, main
from sizes import made
from transfer_families import (
    DEVICE,
    SIZES,
    Characters,
    Curve,
    Family,
    Further,
    Recipe,
    SmolLM2,
    load,
)
from transfer_report import draw, findings, render
from transformers.utils import logging as transformers_logging

import hubdiff

NUMBERS = ("cosine", "drift", "reach", "drift_over_delta", "along", "rounded_away")


class Lab:
    """One family in a folder: what was trained is kept there, whole or not at all."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        folder.mkdir(parents=True, exist_ok=True)

    def versions(self) -> list[Path]:
        found: list[Path] = []
        for number in range(self.family.count):
            before = found[-1] if found else None
            make = partial(self.family.train_version, number, before)
            found.append(made(self.folder / f"M{number + 1}", make))
            print(f"{found[-1]} is there", flush=True)
        return found

    def score(self, name: str, model: Callable[[], Any]) -> float:
        def make(path: Path) -> None:
            path.write_text(json.dumps(self.family.score(model())))

        return json.loads(made(self.folder / f"{name}.score.json", make).read_text())

    def tuned(self, name: str, number: int, start: Callable[[], Any]) -> tuple[Path, Curve]:
        """The fine-tune of ``start`` by the recipe of version ``number``, and its curve."""

        def make(path: Path) -> None:
            model = start()
            curve = self.family.fine_tune(model, number)
            self.family.save(model, path)
            (path / "curve.json").write_text(json.dumps(curve))
            print(f"{self.folder.name}: {name} {curve}", flush=True)

        path = made(self.folder / name, make)
        return path, [tuple(point) for point in json.loads((path / "curve.json").read_text())]

    def delta(self, tuned: Path, base: Path) -> Path:
        def make(path: Path) -> None:
            hubdiff.push_delta(tuned, path, base=base, force=True)

        return made(self.folder / f"{tuned.name} - {base.name}", make)


def plus(target: Path, delta: Path) -> Any:
    """target + Δ, rounded to the target's dtype as ``hubdiff.load`` does, then in float32."""
    return hubdiff.load(delta, target).to(DEVICE, torch.float32)


def one_family(lab: Lab) -> Row:
    versions = lab.versions()
    n = range(len(versions))
    base = [lab.score(v.name, lambda v=v: load(v)) for v in versions]
    tunes = [lab.tuned(f"FT(M{i + 1})", i, lambda i=i: load(versions[i])) for i in n]
    deltas = [lab.delta(tunes[i][0], versions[i]) for i in n]

    def start(i: int, j: int) -> Any:
        return plus(versions[i], deltas[j])

    cells = []
    for i in n:
        for j in n:
            score = lab.score(f"M{i + 1}+D{j + 1}", lambda i=i, j=j: start(i, j))
            cells.append(
                {"target": i, "source": j, "score": score} | checked(deltas[j], versions[i])
            )
    curves = [{"target": i, "source": None, "points": tunes[i][1]} for i in n]
    for i, j in continued(len(versions)):
        name = f"FT(M{i + 1}+D{j + 1})"
        points = lab.tuned(name, i, lambda i=i, j=j: start(i, j))[1]
        curves.append({"target": i, "source": j, "points": points})
    return {
        "base": base,
        "stage_one": lab.family.stage_one,
        "cells": cells,
        "curves": curves,
        "iterative": iterative(lab, versions, tunes[0][0]),
    }


def continued(count: int) -> list[tuple[int, int]]:
    """Which sums are trained on: each with the delta of the version before, which the paper's
    direct variant is, and each with the delta of the first."""
    return [(i, j) for i in range(1, count) for j in sorted({i - 1, 0})]


def iterative(lab: Lab, versions: list[Path], first: Path) -> list[Curve]:
    """The paper's Algorithm 1: the delta of every M*_i starts the fine-tune of the next version."""
    best, curves = first, []
    for i in range(1, len(versions)):
        delta = lab.delta(best, versions[i - 1])
        best, curve = lab.tuned(
            f"M{i + 1} recycled", i, lambda i=i, delta=delta: plus(versions[i], delta)
        )
        curves.append(curve)
    return curves


def checked(delta: Path, target: Path) -> Row:
    found = hubdiff.check(delta, target)
    numbers = found.forecast.as_json() if found.forecast else {}
    return {"verdict": found.verdict.level} | {name: numbers.get(name) for name in NUMBERS}


def lab_of(options: argparse.Namespace, seed: int) -> Lab:
    recipe: Recipe | Further = SIZES.get(options.size, Further(options.task)).part(options.part)
    mark = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]  # another recipe, other models
    root = options.folder / "transfer_matrix" / f"{options.size}-{mark}"
    made_of = SmolLM2 if isinstance(recipe, Further) else Characters
    return Lab(made_of(recipe, seed), root / f"seed-{seed}")


def measure(options: argparse.Namespace, _: Peers) -> Row:
    transformers_logging.disable_progress_bar()
    if options.size != "smollm2" and DEVICE == "cpu":
        torch.set_num_threads(1)  # matrices this small gain nothing from two
    families = [one_family(lab_of(options, seed)) for seed in range(options.runs)]
    return {"size": options.size, "families": families}


def parser() -> argparse.ArgumentParser:
    found = arguments(__doc__, runs=4)
    found.add_argument("--size", choices=[*SIZES, "smollm2"], default="toy")
    found.add_argument(
        "--task", choices=["SIQA", "OpenBookQA"], default="SIQA", help="of smollm2, SIQA by default"
    )
    found.add_argument(
        "--part", type=float, default=1.0, help="share of all training steps, to try it out"
    )
    found.add_argument("--plot", type=Path, help="draw the matrix and the curves, as a PNG")
    return found


def run(options: argparse.Namespace) -> bool:
    """Whether all that must hold does."""
    document = main("transfer_matrix", options, measure, render, compared=False)
    if options.plot:
        draw(document, options.plot)
    return all(finding.holds for finding in findings(document))


if __name__ == "__main__":
    sys.exit(0 if run(parser().parse_args()) else 1)
