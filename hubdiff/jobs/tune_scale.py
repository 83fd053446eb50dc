"""tune_scale: the scale at which a delta does most good on a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubdiff.errors import HubdiffError
from hubdiff.files import open_tree
from hubdiff.jobs.bench import Asked, Bench, Subject
from hubdiff.lab.comparison import Paired, paired
from hubdiff.lab.scale_search import Tried, best, halves, held_out, search
from hubdiff.lab.scores import TaskScore
from hubdiff.progress import Progress
from hubdiff.refs import ModelRef
from hubdiff.writer import disk_errors, require_place


@dataclass(frozen=True)
class TunedScale:
    """``best`` of what was ``tried``; ``gain`` compares it with scale 1, for each task, on the
    examples that did not choose (None: it is 1)."""

    delta: str
    target: str
    tried: tuple[Tried, ...]
    best: Tried
    gain: dict[str, Paired | None]
    limit: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def tune_scale(
    delta: str | Path,
    target: str | Path,
    *,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    evaluations: int = 9,
    limit: int | None = None,
    chat_template: bool = False,
    batch: int = 8,
    seed: int = 1234,
    device: str = "auto",
    spread: bool = False,
    backend: str = "accelerate",
    plot: str | Path | None = None,
    progress: Progress | None = None,
) -> TunedScale:
    """Look for the scale at which ``delta`` on ``target`` scores best.

    Args:
        evaluations: how many scales are tried: 0, 0.5, 1 and 1.5, then between the best.
        plot: where to write the curve, as a PNG.
        the others: as ``hubdiff.evaluate``.

    The scale is chosen on every second example; the others say what it is worth. A run that was
    stopped goes on from the answers it has. Needs ``pip install "hubdiff[eval]"``. Raises
    ``HubdiffError``.
    """
    if evaluations < 3:
        raise HubdiffError(
            "fewer than 3 scales make no curve", next_step="Give --evaluations 3 or more."
        )
    if limit == 1:
        raise HubdiffError(
            "one example can't choose a scale and say what it is worth",
            next_step="Give a larger --limit.",
        )
    if plot is not None:
        require_place(Path(plot))
    change, on = (open_tree(ModelRef.parse(ref), cache=False) for ref in (delta, target))
    Subject.of(on, [(change, 1.0)])  # refused before the tasks are found
    bench = Bench(
        Asked(tuple(tasks), suite, limit, chat_template, batch, seed, device, spread, backend),
        progress,
    )
    scores: dict[float, tuple[TaskScore, ...]] = {}

    def measure(scale: float) -> Tried:
        made = bench.evaluate(Subject.of(on, [(change, 1.0)], scale))
        assert made is not None  # one process: the command line sees to it
        whole = next((one.name for one in made.scores if not one.outcomes), None)
        if whole is not None:
            raise HubdiffError(
                f"the score of {whole} is no mean over its examples: one half of them can't choose "
                "a scale",
                next_step="Take a task with accuracy, exact match or another such metric.",
            )
        few = next((one.name for one in made.scores if len(one.outcomes) < 2), None)
        if few is not None:
            raise HubdiffError(
                f"{few} has one example: it can't choose a scale and say what it is worth",
                next_step="Take a task with more examples.",
            )
        scores[scale] = made.scores
        return Tried(scale, *halves(made.scores), _stderr(made.scores))

    tried = search(measure, evaluations)
    chosen = best(tried)
    if plot is not None:
        _draw(tried, chosen, Path(plot))
    bench.finish()
    return TunedScale(
        str(change.pin),
        str(on.pin),
        tuple(tried),
        chosen,
        {
            one.name: _gain(one, other, seed) if chosen.scale != 1 else None
            for one, other in zip(scores[1.0], scores[chosen.scale], strict=True)
        },
        limit,
    )


def _gain(one: TaskScore, other: TaskScore, seed: int) -> Paired | None:
    better = one.higher_is_better
    return paired(held_out(one), held_out(other), seed, higher_is_better=better)


def _stderr(scores: Sequence[TaskScore]) -> float | None:
    """Of the mean over the tasks, which are independent."""
    known = [score.stderr for score in scores if score.stderr is not None]
    return math.hypot(*known) / len(known) if len(known) == len(scores) else None


def _draw(tried: Sequence[Tried], chosen: Tried, file: Path) -> None:
    from hubdiff.lab.score_picture import Bar, scale_curve

    bars = [Bar((one.choosing + one.held_out) / 2, one.stderr) for one in tried]
    with disk_errors(file), file.open("wb") as stream:
        scale_curve([one.scale for one in tried], bars, chosen.scale, stream)
