"""lm-evaluation-harness, on a model that hubdiff merges in memory."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import random
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from hubdiff.errors import HubdiffError, OutputError
from hubdiff.lab.scores import Key, Measured, TaskScore, pooled
from hubdiff.lab.suites import Wanted
from hubdiff.progress import Progress

VERSION = lm_eval.__version__
_RESAMPLED = 1000  # times, for the standard error of a metric that is no mean
# A model on the device of that name, or spread over all ("auto").
Load = Callable[[str], Any]


class Model(HFLM):
    """The harness's own model of transformers, but for where its weights come from. ``folder`` has
    the config and the tokenizer; ``load`` makes the rest on a device."""

    def __init__(self, folder: Path, load: Load, progress: Progress, **wanted: Any) -> None:
        self._load, self._progress = load, progress
        super().__init__(str(folder), trust_remote_code=False, **wanted)

    def _create_model(self, pretrained: str, parallelize: bool = False, **_: Any) -> None:
        self._model = self._load("auto" if parallelize else str(self.device))

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        self.cache_hook = _Counted(cache_hook, self._progress)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        with self._shown(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        with self._shown(requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        with self._shown(requests):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **more: Any) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **more)

    @contextlib.contextmanager
    def _shown(self, requests: Any) -> Iterator[None]:
        self._progress.start("answering", len(requests), "requests")
        yield
        self._progress.finish()


class _Counted(CacheHook):
    """Every answer is kept as soon as it is there, which is what a stopped run goes on from."""

    def __init__(self, hook: CacheHook, progress: Progress) -> None:
        self._hook, self._progress = hook, progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._hook.add_partial(attr, req, res)
        self._progress.advance(1)


class Tasks:
    """The tasks of an evaluation, found and their data read. Raises ``HubdiffError`` for one that
    does not exist, whose data can't be had, or that is another than its suite was written for."""

    def __init__(self, wanted: Sequence[Wanted], seed: int, progress: Progress) -> None:
        self.wanted, self._seed = tuple(wanted), seed
        _seed(seed)  # some tasks shuffle their choices as they are read
        gone = [one.task for one in wanted if _names_file(one.task) and not _is_file(one.task)]
        if gone:
            raise HubdiffError(
                f"there is no file {gone[0]}", next_step="Check the path of the task."
            )
        only_files = all(_is_file(one.task) and not _is_group(one.task) for one in wanted)
        self._manager = task_manager(include_defaults=not only_files)
        self.loaded = []
        for one in wanted:
            self.loaded.append(self._load(one))
            progress.advance(1)
        names = [name for tasks in self.loaded for name in tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise HubdiffError(
                f"the task {twice} is asked for twice", next_step="Name each task once."
            )

    def _load(self, wanted: Wanted) -> dict[str, Any]:
        """The harness's own task objects by name, of one that is asked for."""
        if not _is_file(wanted.task) and wanted.task not in self._manager.task_index:
            raise _no_task(wanted.task, self._manager.all_tasks)
        try:
            with _quiet():
                found = self._manager.load([wanted.task])["tasks"]
        except KeyboardInterrupt:
            raise
        except Exception as error:  # a task is code and data of its own: anything may come of it
            raise HubdiffError(
                f"the task {wanted.name} can't be used: {type(error).__name__}: {error}",
                next_step="Is its data there, and may you read it? lm_eval validate --tasks "
                f"{wanted.task} says more.",
            ) from error
        for name, task in found.items():
            _require_pinned(wanted, name, task)
            _take_the_likeliest(task)
            if getattr(task, "UNSAFE_CODE", False):
                raise HubdiffError(
                    f"the task {name} runs code that the model writes",
                    next_step="Write the result out with hubdiff apply, and run lm_eval "
                    "--confirm_run_unsafe_code on it where nothing can be harmed.",
                )
        return dict(found)

    def run(
        self,
        model: Model,
        *,
        limit: int | None,
        chat_template: bool,
        answers: Path,
    ) -> dict[str, Any] | None:
        """What the harness says of ``model``; None in processes that are not the first. Answers are
        kept in ``answers``, and taken from there."""
        _seed(self._seed)
        tasks = {name: task for tasks in self.loaded for name, task in tasks.items()}
        for task in tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self._seed)
        with _quiet(), _kept_in(answers.parent):
            kept = CachingLM(model, _usable(Path(f"{answers}-{model.rank}.db")))
            found: dict[str, Any] | None = lm_eval.evaluate(
                kept,
                task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
                limit=limit,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                bootstrap_iters=_RESAMPLED,
            )
            kept.dbdict.close()
        return found

    def scores(self, found: Mapping[str, Any]) -> tuple[TaskScore, ...]:
        """A score for each task that was asked for."""
        return tuple(
            _score(wanted, tasks, found)
            for wanted, tasks in zip(self.wanted, self.loaded, strict=True)
        )


def _take_the_likeliest(task: Any) -> None:
    """Where a task says nothing of sampling, the harness's vLLM would draw at a temperature of 1,
    its model of transformers takes the likeliest: now both do."""
    how = task.get_config("generation_kwargs")
    if how and "do_sample" not in how and "temperature" not in how:
        how["do_sample"] = False


@cache
def task_manager(*, include_defaults: bool) -> TaskManager:
    """The harness's own tasks are thousands of files, which take seconds to list: once a process.
    What it knows of them does not change; each task is read again when it is loaded."""
    return TaskManager(include_defaults=include_defaults)


@contextlib.contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Say in words what SQLite raises where answers can't be kept."""
    try:
        yield
    except sqlite3.Error as error:
        raise OutputError(
            f"the answers so far can't be kept in {folder}: {error}",
            next_step="Is the disk full? Free some space, or set HF_HOME to a folder on another "
            "disk; run it again to go on.",
        ) from error


def _usable(file: Path) -> str:
    """Answers that can be read; what a damaged file held is asked again."""
    try:
        with contextlib.closing(sqlite3.connect(file)) as answers:
            sound = answers.execute("PRAGMA quick_check").fetchone() == ("ok",)
    except sqlite3.DatabaseError:
        sound = False
    if not sound:
        file.unlink()
    return str(file)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _is_file(task: str) -> bool:
    return _names_file(task) and Path(task).is_file()


def _is_group(file: str) -> bool:
    """A group may name tasks of the harness."""
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    return any(line.startswith("group:") for line in text.splitlines())


def _names_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _no_task(name: str, known: Sequence[str]) -> HubdiffError:
    near = get_close_matches(name, known, 3)
    return HubdiffError(
        f"lm-evaluation-harness {VERSION} has no task {name!r}",
        next_step=(f"Did you mean {' or '.join(near)}? " if near else "")
        + "lm_eval ls tasks lists them; a task of your own is a YAML file.",
    )


def _require_pinned(wanted: Wanted, name: str, task: Any) -> None:
    """Raise where a task is not the one that its suite was written for."""
    if wanted.version is None:
        return
    version, fewshot = float(task.VERSION), int(task.get_config("num_fewshot") or 0)
    if (version, fewshot) != (wanted.version, wanted.fewshot):
        raise HubdiffError(
            f"{wanted.name} is {name} {wanted.version} with {wanted.fewshot} examples, and "
            f"lm-evaluation-harness {VERSION} has {version} with {fewshot}: the numbers would not "
            "compare",
            next_step=f"Take the harness's own with --tasks {wanted.task}, or another harness.",
        )


def _score(wanted: Wanted, tasks: Mapping[str, Any], found: Mapping[str, Any]) -> TaskScore:
    measured = [one for name in tasks for one in _measured(name, found)]
    if not measured:
        raise HubdiffError(
            f"{wanted.name} measured nothing that is a number",
            next_step="Give the task a metric_list.",
        )
    metrics = wanted.metrics or (f"{measured[0].metric},{measured[0].filter}",)
    chosen = [one for one in measured if f"{one.metric},{one.filter}" in metrics]
    if len(chosen) < len(metrics) * len(tasks):
        raise HubdiffError(
            f"{wanted.name}: not each of its tasks has {' and '.join(metrics)}",
            next_step="Name tasks that are measured alike, or each by itself.",
        )
    value, stderr = pooled(chosen, len(metrics))
    first = next(iter(tasks.values()))
    dataset = first.get_config("dataset_path")
    on_hub = isinstance(dataset, str) and dataset.count("/") == 1 and not Path(dataset).exists()
    named_by_file = wanted.name == wanted.task and _is_file(wanted.task) and len(tasks) == 1
    return TaskScore(
        next(iter(tasks)) if named_by_file else wanted.name,
        metrics,
        value,
        stderr,
        chosen[0].higher_is_better,
        sum(one.examples for one in chosen) // len(metrics),
        int(first.get_config("num_fewshot") or 0),
        str(first.VERSION),
        dataset if on_hub else None,
        first.get_config("dataset_name") if on_hub else None,
        _dataset_commit(first) if on_hub else None,
        str(first.get_config("output_type")),
        tuple(measured),
        _outcomes(chosen, found),
    )


def _dataset_commit(task: Any) -> str | None:
    """Of the Hub, by which the datasets library names the folder it keeps a dataset in; None where
    it does not."""
    splits = task.dataset.values() if isinstance(task.dataset, dict) else [task.dataset]
    for split in splits:
        for file in getattr(split, "cache_files", ()):
            name = Path(file["filename"]).parent.name
            if re.fullmatch(r"[0-9a-f]{40}", name):
                return name
    return None


def _measured(task: str, found: Mapping[str, Any]) -> Iterator[Measured]:
    numbers = found["results"][task]
    higher = found["higher_is_better"].get(task, {})
    for key, value in numbers.items():
        metric, comma, picked = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = numbers.get(f"{metric}_stderr,{picked}")
        if not isinstance(stderr, int | float):
            stderr = _spread(list(_single(task, metric, picked, float(value), found).values()))
        known = stderr is not None and math.isfinite(stderr)
        yield Measured(
            task,
            metric,
            picked,
            float(value),
            float(stderr) if known and stderr is not None else None,
            bool(higher.get(metric, True)),
            int(found["n-samples"][task]["effective"]),
        )


def _outcomes(chosen: Sequence[Measured], found: Mapping[str, Any]) -> dict[Key, float]:
    """What each example came to: the mean of the metrics. Nothing where a score is more than the
    mean over its examples, as a perplexity or an F1 is."""
    values: dict[Key, list[float]] = {}
    for one in chosen:
        single = _single(one.task, one.metric, one.filter, one.value, found)
        if not single:
            return {}
        for number, value in single.items():
            values.setdefault((one.task, number), []).append(value)
    return {key: sum(of) / len(of) for key, of in values.items()}


def _single(
    task: str, metric: str, picked: str, value: float, found: Mapping[str, Any]
) -> dict[int, float]:
    """One metric of each example by its number; nothing where their mean is not ``value``. Of a
    metric that has several numbers for one example, all of which count alike (IFEval's
    instructions), that example's share of their mean."""
    samples = [s for s in found["samples"][task] if s["filter"] == picked and metric in s]
    lists = [s[metric] if isinstance(s[metric], list) else [s[metric]] for s in samples]
    if not all(isinstance(v, int | float | np.number | np.bool_) for row in lists for v in row):
        return {}
    numbers = sum(map(len, lists))
    outcomes = {
        int(sample["doc_id"]): sum(map(float, row)) * len(lists) / numbers
        for sample, row in zip(samples, lists, strict=True)
    }
    mean = sum(outcomes.values()) / len(outcomes) if outcomes else math.nan
    return outcomes if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9) else {}


def _spread(values: Sequence[float]) -> float | None:
    """The standard error of a mean."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither bars nor advice nor prints of the harness; the caller's own settings again after."""
    loggers = [
        logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate", "sqlitedict")
    ]
    levels = [logger.level for logger in loggers]
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
