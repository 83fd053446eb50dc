"""Losses as pictures: of a fine-tune step by step, and along the line between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, BinaryIO

from hubdiff.picture import GRID, INK

_COLOURS = ("#1b6ca8", "#c8553d")


def loss_curve(metrics: Sequence[Mapping[str, Any]], file: str | PathLike[str] | BinaryIO) -> None:
    """Draw ``loss`` over ``step`` as a PNG of 1440 × 720 pixels."""
    steps = [line["step"] for line in metrics]
    curves = {"loss": [line["loss"] for line in metrics]}
    _draw(steps, curves, file, "Training loss", "step")


def line_curves(
    points: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    file: str | PathLike[str] | BinaryIO,
) -> None:
    """Draw the losses of one line or two over its points, from 0 to 1, likewise."""
    _draw(
        points, curves, file, "Loss on the line between two models", "from base (0) to target (1)"
    )


def _draw(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    file: str | PathLike[str] | BinaryIO,
    title: str,
    label: str,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=160, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    for (name, y), colour in zip(curves.items(), _COLOURS, strict=False):
        marker = "o" if len(x) < 30 else None
        heights = [float("nan") if value is None else value for value in y]
        axes.plot(x, heights, color=colour, linewidth=1.6, marker=marker, markersize=4, label=name)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel(label, color=INK, fontsize=10)
    axes.set_ylabel("loss", color=INK, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, color=INK, fontsize=12, loc="left", parse_math=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
    canvas.print_png(file, metadata={"Software": None})  # no version: the same bytes
