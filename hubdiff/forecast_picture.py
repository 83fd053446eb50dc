"""A forecast as a PNG: layer by layer how far the target moved, how far Δ reaches, and whether the
two go the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

from hubdiff.forecast import Forecast, Moments, Row
from hubdiff.picture import GRID, INK, MOVED, REACH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE_RANGE = 30
_MOST_TICKS = 20


def forecast_picture(forecast: Forecast, file: BinaryIO, *, title: str) -> None:
    """Draw a forecast as a PNG of 1440 × 960 pixels; the same one gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=160, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    layers = _by_layer(forecast.rows)
    _draw_distances(upper, [moments for _, moments in layers])
    _draw_direction(lower, [moments for _, moments in layers])
    step = max(1, math.ceil(len(layers) / _MOST_TICKS))
    ticks = range(0, len(layers), step)
    lower.set_xticks(list(ticks), [layers[i][0] for i in ticks])
    lower.set_xlabel("layer", color=INK, fontsize=10)
    upper.set_title(title, color=INK, fontsize=12, loc="left", parse_math=False, wrap=True)
    for axes in (upper, lower):
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    canvas.print_png(file, metadata={"Software": None})


def _by_layer(rows: Sequence[Row]) -> list[tuple[str, Moments]]:
    """What the kinds of each layer come to together."""
    found: dict[tuple[str, int | None], Moments] = {}
    for row in rows:
        where = (row.stack, row.layer)
        found[where] = found.get(where, Moments()).plus(row.moments)
    return [("outside" if n is None else str(n), moments) for (_, n), moments in found.items()]


def _draw_distances(axes: Axes, layers: Sequence[Moments]) -> None:
    bars = (
        (-0.2, [m.drift for m in layers], MOVED, "the target moved: ‖target − base‖/‖base‖"),
        (0.2, [m.reach for m in layers], REACH, "the delta acts: ‖Δ‖/‖base‖"),
    )
    known = [value for _, values, _, _ in bars for value in values if value]
    log = bool(known) and max(known) / min(known) > _WIDE_RANGE
    for shift, values, colour, label in bars:
        places = [number + shift for number in range(len(values))]
        axes.bar(places, [value or 0.0 for value in values], 0.4, color=colour, label=label)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(min(known) / 2, max(known) * 2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.legend(loc="best", frameon=False, fontsize=9, labelcolor=INK)


def _draw_direction(axes: Axes, layers: Sequence[Moments]) -> None:
    axes.bar(range(len(layers)), [m.along or 0.0 for m in layers], 0.6, color=INK)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_ylim(-1, 1)
    axes.set_ylabel("cosine of Δ and\ntarget − base", color=INK, fontsize=9)
