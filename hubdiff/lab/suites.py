"""Suites of tasks for an evaluation, by name: ``templates/suites.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from hubdiff.card import template
from hubdiff.errors import HubdiffError

_FILE = "suites.yaml"


@dataclass(frozen=True)
class Wanted:
    """A task that is asked for. ``task``: a task, group or tag of the harness, or a YAML file. Of a
    suite's: the ``version`` and the ``fewshot`` examples it was written for, and the ``metrics``
    ("metric,filter") whose mean is its score; none: the task's first."""

    name: str
    task: str
    version: float | None = None
    fewshot: int | None = None
    metrics: tuple[str, ...] = ()


def wanted_tasks(tasks: list[str], suite: str | None) -> tuple[Wanted, ...]:
    """What ``tasks`` (names, SUITE/NAME, or YAML files) and a ``suite`` ask for, each once. Raises
    ``HubdiffError``."""
    suites = read_suites()
    found: dict[str, Wanted] = {}
    if suite is not None:
        if suite not in suites:
            raise HubdiffError(
                f"there is no suite {suite!r}", next_step=f"Use one of {', '.join(suites)}."
            )
        found |= {wanted.name: wanted for wanted in suites[suite].values()}
    for task in tasks:
        first, slash, rest = task.partition("/")
        if slash and first in suites and not task.endswith((".yaml", ".yml")):
            if rest not in suites[first]:
                near = get_close_matches(rest, suites[first], 1) or list(suites[first])
                raise HubdiffError(
                    f"the suite {first} has no {rest!r}",
                    next_step=f"Did you mean {first}/{near[0]}?",
                )
            found[task] = suites[first][rest]
        else:
            found[task] = Wanted(task, task)
    if not found:
        raise HubdiffError(
            "no task was named",
            next_step=f"Give --tasks NAME or a YAML file, or --suite {next(iter(suites))}.",
        )
    return tuple(found.values())


def read_suites() -> dict[str, dict[str, Wanted]]:
    """Suite → short name → task."""
    import yaml

    document = yaml.safe_load(template(_FILE))
    return {
        suite: {
            short: Wanted(
                f"{suite}/{short}",
                entry["task"],
                float(entry["version"]),
                int(entry["fewshot"]),
                tuple(entry["metrics"]),
            )
            for short, entry in tasks.items()
        }
        for suite, tasks in document.items()
    }
