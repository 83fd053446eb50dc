"""Losses as pictures: of fine-tunes step by step, and along the line between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hubdiff.lab.axes import File, drawn, legend

_COLOURS = ("#1b6ca8", "#c8553d", "#2a8a5f", "#8a5fb0", "#b8860b", "#4d4d4d")
_DASHES = ("-", "--", ":")  # of the curves that have the colours again
_Curves = Mapping[str, tuple[Sequence[float], Sequence[float | None]]]


def loss_curve(metrics: Sequence[Mapping[str, Any]], file: File) -> None:
    """Draw ``loss`` over ``step`` as a PNG of 1440 × 720 pixels."""
    _draw({"loss": _curve(metrics)}, file, "Training loss", "step")


def loss_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], file: File) -> None:
    """Draw those of several fine-tunes, by their names, in one picture."""
    curves = {name: _curve(lines) for name, lines in metrics.items()}
    _draw(curves, file, "Training loss", "step")


def _curve(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float | None]]:
    return [line["step"] for line in metrics], [line["loss"] for line in metrics]


def line_curves(
    points: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    file: File,
) -> None:
    """Draw the losses of one line or two over its points, from 0 to 1, likewise."""
    _draw(
        {name: (points, losses) for name, losses in curves.items()},
        file,
        "Loss on the line between two models",
        "from base (0) to target (1)",
    )


def _draw(curves: _Curves, file: File, title: str, label: str) -> None:
    with drawn(file, title, label, "loss") as axes:
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
            legend(axes)
        axes.set_ylim(bottom=0)
