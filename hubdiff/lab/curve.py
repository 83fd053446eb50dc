"""The loss of a fine-tune, step by step, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, BinaryIO

from hubdiff.picture import INK

_LINE = "#1b6ca8"


def loss_curve(metrics: Sequence[Mapping[str, Any]], file: str | PathLike[str] | BinaryIO) -> None:
    """Draw ``loss`` over ``step`` as a PNG of 1440 × 720 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=160, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    steps = [line["step"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    axes.plot(steps, losses, color=_LINE, linewidth=1.6, marker="o" if len(steps) < 20 else None)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title("Training loss", color=INK, fontsize=12, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    canvas.print_png(file)
