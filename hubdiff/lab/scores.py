"""What an evaluation found: a score for each task, with its standard error, and what every single
example came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, int]  # a task of the harness, and which of its examples


@dataclass(frozen=True)
class Measured:
    """One number of one task of the harness. ``filter`` is how the answer was picked from what the
    model said. ``stderr`` is None where the harness knows none."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool
    examples: int


@dataclass(frozen=True)
class TaskScore:
    """``value`` is the mean over all examples of the tasks that ``name`` stands for, of one metric
    or the mean of several. ``stderr`` takes several metrics for one: they go together. ``outcomes``
    are the numbers it is the mean of."""

    name: str
    metrics: tuple[str, ...]
    value: float
    stderr: float | None
    higher_is_better: bool
    examples: int
    fewshot: int
    version: str
    dataset: str | None
    dataset_config: str | None
    dataset_commit: str | None
    kind: str
    measured: tuple[Measured, ...]
    outcomes: Mapping[Key, float] = field(repr=False, default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metrics": list(self.metrics),
            "value": _number(self.value),
            "stderr": self.stderr,
            "higher_is_better": self.higher_is_better,
            "examples": self.examples,
            "fewshot": self.fewshot,
            "version": self.version,
            "dataset": {
                "name": self.dataset,
                "config": self.dataset_config,
                "commit": self.dataset_commit,
            },
            "measured": [{**vars(one), "value": _number(one.value)} for one in self.measured],
        }


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def pooled(measured: Sequence[Measured], metrics: int) -> tuple[float, float | None]:
    """The mean over all examples of several tasks, and its standard error; ``measured`` has
    ``metrics`` numbers for each of them."""
    weights = [one.examples for one in measured]
    total = sum(weights)
    value = sum(w * one.value for w, one in zip(weights, measured, strict=True)) / total
    if any(one.stderr is None for one in measured):
        return value, None
    variance = sum((w * (one.stderr or 0.0)) ** 2 for w, one in zip(weights, measured, strict=True))
    return value, math.sqrt(variance * metrics) / total
