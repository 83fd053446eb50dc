"""Scores as pictures: models side by side, and a score over the scale of a delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hubdiff.lab.axes import File, drawn, legend
from hubdiff.picture import GRID, INK

# Okabe and Ito's colours, told apart by people with any kind of colour vision.
_COLOURS = ("#999999", "#56B4E9", "#CC79A7", "#0072B2", "#D55E00")


@dataclass(frozen=True)
class Bar:
    value: float
    stderr: float | None


def score_bars(
    tasks: Sequence[str],
    models: Sequence[tuple[str, Sequence[Bar]]],
    file: File,
) -> None:
    """Draw, as a PNG, a group of bars for each task and a bar in it for each of ``models`` (a name,
    and its score in each task), with standard errors."""
    width = 0.8 / len(models)
    across = max(9.0, 1.5 + 0.35 * len(tasks) * len(models))
    with drawn(file, "Scores, with standard errors", "", "score", width=across) as axes:
        for number, ((name, bars), colour) in enumerate(zip(models, _COLOURS, strict=False)):
            x = [task + (number - (len(models) - 1) / 2) * width for task in range(len(tasks))]
            errors = [bar.stderr or 0.0 for bar in bars]
            heights = [bar.value for bar in bars]
            axes.bar(x, heights, 0.92 * width, color=colour, label=name, yerr=errors, ecolor=INK)
        axes.set_xticks(range(len(tasks)), tasks, rotation=20 if len(tasks) > 4 else 0)
        legend(axes, loc="upper left", ncols=len(models))
        axes.margins(y=0.22)


def scale_curve(scales: Sequence[float], bars: Sequence[Bar], best: float, file: File) -> None:
    """Draw, as a PNG, the score over the scale, with standard errors, and where it is ``best``."""
    values, errors = [bar.value for bar in bars], [bar.stderr or 0.0 for bar in bars]
    with drawn(file, "Score over the scale of the delta", "scale α", "score") as axes:
        style = {"color": _COLOURS[3], "ecolor": GRID, "marker": "o", "markersize": 4}
        axes.errorbar(scales, values, errors, **style)
        axes.axvline(best, color=_COLOURS[4], linewidth=1, linestyle="--", label=f"best: {best:g}")
        legend(axes)
