"""``hubdiff.lock``: what was seen and what became of it, keyed by content.

Sorted JSON, one value to a line, so that git merges what two runs added. Where it can't, and where
a push is refused, ``merge`` does: it does not matter in which order or how often.
"""

from __future__ import annotations

import calendar
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hubdiff.errors import HubdiffError

LOCK, LOCK_VERSION = "hubdiff.lock", 1
ADOPTED, DONE, REJECTED, FAILED = "adopted", "done", "rejected", "failed"
# GitHub stops the schedules of a repository in which nothing happened for 60 days.
KEEPALIVE_DAYS = 45
# What says more wins where two runs disagree.
_WEIGHT = {ADOPTED: 0, FAILED: 1, REJECTED: 2, DONE: 3}
_BROKEN = (
    "Take it from an earlier commit, or solve what git left in it. Don't start it anew: then "
    "everything would count as seen for the first time."
)


@dataclass(frozen=True)
class Lock:
    """``bases``: ref → commit and digest of the weights, when last seen; ``deltas``: source → the
    own base; ``items``: key → what became of it; ``checked_at``: when it was last looked and
    nothing but that was to be written."""

    bases: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    deltas: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    items: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    checked_at: str | None = None

    def dumps(self) -> str:
        document: dict[str, Any] = {
            "version": LOCK_VERSION,
            "bases": dict(self.bases),
            "deltas": dict(self.deltas),
            "items": dict(self.items),
        }
        if self.checked_at is not None:
            document["checked_at"] = self.checked_at
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def after(self, plan: Mapping[str, Any], outcomes: Iterable[Mapping[str, Any]]) -> Lock:
        """With what a plan saw, and what became of its items (each with its ``key``)."""
        fresh = {str(one["key"]): {k: v for k, v in one.items() if k != "key"} for one in outcomes}
        return replace(
            self,
            bases={**self.bases, **plan.get("bases", {})},
            deltas={**self.deltas, **plan.get("deltas", {})},
            items={**self.items, **fresh},
        )

    def without(self, other: Lock) -> Lock:
        """What ``other`` does not have, or has otherwise."""
        parts = ((self.bases, other.bases), (self.deltas, other.deltas), (self.items, other.items))
        bases, deltas, items = (
            {key: one for key, one in mine.items() if theirs.get(key) != one}
            for mine, theirs in parts
        )
        return Lock(bases, deltas, items, self.checked_at)

    def watches(self, plan: Mapping[str, Any]) -> bool:
        """Whether all that a plan looked at is in here. Where a base stands now is no news by
        itself; that it is watched at all is."""
        return plan["bases"].keys() <= self.bases.keys() and (
            plan["deltas"].keys() <= self.deltas.keys()
        )

    def is_stale(self, active: float | None = None) -> bool:
        """Whether nothing was written for so long that a date has to be. ``active``: when something
        happened in the repository, where the lock itself does not know."""
        times = [seconds_of(entry.get("at")) for entry in self.items.values()]
        last = max([*times, seconds_of(self.checked_at)], default=0.0) or active
        return bool(last) and time.time() - float(last or 0) > KEEPALIVE_DAYS * 86_400


def seconds_of(at: object) -> float:
    """A time as the lock has it, in seconds; 0 where it has none."""
    try:
        return float(calendar.timegm(time.strptime(str(at), "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0


def read_lock(path: str | Path) -> Lock:
    """Empty where there is no file. Raises ``HubdiffError``."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Lock()
    except (OSError, ValueError) as error:
        raise HubdiffError(f"{path} can't be read: {error}", next_step=_BROKEN) from error
    return parse_lock(text, str(path))


def parse_lock(text: str, where: str) -> Lock:
    """Raises ``HubdiffError``."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HubdiffError(f"{where} is not JSON: {error}", next_step=_BROKEN) from error
    if not isinstance(document, dict):
        raise HubdiffError(f"{where} is not a lock of hubdiff", next_step=_BROKEN)
    version = document.get("version")
    if version != LOCK_VERSION:
        raise HubdiffError(
            f"{where} is of version {version}, this hubdiff reads {LOCK_VERSION}",
            next_step="Update hubdiff: let init-ci pin its newest release.",
        )
    parts = [document.get(name, {}) for name in ("bases", "deltas", "items")]
    for part in parts:
        if not isinstance(part, dict) or not all(isinstance(v, dict) for v in part.values()):
            raise HubdiffError(f"{where} is not a lock of hubdiff", next_step=_BROKEN)
    wrong = [v.get("status") for v in parts[2].values() if v.get("status") not in _WEIGHT]
    if wrong:
        raise HubdiffError(f"{where} holds an item with status {wrong[0]!r}", next_step=_BROKEN)
    bases, deltas, items = parts
    return Lock(bases, deltas, items, document.get("checked_at"))


def merge(one: Lock, other: Lock) -> Lock:
    """Both together. The order of the two makes no difference, nor does doing it again."""
    return Lock(
        _merged(one.bases, other.bases),
        _merged(one.deltas, other.deltas),
        _merged(one.items, other.items),
        max(filter(None, (one.checked_at, other.checked_at)), default=None),
    )


def _merged(
    one: Mapping[str, dict[str, Any]], other: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    both = {**one, **other}
    for key in one.keys() & other.keys():
        both[key] = max(one[key], other[key], key=_rank)
    return both


def _rank(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells the later of two entries, and in the end just one of them."""
    return (
        _WEIGHT.get(str(entry.get("status")), 0),
        int(entry.get("attempts") or 0),
        str(entry.get("at") or ""),
        json.dumps(entry, sort_keys=True),
    )
