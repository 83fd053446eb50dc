"""Losses as pictures: of fine-tunes step by step, and along the line between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, BinaryIO

from hubdiff.picture import GRID, INK

_COLOURS = ("#1b6ca8", "#c8553d", "#2a8a5f", "#8a5fb0", "#b8860b", "#4d4d4d")
_DASHES = ("-", "--", ":")  # of the curves that have the colours again
_Curves = Mapping[str, tuple[Sequence[float], Sequence[float | None]]]


def loss_curve(metrics: Sequence[Mapping[str, Any]], file: str | PathLike[str] | BinaryIO) -> None:
    """Draw ``loss`` over ``step`` as a PNG of 1440 × 720 pixels."""
    _draw({"loss": _curve(metrics)}, file, "Training loss", "step")


def loss_curves(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]], file: str | PathLike[str] | BinaryIO
) -> None:
    """Draw those of several fine-tunes, by their names, in one picture."""
    curves = {name: _curve(lines) for name, lines in metrics.items()}
    _draw(curves, file, "Training loss", "step")


def _curve(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float | None]]:
    return [line["step"] for line in metrics], [line["loss"] for line in metrics]


def line_curves(
    points: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    file: str | PathLike[str] | BinaryIO,
) -> None:
    """Draw the losses of one line or two over its points, from 0 to 1, likewise."""
    _draw(
        {name: (points, losses) for name, losses in curves.items()},
        file,
        "Loss on the line between two models",
        "from base (0) to target (1)",
    )


def _draw(curves: _Curves, file: str | PathLike[str] | BinaryIO, title: str, label: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=160, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    for number, (name, (x, y)) in enumerate(curves.items()):
        axes.plot(
            x,
            [float("nan") if value is None else value for value in y],
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)],
            linewidth=1.6,
            marker="o" if len(x) < 30 else None,
            markersize=4,
            label=name,
        )
    if len(curves) > 1:
        legend = axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)
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
