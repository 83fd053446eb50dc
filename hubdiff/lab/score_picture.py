"""Scores as pictures: models side by side, and a score over the scale of a delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO

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
    file: str | PathLike[str] | BinaryIO,
) -> None:
    """Draw, as a PNG, a group of bars for each task and a bar in it for each of ``models`` (a name,
    and its score in each task), with standard errors."""
    width = 0.8 / len(models)
    figure, axes = _figure(max(9.0, 1.5 + 0.35 * len(tasks) * len(models)))
    for number, ((name, bars), colour) in enumerate(zip(models, _COLOURS, strict=False)):
        x = [task + (number - (len(models) - 1) / 2) * width for task in range(len(tasks))]
        errors = [bar.stderr or 0.0 for bar in bars]
        heights = [bar.value for bar in bars]
        axes.bar(x, heights, 0.92 * width, color=colour, label=name, yerr=errors, ecolor=INK)
    axes.set_xticks(range(len(tasks)), tasks, rotation=20 if len(tasks) > 4 else 0)
    axes.set_ylabel("score", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left", ncols=len(models))
    axes.margins(y=0.22)
    _finish(figure, axes, "Scores, with standard errors", file)


def scale_curve(
    scales: Sequence[float], bars: Sequence[Bar], best: float, file: str | PathLike[str] | BinaryIO
) -> None:
    """Draw, as a PNG, the score over the scale, with standard errors, and where it is ``best``."""
    figure, axes = _figure(9.0)
    values, errors = [bar.value for bar in bars], [bar.stderr or 0.0 for bar in bars]
    axes.errorbar(scales, values, errors, color=_COLOURS[3], ecolor=GRID, marker="o", markersize=4)
    axes.axvline(best, color=_COLOURS[4], linewidth=1, linestyle="--", label=f"best: {best:g}")
    axes.set_xlabel("scale α", color=INK, fontsize=10)
    axes.set_ylabel("score", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    _finish(figure, axes, "Score over the scale of the delta", file)


def _figure(width: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), dpi=160, facecolor="white", layout="constrained")
    return figure, figure.add_subplot(facecolor="white")


def _finish(figure: Any, axes: Any, title: str, file: str | PathLike[str] | BinaryIO) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, color=INK, fontsize=12, loc="left", parse_math=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})  # the same bytes
