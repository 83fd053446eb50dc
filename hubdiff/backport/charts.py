"""The pictures of a report, in Mermaid, which GitHub draws."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hubdiff import markdown
from hubdiff.backport.gate import entry, number
from hubdiff.backport.outcomes import Outcome

_NAME = 120  # characters

# Mermaid's own first colour can hardly be seen on white; it puts the title of the y-axis on top of
# the numbers there, and measures those too narrow.
LOOK = (
    '%%{init: {"xyChart": {"width": 600, "height": 300, "yAxis": {"labelPadding": 12}}, '
    '"themeVariables": {"xyChart": {"plotColorPalette": "#0969da, #8c959f"}}}}%%'
)


def picture(one: Outcome) -> str | None:
    """The scores over the scale beside that of the base alone; at one scale the scores as bars.
    None where there are no two numbers."""
    scores, task = one.result.get("scores"), one.item.gate.task
    sides = scores if isinstance(scores, dict) else {}
    values = {
        side: value
        for side in ("base", "result", "tuned")
        if (value := _drawn(entry(sides.get(side), task).get("value"))) is not None
    }
    title = f"{one.item.family}/{one.item.delta} on {one.item.base.partition('@')[0]}"
    curve = _curve(one.result.get("curve"))
    if len(curve) > 1:
        series = [("line", [value for _, value in curve])]
        if "base" in values:
            series.append(("line", [values["base"]] * len(curve)))
        return _chart(title, "scale", [f"{scale:g}" for scale, _ in curve], str(task), series)
    if len(values) > 1:
        names = {"base": "base alone", "result": "with the delta", "tuned": "fine-tuned itself"}
        labels = [names[side] for side in values]
        return _chart(title, None, labels, str(task), [("bar", list(values.values()))])
    return None


def _curve(points: Any) -> list[tuple[float, float]]:
    found = []
    for point in points[:100] if isinstance(points, list) else []:
        if isinstance(point, dict):
            scale, value = _drawn(point.get("scale")), _drawn(point.get("value"))
            if scale is not None and value is not None:
                found.append((scale, value))
    return sorted(found)


def _drawn(value: object) -> float | None:
    """A number that can stand on an axis."""
    found = number(value)
    return found if found is not None and abs(found) < 1e9 else None


def _chart(
    title: str,
    axis: str | None,
    labels: Sequence[str],
    task: str,
    series: Sequence[tuple[str, Sequence[float]]],
) -> str:
    values = [value for _, line in series for value in line]
    low, high = min(0.0, *values), max(values)
    if any(kind == "line" for kind, _ in series):
        low = min(values)  # a curve is about differences, bars are about sizes
    room = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    low = low if low == 0 else low - room
    named = f'"{axis}" ' if axis else ""
    names = ", ".join(f'"{_plain(label)}"' for label in labels)
    return "\n".join(
        [
            LOOK,
            "xychart-beta",
            f'    title "{_plain(task)}: {_plain(title)}"',
            f"    x-axis {named}[{names}]",
            f"    y-axis {_decimal(low)} --> {_decimal(high + room)}",
            *(f"    {kind} [{', '.join(map(_decimal, line))}]" for kind, line in series),
        ]
    )


def _decimal(value: float) -> str:
    """Mermaid knows no exponents."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _plain(text: str) -> str:
    """Inside mermaid's quotes only what means nothing there."""
    return re.sub(r"[^A-Za-z0-9 ./_:+-]", "-", markdown.one_line(text))[:_NAME] or "-"
