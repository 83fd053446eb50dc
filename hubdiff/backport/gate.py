"""gate: whether a result may be published. A pure function of what ``run`` found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubdiff.backport.items import RAN, RESULT, Item, planned_item, read_document
from hubdiff.errors import HubdiffError
from hubdiff.verdict import GO

GATE = "gate.json"


@dataclass(frozen=True)
class Gated:
    """``reasons`` is why not, empty where it ``passed``; ``numbers`` are those that decided: value,
    base, drop and recovery on the gate's task, None where there is none."""

    passed: bool
    reasons: tuple[str, ...]
    numbers: Mapping[str, float | None]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def gate_item(plan: str | Path, results: str | Path, *, item: str) -> Gated:
    """Of an item of ``plan``, whose result lies in ``results``/ID. What the gate asks for is taken
    from the plan: a result may have been made by somebody's code. Raises ``HubdiffError``."""
    found = planned_item(Path(plan), item)
    return gate(found, read_result(found, Path(results)))


def read_result(item: Item, results: Path) -> dict[str, Any]:
    """What ``run`` said about ``item``. Raises ``HubdiffError``, also where it is about another."""
    place = results / item.id / RESULT
    document = read_document(place)
    named = document.get("item")
    if not isinstance(named, dict) or named.get("key") != item.key:
        raise HubdiffError(
            f"{place} is of another item", next_step="Run hubdiff backport run again."
        )
    return document


def gate(item: Item, result: Mapping[str, Any]) -> Gated:
    """Whether ``result``, the content of a result.json, is what ``item`` asks for. What can't be
    read counts as not shown."""
    if result.get("status") != RAN:
        return Gated(False, (str(result.get("why") or "it did not run to the end"),), _NOTHING)
    scores = result.get("scores")
    sides = scores if isinstance(scores, dict) else {}
    task = item.gate.task
    value, base, tuned = (_value(sides.get(side), task) for side in ("result", "base", "tuned"))
    better = _better(sides.get("result"), task)
    drop = None if value is None or base is None else better * (base - value)
    numbers = {"value": value, "base": base, "drop": drop}
    numbers["recovery"] = _recovery(value, base, tuned, better)
    reasons = tuple(_reasons(item, result, sides, numbers))
    return Gated(not reasons, reasons, numbers)


_NOTHING: Mapping[str, float | None] = {
    "value": None,
    "base": None,
    "drop": None,
    "recovery": None,
}


def _reasons(
    item: Item,
    result: Mapping[str, Any],
    sides: Mapping[str, Any],
    numbers: Mapping[str, float | None],
) -> Iterator[str]:
    asked, task = item.gate, item.gate.task
    said = result.get("check")
    verdict = said.get("verdict") if isinstance(said, dict) else None
    if verdict != GO and asked.min is asked.max_drop is asked.recovery is None:
        yield f"check says {verdict}, and the gate asks for nothing that could answer it"
    for name in item.evaluation.tasks:
        if _value(sides.get("result"), name) is None:
            yield f"there is no score of {name}"
    value, recovery = numbers["value"], numbers["recovery"]
    better = _better(sides.get("result"), task)
    if asked.min is not None and value is not None and _less(better * value, better * asked.min):
        bound = "least" if better > 0 else "most"
        yield f"{task} is {value:.4g}, and must be {asked.min:g} at {bound}"
    if asked.max_drop is not None:
        yield from _drops(item, sides, asked.max_drop)
    if asked.recovery is not None and (recovery is None or _less(recovery, asked.recovery)):
        shown = "unknown" if recovery is None else f"{recovery:.2f}"
        yield f"the recovery on {task} is {shown}, and must be {asked.recovery:g} at least"


def _drops(item: Item, sides: Mapping[str, Any], most: float) -> Iterator[str]:
    for name in item.evaluation.tasks:
        value, base = (_value(sides.get(side), name) for side in ("result", "base"))
        better = _better(sides.get("result"), name)
        if base is None:
            yield f"there is no score of the new base on {name}"
        elif value is not None and _less(most, better * (base - value)):
            yield f"{name} is {value:.4g}, {base:.4g} for the base: more than {most:g} worse"


def entry(side: Any, task: str | None) -> Mapping[str, Any]:
    """What a side's scores have for a task; empty where that is nothing readable."""
    found = side.get(task) if isinstance(side, dict) else None
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # JSON can spell whole numbers that no float holds.
    return float(value) if -1e300 < value < 1e300 else None


def _less(one: float, other: float) -> bool:
    """Of numbers that people write in decimals: 0.4 / 0.8 is not less than 0.5."""
    return one < other - 1e-9


def _value(side: Any, task: str | None) -> float | None:
    return number(entry(side, task).get("value"))


def _better(side: Any, task: str | None) -> int:
    """1 where more is better, −1 where less is."""
    return -1 if entry(side, task).get("higher_is_better") is False else 1


def _recovery(
    value: float | None, base: float | None, tuned: float | None, better: int
) -> float | None:
    """Of what tuning gained; None where it gained nothing: to lose more would count as more."""
    if value is None or base is None or tuned is None or better * (tuned - base) <= 0:
        return None
    return (value - base) / (tuned - base)
