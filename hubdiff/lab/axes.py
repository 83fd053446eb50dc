"""How the lab's pictures look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, BinaryIO

from hubdiff.picture import GRID, INK

File = str | PathLike[str] | BinaryIO


@contextmanager
def drawn(file: File, title: str, x: str, y: str, *, width: float = 9) -> Iterator[Any]:
    """Axes to draw on, which are then a PNG in ``file``, of 1440 × 720 pixels where ``width`` is 9.
    No name in it is read as a formula."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(width, 4.5), dpi=160, facecolor="white", layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    yield axes
    axes.set_xlabel(x, color=INK, fontsize=10)
    axes.set_ylabel(y, color=INK, fontsize=10)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, color=INK, fontsize=12, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both")
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})  # the same bytes


def legend(axes: Any, **more: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **more)
