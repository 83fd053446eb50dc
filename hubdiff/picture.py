"""How far a tune moved each layer: ‖Δ‖/‖base‖ by layer and kind, as rows and as a PNG.

``group_by_layer`` is plain arithmetic on the manifest's tensor entries; ``layer_picture`` draws it
with matplotlib, which is imported when it is needed. The same tensors give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, BinaryIO

from hubdiff.anatomy import KINDS, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class LayerRow:
    """The tensors of one kind in one layer, taken together.

    ``stack`` tells two towers apart ("encoder", "vision_tower.encoder"); ``layer`` is None outside
    the layers. ``relative_norm`` is ‖Δ‖/‖base‖ over all of them, None when the base is all zero or
    the norm is not a number. Counts are elements; ``changed`` those whose bits differ.
    """

    stack: str
    layer: int | None
    kind: str
    tensors: int
    elements: int
    changed: int
    relative_norm: float | None


def group_by_layer(tensors: Iterable[Mapping[str, Any]]) -> list[LayerRow]:
    """Rows by stack, layer and kind, in model order: outside the layers first, then layer by layer.

    ``tensors`` are manifest entries; those without a base (added ones) have no ratio and are left
    out.
    """
    groups: dict[tuple[str, int | None, str], list[Mapping[str, Any]]] = {}
    for tensor in tensors:
        if tensor.get("base_dtype") is not None:
            groups.setdefault(place(str(tensor["name"])), []).append(tensor)
    rows = [_row(*place, members) for place, members in groups.items()]
    stacks = list(dict.fromkeys(row.stack for row in rows))
    return sorted(
        rows,
        key=lambda r: (
            r.layer is not None,
            stacks.index(r.stack),
            -1 if r.layer is None else r.layer,
            KINDS.index(r.kind),
        ),
    )


def _row(
    stack: str, layer: int | None, kind: str, members: Sequence[Mapping[str, Any]]
) -> LayerRow:
    return LayerRow(
        stack=stack,
        layer=layer,
        kind=kind,
        tensors=len(members),
        elements=sum(math.prod(tensor.get("shape") or ()) for tensor in members),
        changed=sum(tensor.get("changed") or 0 for tensor in members),
        relative_norm=relative_norm(members),
    )


def relative_norm(tensors: Iterable[Mapping[str, Any]]) -> float | None:
    """‖Δ‖/‖base‖ over all of ``tensors`` together; None when that is no finite number."""
    pairs = [(t.get("delta_norm"), t.get("base_norm")) for t in tensors]
    known = [(float(d), float(b)) for d, b in pairs if d is not None and b is not None]
    if len(known) < len(pairs):
        return None
    delta = math.hypot(*(delta for delta, _ in known))
    base = math.hypot(*(base for _, base in known))
    if delta == 0 and math.isfinite(base):
        return 0.0
    ratio = delta / base if base else math.inf
    return ratio if math.isfinite(ratio) else None


# --- the picture --------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by people with any kind of colour vision, and a marker each.
_STYLE = {
    "attention": ("#0072B2", "o"),
    "mlp": ("#D55E00", "s"),
    "norm": ("#009E73", "^"),
    "embedding": ("#CC79A7", "D"),
    "other": ("#666666", "v"),
}
INK = "#222222"
GRID = "#D9D9D9"
MOVED, REACH = "#0072B2", "#D55E00"  # of a target, of Δ
_WIDE_RANGE = 30  # from this largest/smallest ratio on, a linear axis hides the small ones
_MOST_BARS = 24
_LABEL = "‖Δ‖ / ‖base‖"


def layer_picture(
    tensors: Iterable[Mapping[str, Any]],
    file: str | PathLike[str] | BinaryIO,
    *,
    title: str = "How far the tune moved the model",
) -> None:
    """Draw ‖Δ‖/‖base‖ per layer and kind as a PNG of 1440 × 720 pixels.

    A model without numbered layers gets one line per tensor instead, the most moved first.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tensors = list(tensors)
    rows = [row for row in group_by_layer(tensors) if row.relative_norm is not None]
    figure = Figure(figsize=(9, 4.5), dpi=160, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    if not rows:
        axes.set_axis_off()
        _say(axes, "no tensor to compare with the base")
    elif any(row.layer is not None for row in rows):
        _draw_layers(axes, rows)
    else:
        _draw_tensors(axes, tensors)
    if rows and not any(row.relative_norm for row in rows):
        _say(axes, "no tensor moved")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=len(KINDS),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            handletextpad=0.3,
            columnspacing=1.2,
            borderaxespad=0.2,
        )
    axes.set_title(title, color=INK, fontsize=12, loc="left", parse_math=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
    canvas.print_png(file, metadata={"Software": None})  # no version, no date: same bytes


def _draw_layers(axes: Axes, rows: list[LayerRow]) -> None:
    """Layers along x, one line per kind; what lies outside the layers in a column on the left."""
    floor = _scale(axes, [row.relative_norm for row in rows], "y")
    first = _first_x(rows)
    layers = {
        stack: [r for r in rows if r.layer is not None and r.stack == stack] for stack in first
    }
    length = sum(1 + max(row.layer or 0 for row in own) for own in layers.values())
    outside = -1.0 - 0.03 * length
    for kind in KINDS:
        loose = [(outside, r.relative_norm) for r in rows if r.layer is None and r.kind == kind]
        lines = [
            [(float(first[stack] + (r.layer or 0)), r.relative_norm) for r in own if r.kind == kind]
            for stack, own in layers.items()
        ]
        _dots(axes, [loose, *lines], kind, floor, "y")
    ticks = _layer_ticks(first, layers)
    if any(row.layer is None for row in rows):
        ticks.insert(0, (outside, "outside\nlayers"))
    for x in [start - 0.5 for start in first.values()][0 if ticks[0][0] == outside else 1 :]:
        axes.axvline(x, color=GRID, linewidth=1)
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    _name_stacks(axes, first)
    axes.set_xlabel("layer", color=INK, fontsize=10)
    axes.set_ylabel(_LABEL, color=INK, fontsize=10)
    axes.grid(axis="y", color=GRID, linewidth=0.6)


def _first_x(rows: list[LayerRow]) -> dict[str, int]:
    """Where on x the layers of each stack begin: one stack after the other, a gap between."""
    first: dict[str, int] = {}
    x = 0
    for row in rows:
        if row.layer is not None and row.stack not in first:
            first[row.stack] = x
            x += 2 + max(r.layer for r in rows if r.stack == row.stack and r.layer is not None)
    return first


def _layer_ticks(
    first: dict[str, int], layers: dict[str, list[LayerRow]]
) -> list[tuple[float, str]]:
    """At most about 20 layer numbers, at a round step."""
    numbers = {stack: sorted({row.layer or 0 for row in own}) for stack, own in layers.items()}
    count = sum(len(own) for own in numbers.values())
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 10**6) if count <= 20 * step)
    return [
        (float(first[stack] + number), str(number))
        for stack, own in numbers.items()
        for number in own
        if number % step == 0
    ]


def _name_stacks(axes: Axes, first: dict[str, int]) -> None:
    if len(first) > 1:
        for stack, x in first.items():
            axes.text(
                x - 0.4,
                0.99,
                _plain(stack, 28),
                color=INK,
                fontsize=8,
                va="top",
                transform=axes.get_xaxis_transform(),
                parse_math=False,
            )


def _draw_tensors(axes: Axes, tensors: list[Mapping[str, Any]]) -> None:
    """One line per tensor, the most moved on top."""
    pairs = [
        (ratio, str(tensor["name"]))
        for tensor in tensors
        if tensor.get("base_dtype") is not None and (ratio := relative_norm([tensor])) is not None
    ]
    pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    shown = pairs[:_MOST_BARS][::-1]
    floor = _scale(axes, [ratio for ratio, _ in shown], "x")
    for kind in KINDS:
        points = [
            (float(y), ratio) for y, (ratio, name) in enumerate(shown) if place(name)[2] == kind
        ]
        _dots(axes, [[point] for point in points], kind, floor, "x")
    axes.set_yticks(range(len(shown)), [_plain(name, 36) for _, name in shown])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    more = f", {_MOST_BARS} most moved of {len(pairs)} tensors" if len(pairs) > _MOST_BARS else ""
    axes.set_xlabel(f"{_LABEL}{more}", color=INK, fontsize=10)
    axes.grid(axis="both", color=GRID, linewidth=0.6)


def _scale(axes: Axes, ratios: Sequence[float | None], axis: str) -> float:
    """Set up the axis of the ratios; returns where a ratio of exactly 0 is drawn."""
    positive = [ratio for ratio in ratios if ratio]
    top = max(positive, default=0.01)
    percent = "{:.3g} %".format
    set_scale, set_limits = (
        (axes.set_yscale, axes.set_ylim) if axis == "y" else (axes.set_xscale, axes.set_xlim)
    )
    own_axis = axes.yaxis if axis == "y" else axes.xaxis
    if not positive or top / min(positive) < _WIDE_RANGE:
        set_limits(-0.04 * top, 1.12 * top)
        own_axis.set_major_formatter(lambda value, _: percent(100 * value))
        return 0.0
    # Half a decade below the smallest decade: no tick of the log axis comes near it.
    floor = 10 ** (math.floor(math.log10(min(positive))) - 0.5)
    zeros = len(positive) < len(ratios)
    set_scale("log")
    decades = range(math.floor(math.log10(min(positive))), math.ceil(math.log10(top)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    labels = [percent(100 * tick) for tick in ticks]
    if zeros:
        ticks, labels = [floor, *ticks], ["0", *labels]
    own_axis.set_ticks(ticks, labels)
    own_axis.set_ticks([], minor=True)
    set_limits(floor / 1.5 if zeros else min(positive) / 1.5, 1.8 * top)
    return floor


def _dots(
    axes: Axes, lines: list[list[tuple[float, float | None]]], kind: str, floor: float, axis: str
) -> None:
    """Lines of dots at (place, ratio), one legend entry for all; hollow dots are exact zeros."""
    colour, marker = _STYLE[kind]
    label: str | None = kind
    for line in lines:
        places = [place for place, _ in line]
        ratios = [ratio or floor for _, ratio in line]
        xs, ys = (places, ratios) if axis == "y" else (ratios, places)
        if line:
            axes.plot(
                xs,
                ys,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.1,
                label=label,
                markeredgewidth=0,
            )
            label = None
        hollow = [i for i, (_, ratio) in enumerate(line) if not ratio]
        axes.plot(
            [xs[i] for i in hollow],
            [ys[i] for i in hollow],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=0,
            markerfacecolor="white",
        )


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, color=INK, fontsize=11, ha="center", transform=axes.transAxes)


def _plain(text: str, most: int) -> str:
    """A hostile name as a short printable label: its end, which tells tensors apart."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return text if len(text) <= most else "…" + text[1 - most :]
