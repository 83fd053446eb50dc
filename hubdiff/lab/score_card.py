"""Scores where the Hub shows them: in a card's ``model-index``, and in ``.eval_results/`` for the
benchmarks that are registered there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hubdiff.errors import HubdiffError
from hubdiff.hub.cards import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from hubdiff.lab.scores import TaskScore

FOLDER = ".eval_results"
_TASK_TYPES = {"multiple_choice": "multiple-choice"}


def with_scores(card: str, name: str, scores: Sequence[TaskScore], how: str) -> str:
    """``card`` with the scores in the ``model-index`` of its header, in the place of older ones of
    the same tasks. ``how`` they were measured goes along. Raises ``HubdiffError`` for a card that
    can't be read: nothing in it may get lost."""
    import yaml

    try:
        page = ModelCard(card if card.strip() else "---\n{}\n---\n")
        data = page.data
        assert isinstance(data, ModelCardData)
        old = list(data.eval_results or [])
        if data.get("model-index") is not None:
            raise ValueError("its model-index can't be read")
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise HubdiffError(
            f"the card can't take scores: {error}", next_step="Mend the YAML at its top."
        ) from error
    new = [_entry(score, how) for score in scores]
    kept = [one for one in old if not any(_same(one, other) for other in new)]
    data.model_name = data.model_name or name
    data.eval_results = kept + new
    return str(page)


def _entry(score: TaskScore, how: str) -> EvalResult:
    measured = f" ± {score.stderr:.4f}" if score.stderr is not None else ""
    config = f"{score.fewshot}-shot, {score.examples:,} examples, version {score.version}"
    return EvalResult(
        task_type=_TASK_TYPES.get(score.kind, "text-generation"),
        task_name=score.name,
        dataset_type=score.dataset or score.name,
        dataset_name=score.dataset or score.name,
        dataset_config=score.dataset_config,
        dataset_revision=score.dataset_commit,
        metric_type=score.metrics[0].partition(",")[0],
        metric_name=f"{', '.join(score.metrics)} ({score.value:.4f}{measured}; {config}; {how})",
        metric_value=score.value,
        metric_args={"stderr": score.stderr},
    )


def _same(one: EvalResult, other: EvalResult) -> bool:
    """Whether both are of one task: commits, values and words may differ."""

    def of(result: EvalResult) -> tuple[Any, ...]:
        return result.task_name, result.dataset_type, result.dataset_config, result.metric_type

    return of(one) == of(other)


def benchmark_files(
    scores: Sequence[TaskScore], registered: Callable[[str], Sequence[str]], how: str, date: str
) -> dict[str, str]:
    """Path in the repo → YAML, for the scores whose dataset is registered as a benchmark.
    ``registered`` tells the ids of a dataset's tasks. Scores are shares of 1, leaderboards show
    percent."""
    import yaml

    files = {}
    for score in scores:
        if score.dataset is None:
            continue
        task = _registered_task(score, registered(score.dataset))
        if task is None:
            continue
        stderr = f" ± {100 * score.stderr:.2f}" if score.stderr is not None else ""
        entry = EvalResultEntry(
            dataset_id=score.dataset,
            task_id=task,
            value=round(100 * score.value, 4),
            dataset_revision=score.dataset_commit,
            date=date,
            notes=f"{', '.join(score.metrics)}{stderr}; {score.fewshot}-shot; {how}",
        )
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", f"hubdiff-{score.name}")
        files[f"{FOLDER}/{name}.yaml"] = yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True
        )
    return files


def _registered_task(score: TaskScore, ids: Sequence[str]) -> str | None:
    """The one of ``ids`` that a score is of: all of a benchmark that has one, else the one of that
    name."""
    if len(ids) == 1:
        return ids[0]
    names = (score.dataset_config, *{one.task for one in score.measured})
    return next((task for task in ids if task in names), None)
