"""compare: base, tuned, target and target + Δ side by side, and what of the skill came along."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubdiff.card import page
from hubdiff.errors import HubdiffError
from hubdiff.files import FileTree, open_tree
from hubdiff.jobs.bench import Asked, Bench, Evaluated, Subject, require_output
from hubdiff.jobs.check import check
from hubdiff.lab.comparison import Paired, Recovery, paired, recovery, recovery_of_scores
from hubdiff.lab.scores import TaskScore
from hubdiff.manifest import read_manifest
from hubdiff.progress import Progress
from hubdiff.refs import ModelRef
from hubdiff.writer import disk_errors, write_whole

BASE, TUNED, TARGET, RESULT, TUNED_TARGET = (
    *("base", "tuned", "target", "target + Δ", "tuned target"),
)
PAGE, PICTURE, JSON = "comparison.md", "comparison.png", "comparison.json"


@dataclass(frozen=True)
class TaskComparison:
    """One task: a score for each of the models, ``change`` the result against the target, and
    ``recovery`` where there is a tuned target."""

    task: str
    scores: tuple[TaskScore, ...]
    change: Paired | None
    recovery: Recovery | None


@dataclass(frozen=True)
class Comparison:
    """``models``: name → what it is, in the order of the scores."""

    models: Mapping[str, str]
    tasks: tuple[TaskComparison, ...]
    limit: int | None
    libraries: Mapping[str, str]
    seconds: float
    output: str | None

    def as_json(self) -> dict[str, Any]:
        return {
            "models": dict(self.models),
            "tasks": [
                {
                    "task": one.task,
                    "scores": {
                        name: score.as_json()
                        for name, score in zip(self.models, one.scores, strict=True)
                    },
                    "change": one.change and asdict(one.change),
                    "recovery": one.recovery and asdict(one.recovery),
                }
                for one in self.tasks
            ],
            "limit": self.limit,
            "libraries": dict(self.libraries),
            "seconds": round(self.seconds, 3),
            "output": self.output,
        }


def compare(
    delta: str | Path,
    target: str | Path,
    *,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    tuned_target: str | Path | None = None,
    scale: float = 1.0,
    limit: int | None = None,
    chat_template: bool = False,
    batch: int = 8,
    seed: int = 1234,
    device: str = "auto",
    spread: bool = False,
    backend: str = "accelerate",
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate base, tuned, ``target`` and target + Δ on the same tasks.

    Args:
        base: the delta's own base; by default what its manifest names.
        tuned: by default base + Δ, which is the tuned model to the bit unless Δ was cut to a rank.
        tuned_target: the target fine-tuned itself, which tells what there was to recover.
        scale: of the delta on the target.
        output: a folder for ``comparison.md``, ``.png`` and ``.json``, and what each model said.
        the others: as ``hubdiff.evaluate``.

    A run that was stopped goes on from the answers it has. Needs ``pip install "hubdiff[eval]"``.
    Raises ``HubdiffError``.
    """
    asked = Asked(tuple(tasks), suite, limit, chat_template, batch, seed, device, spread, backend)
    if output is not None:
        require_output(Path(output))
    subjects = _subjects(delta, target, scale, base, tuned, tuned_target)
    bench = Bench(asked, progress)
    found: dict[str, Evaluated] = {}
    for name, subject in subjects.items():
        made = bench.evaluate(subject)
        assert made is not None  # one process: the command line sees to it
        found[name] = made
        if output is not None:
            made.write(Path(output) / name.replace(" ", "-").replace("Δ", "delta"))
    result = Comparison(
        {name: made.model for name, made in found.items()},
        tuple(
            _task(dict(zip(found, scores, strict=True)), seed)
            for scores in zip(*(made.scores for made in found.values()), strict=True)
        ),
        limit,
        found[TARGET].libraries,
        sum(made.seconds for made in found.values()),
        str(output) if output is not None else None,
    )
    if output is not None:
        _write(result, Path(output))
    bench.finish()
    return result


def _subjects(
    delta: str | Path,
    target: str | Path,
    scale: float,
    base: str | Path | None,
    tuned: str | Path | None,
    tuned_target: str | Path | None,
) -> dict[str, Subject]:
    """Name → what is evaluated under it, all pinned."""
    change = _open(delta)
    known = read_manifest(change).base
    if base is None and known.repo is not None:
        base = f"{known.repo}@{known.commit}" if known.commit else known.repo
    if base is None:
        raise HubdiffError(
            f"{change.pin} was made from a folder, {known.name}: its base has no place on the Hub",
            next_step="Name the folder with --base.",
        )
    on, own = _open(target), _open(base)
    if tuned is None and not check(change.pin.again, own.pin.again).own_base:
        raise HubdiffError(
            f"{change.pin} was not made from {own.pin}: on it, it gives another model than the "
            "tuned one",
            next_step="Give its own base with --base, or the tuned model with --tuned.",
        )
    subjects = {
        BASE: Subject.of(own),
        TUNED: Subject.of(_open(tuned)) if tuned else Subject.of(own, [(change, 1.0)]),
        TARGET: Subject.of(on),
        RESULT: Subject.of(on, [(change, 1.0)], scale),
    }
    if tuned_target is not None:
        subjects[TUNED_TARGET] = Subject.of(_open(tuned_target))
    return subjects


def _open(ref: str | Path) -> FileTree:
    return open_tree(ModelRef.parse(ref), cache=False)


def _task(scores: Mapping[str, TaskScore], seed: int) -> TaskComparison:
    target, result = scores[TARGET], scores[RESULT]
    best = scores.get(TUNED_TARGET)
    higher, share = target.higher_is_better, None
    change = paired(target.outcomes, result.outcomes, seed, higher_is_better=higher)
    if best is not None:
        share = recovery(
            target.outcomes, result.outcomes, best.outcomes, seed, higher_is_better=higher
        )
    if best is not None and not (target.outcomes and result.outcomes and best.outcomes):
        share = recovery_of_scores(target.value, result.value, best.value, higher_is_better=higher)
    return TaskComparison(target.name, tuple(scores.values()), change, share)


def _write(found: Comparison, folder: Path) -> None:
    from hubdiff.lab.score_picture import Bar, score_bars

    bars = [
        (name, [Bar(one.scores[number].value, one.scores[number].stderr) for one in found.tasks])
        for number, name in enumerate(found.models)
    ]
    with disk_errors(folder):
        score_bars([one.task for one in found.tasks], bars, folder / PICTURE)
    write_whole(folder / PAGE, _page(found).encode())
    write_whole(folder / JSON, (json.dumps(found.as_json(), indent=2) + "\n").encode())


def _page(found: Comparison) -> str:
    rows = []
    for one in found.tasks:
        change = one.change
        rows.append(
            {
                "task": one.task,
                "examples": one.scores[0].examples,
                "scores": [score_words(score) for score in one.scores],
                "recovery": recovery_words(one.recovery),
                "difference": change_words(change),
                "better": change.better if change else "–",
                "worse": change.worse if change else "–",
                "p": p_words(change),
                "test": change.test if change else "–",
            }
        )
    return page(
        "comparison.md",
        models=[{"name": name, "ref": ref} for name, ref in found.models.items()],
        rows=rows,
        limit=found.limit,
        libraries=found.libraries,
        picture=PICTURE,
        has_tuned_target=TUNED_TARGET in found.models,
    )


# --- in words ---


def score_words(score: TaskScore) -> str:
    return f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")


def recovery_words(found: Recovery | None) -> str:
    if found is None or found.share is None:
        return "–"
    words = f"{100 * found.share:.0f} %"
    if found.low is None or found.high is None:
        return words
    return f"{words} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def change_words(change: Paired | None) -> str:
    if change is None:
        return "–"
    spread = f" ± {change.stderr:.4f}" if change.stderr is not None else ""
    return f"{change.difference:+.4f}{spread}"


def p_words(change: Paired | None) -> str:
    if change is None:
        return "–"
    return f"{change.p:.3f}" if change.p >= 0.001 else f"{change.p:.0e}"
