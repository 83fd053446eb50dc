"""The report of a recycling: what became of every step, as JSON, as Markdown and as one picture of
the losses. Written after every step, so that a run that was stopped has one too."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hubdiff import markdown
from hubdiff.card import page
from hubdiff.lab.recycling import Plan, Step
from hubdiff.summary import percent, size_text
from hubdiff.writer import disk_errors, write_whole

MARKDOWN, JSON, CURVES = "report.md", "report.json", "losses.png"
_NUMBERS = ("cosine", "drift", "along", "rounded_away")


def report_of(
    plan: Plan, steps: Sequence[Step], records: Mapping[str, Mapping[str, Any]], pins: Any
) -> dict[str, Any]:
    """The report as JSON. ``records`` are what the run knows of steps, by name; ``pins`` what refs
    of the plan are pinned to."""
    rows = [_row(plan, step, records, pins) for step in steps]
    return {
        "plan": Path(plan.file).name,
        "method": plan.method,
        "data": plan.shown(plan.data),
        "recipe": plan.recipe.as_json(),
        "finished": all(row["delta"] is not None for row in rows),
        "steps": rows,
    }


def _row(
    plan: Plan, step: Step, records: Mapping[str, Mapping[str, Any]], pins: Any
) -> dict[str, Any]:
    record = records.get(step.name, {})
    trained = record.get("trained") or {}
    begun = records.get(step.start or "", {}).get("delta") or {}
    given = step.tuned or step.delta
    return {
        "name": step.name,
        "number": step.number,
        "base": plan.shown(pins.get(step.base, step.base)),
        "given": given and plan.shown(pins.get(given, given)),
        "started_from": step.start and {"step": step.start, "delta": begun.get("ref")},
        "check": record.get("check"),
        "losses": trained.get("losses"),
        "training_steps": plan.recipe.steps if trained else None,
        "seconds": trained.get("seconds"),
        "push": step.push and plan.shown(step.push),
        "delta": record.get("delta"),
    }


def key_numbers(checked: Mapping[str, Any]) -> dict[str, Any]:
    """What a report keeps of a check."""
    forecast = checked["forecast"] or {}
    return {
        "verdict": checked["verdict"],
        "reasons": checked["reasons"],
        **{name: forecast.get(name) for name in _NUMBERS},
    }


def write_report(report: Mapping[str, Any], output: Path) -> None:
    """All three files; the picture only where there is a loss to draw."""
    curves = {
        step["name"]: lines
        for step in report["steps"]
        if step["losses"] and (lines := _metrics(output / step["name"]))
    }
    if curves:
        from hubdiff.lab.curve import loss_curves

        with disk_errors(output):
            loss_curves(curves, output / CURVES)
    write_whole(output / JSON, (json.dumps(report, indent=2) + "\n").encode())
    write_whole(output / MARKDOWN, _page(report, bool(curves)).encode())


def _metrics(folder: Path) -> list[dict[str, Any]]:
    from hubdiff.jobs.finetune import METRICS
    from hubdiff.lab.training import read_metrics

    return [line for line in read_metrics(folder / METRICS) if math.isfinite(line["loss"])]


def training_of(folder: Path) -> dict[str, Any]:
    """What the metrics of a fine-tune say: the first and the last loss, and the seconds of training
    up to there. A run that went on began to count anew."""
    lines = _metrics(folder)
    losses = [line["loss"] for line in lines]
    seconds = [line["seconds"] for line in lines]
    ends = [a for a, b in pairwise(seconds) if b < a] + seconds[-1:]
    return {
        "losses": [losses[0], losses[-1]] if losses else None,
        "seconds": round(sum(ends), 3) if ends else None,
    }


# --- in words ---

HEADINGS = ("step", "started from", "check", "loss", "Δ", "‖Δ‖/‖base‖")


def cells(step: Mapping[str, Any]) -> tuple[str, ...]:
    """A step as a row under ``HEADINGS``."""
    delta, checked, losses = step["delta"], step["check"], step["losses"]
    return (
        step["name"],
        start_of(step),
        checked["verdict"] if checked else "–",
        f"{losses[0]:.4g} → {losses[1]:.4g}" if losses else "–",
        size_text(delta["bytes"]) if delta else "–",
        percent(delta["relative_norm"]) if delta and delta["relative_norm"] is not None else "–",
    )


def start_of(step: Mapping[str, Any]) -> str:
    if step["given"]:
        return "not trained here"
    return f"base + Δ of {step['started_from']['step']}" if step["started_from"] else "base"


def _page(report: Mapping[str, Any], picture: bool) -> str:
    steps = report["steps"]
    return page(
        "recycling.md",
        report=report,
        versions=max(step["number"] for step in steps),
        headings=HEADINGS,
        rows=[cells(step) for step in steps],
        picture=CURVES if picture else None,
        steps=[
            {"name": step["name"], "facts": [(label, text) for label, text in _facts(step) if text]}
            for step in steps
        ],
    )


def _facts(step: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Label and Markdown; the refs are pinned."""
    code, checked, delta = markdown.code, step["check"], step["delta"]
    yield "Base", code(step["base"])
    start = step["started_from"]
    begun = start and (code(start["delta"]) if start["delta"] else f"that of {code(start['step'])}")
    yield "Started from", f"the base with the delta {begun} on it" if start else None
    yield "Fine-tuned already", step["given"] and code(step["given"])
    if checked:
        reasons = "; ".join(reason["text"] for reason in checked["reasons"])
        yield "Check", markdown.text(checked["verdict"] + (f": {reasons}" if reasons else ""))
        for name in _NUMBERS:
            value = checked[name]
            yield name.replace("_", " "), None if value is None else f"{value:.4g}"
    if step["losses"]:
        yield "Loss", f"{step['losses'][0]:.4g} → {step['losses'][1]:.4g}"
    if step["training_steps"]:
        yield "Steps", f"{step['training_steps']:,}"
    yield "Seconds of training", None if step["seconds"] is None else f"{step['seconds']:.1f}"
    if delta:
        yield "Δ", code(delta["ref"])
        yield "Size of Δ", size_text(delta["bytes"])
        yield "‖Δ‖", f"{delta['norm']:.4g}"
