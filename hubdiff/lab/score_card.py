"""Scores where the Hub shows them: in a card's ``model-index``, and in ``.eval_results/`` for the
benchmarks that are registered there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from hubdiff.errors import HubdiffError
from hubdiff.facts import HEADER
from hubdiff.hub.cards import (
    EvalResult,
    EvalResultEntry,
    eval_result_entries_to_yaml,
    eval_results_to_model_index,
)
from hubdiff.lab.scores import TaskScore

FOLDER = ".eval_results"
_INDEX = "model-index"
# The key and the lines under it: indented, or the dashes of a list.
_BLOCK = re.compile(r"^model-index:[^\n]*\n?(?:(?:[ \t-][^\n]*|\r?)(?:\n|\Z))*", re.MULTILINE)
_TASK_TYPES = {"multiple_choice": "multiple-choice"}


def with_scores(card: str, name: str, scores: Sequence[TaskScore], how: str) -> str:
    """``card`` with the scores in the ``model-index`` of its header, in the place of older ones of
    the same tasks; all else in it stays as it is, to the letter. ``how`` they were measured goes
    along. Scores that are no number are left out. Raises ``HubdiffError`` for a card that can't
    take them."""
    import yaml

    head, body = _split(card)
    document = _mapping(head)
    index = document.pop(_INDEX, None) or []
    model = _model_of(index, name)
    new = [_entry(score, how) for score in scores if math.isfinite(score.value)]
    fresh = eval_results_to_model_index(name, new)[0]["results"] if new else []
    known = {key for result in fresh for key in _keys(result)}
    model["results"] = [*_without(model["results"], known), *fresh]
    rest = _BLOCK.sub("", head).rstrip("\r\n")
    if _mapping(rest) != document:
        raise _unreadable("its model-index is written in a way that can't be replaced")
    block = yaml.safe_dump({_INDEX: index or [model]}, sort_keys=False, allow_unicode=True)
    top = f"---\n{rest}\n{block}---\n" if rest else f"---\n{block}---\n"
    if "\r\n" in card:
        top = top.replace("\r\n", "\n").replace("\n", "\r\n")
    return top + body


def _split(card: str) -> tuple[str, str]:
    """The YAML at the top, and what comes after it."""
    found = HEADER.match(card)
    return (found.group(1), card[found.end() :]) if found else ("", f"\n{card}")


def _mapping(head: str) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(head)
    except yaml.YAMLError as error:
        raise _unreadable(str(error)) from error
    if document is not None and not isinstance(document, dict):
        raise _unreadable("there is no YAML mapping at its top")
    return document or {}


def _model_of(index: Any, name: str) -> dict[str, Any]:
    """Whose results they are, of the models in ``index``."""
    try:
        models = [model for model in index if isinstance(model["results"], list)]
    except (TypeError, KeyError) as error:
        raise _unreadable("its model-index can't be read") from error
    if not models:
        return {"name": name, "results": []}
    named = [m for m in models if m.get("name") in (name, name.rpartition("/")[2])]
    if not named and len(models) > 1:
        raise _unreadable(f"its model-index has several models, and none is called {name}")
    found: dict[str, Any] = (named or models)[0]
    return found


def _unreadable(what: str) -> HubdiffError:
    return HubdiffError(
        f"the card can't take scores: {what}", next_step="Mend the YAML at the top of README.md."
    )


def _keys(result: Any) -> list[tuple[Any, ...]]:
    """Task, dataset and metric of each number. Commits, values and words may differ."""
    try:
        task, dataset = result["task"], result["dataset"]
        of = (task.get("name"), dataset.get("type"), dataset.get("config"))
        return [(*of, metric.get("type")) for metric in result["metrics"]]
    except (TypeError, KeyError, AttributeError):
        return []  # somebody else's, in a form of its own


def _without(results: list[Any], known: set[tuple[Any, ...]]) -> list[Any]:
    kept = []
    for result in results:
        keys = _keys(result)
        if not known & set(keys):
            kept.append(result)
        elif left := [m for m, k in zip(result["metrics"], keys, strict=True) if k not in known]:
            kept.append({**result, "metrics": left})
    return kept


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


def benchmark_files(
    scores: Sequence[TaskScore], registered: Callable[[str], Sequence[str]], how: str, date: str
) -> dict[str, str]:
    """Path in the repo → YAML, for the scores whose dataset is registered as a benchmark.
    ``registered`` tells the ids of a dataset's tasks. Scores are shares of 1, leaderboards show
    percent."""
    import yaml

    files = {}
    for score in scores:
        if score.dataset is None or not math.isfinite(score.value):
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
