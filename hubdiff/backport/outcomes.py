"""What became of the items of a plan, read from what their jobs left: RESULTS/ID/ with result.json
and published.json.

A job that evaluates runs anybody's code, so nothing it leaves is believed beyond its own scores: an
item is the plan's, the gate is asked anew, addresses must be those of the repo the plan names. No
link is followed, nothing outside RESULTS is opened, sizes are bounded, and a file that is not what
it should be makes its item a failure instead of an error.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubdiff import markdown
from hubdiff.backport.gate import gate, number
from hubdiff.backport.items import (
    PLAN_VERSION,
    RAN,
    REFUSED,
    RESULT,
    Item,
    item_of,
    read_document,
)
from hubdiff.backport.lock import ADOPTED, DONE, FAILED, REJECTED, Lock
from hubdiff.backport.publish import NONE, PUBLISHED
from hubdiff.errors import HubdiffError

_MOST_BYTES = {RESULT: 16 << 20, PUBLISHED: 64 << 10}
_MOST_ITEMS = 10_000
_MOST_WORDS = 500  # characters of a reason
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADDRESS = re.compile(r"[A-Za-z0-9._~/%-]{0,400}")


@dataclass(frozen=True)
class Planned:
    """A plan as it was written. ``items`` are those whose jobs ran."""

    items: tuple[Item, ...]
    adopt: tuple[Item, ...]
    document: Mapping[str, Any]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Repos that are no bases, and why not."""
        found = self.document.get("skipped")
        pairs = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        return [(words(one.get("base")), words(one.get("why"))) for one in pairs]


@dataclass(frozen=True)
class Outcome:
    """What became of one item: ``status`` as the lock has it. ``result`` is the JSON its job left,
    if it can be read; the ``numbers`` are the gate's; ``output`` is where it was published."""

    item: Item
    status: str
    why: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    output: Mapping[str, Any] | None = None

    @property
    def scale(self) -> float | None:
        return number(self.result.get("scale"))

    def entry(self, at: str) -> dict[str, Any]:
        """For the lock, with its key."""
        item = self.item
        return {
            "key": item.key,
            "delta": f"{item.family}/{item.delta}",
            "source": item.source,
            "base": item.base,
            "weights": item.weights,
            "settings": item.settings,
            "status": self.status,
            "attempts": 0 if self.status == ADOPTED else item.attempt,
            "at": at,
            "scale": self.scale,
            "value": self.numbers.get("value"),
            "why": self.why,
            "output": self.output,
            "run": run_address(),
        }


def now() -> str:
    """The time as the lock has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def run_address() -> str | None:
    """Of the run of GitHub Actions this is part of."""
    parts = [os.environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY", "RUN_ID")]
    return "{}/{}/actions/runs/{}".format(*parts) if all(parts) else None


def words(value: object) -> str:
    """A reason as it is kept: one line, and not a long one."""
    text = markdown.one_line(value if isinstance(value, str) else "unknown")
    return text if len(text) <= _MOST_WORDS else f"{text[: _MOST_WORDS - 1]}…"


def hub_address(value: object, repo: str) -> str | None:
    """``value``, where it is an address of that repo of the Hub and nothing else."""
    from hubdiff.hub import endpoint

    home = f"{endpoint()}/{repo}"
    if not isinstance(value, str) or not (value == home or value.startswith(f"{home}/")):
        return None
    rest = value.removeprefix(home)
    return value if _ADDRESS.fullmatch(rest) and ".." not in rest else None


def merge_outcomes(lock: Lock, fresh: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of ``fresh`` that tell ``lock`` something. What it has already, but for the time
    and the run, is no news, so that a stage may run twice. What is done stays done, what was tried
    is not merely seen, and an older attempt does not undo a later one."""
    return [one for one in fresh if _is_news(one, lock.items.get(str(one["key"])))]


def _is_news(fresh: Mapping[str, Any], known: Mapping[str, Any] | None) -> bool:
    if known is None:
        return True
    if fresh["status"] != DONE:
        same_settings = known.get("settings") == fresh.get("settings")
        if known["status"] == DONE or fresh["status"] == ADOPTED:
            return False
        if same_settings and _progress(known) > _progress(fresh):
            return False
    apart = ("key", "at", "run")
    old, new = ({k: v for k, v in one.items() if k not in apart} for one in (known, fresh))
    return old != new


def _progress(entry: Mapping[str, Any]) -> tuple[int, int]:
    return int(entry.get("attempts") or 0), entry["status"] == REJECTED


# --- reading ---


def read_planned(plan: Path) -> Planned:
    """A plan that ``watch`` wrote. Raises ``HubdiffError``."""
    document = read_document(plan)
    parts = []
    for name in ("items", "adopt"):
        listed = document.get(name, [])
        if not isinstance(listed, list) or len(listed) > _MOST_ITEMS:
            raise HubdiffError(f"{plan}: {name} is no list of items")
        parts.append(tuple({i.key: i for i in (item_of(v, str(plan)) for v in listed)}.values()))
    for name in ("bases", "deltas"):
        known = document.get(name, {})
        if not isinstance(known, dict) or not all(isinstance(v, dict) for v in known.values()):
            raise HubdiffError(f"{plan}: {name} is no mapping of refs to what they are")
    return Planned(parts[0], parts[1], document)


def read_outcomes(planned: Planned, results: Path) -> list[Outcome]:
    """What became of every item, in the order of the plan; of those to adopt, too. Where there is
    no RESULTS no job came to an end. Raises ``HubdiffError`` where it is something else."""
    adopted = [Outcome(item, ADOPTED) for item in planned.adopt]
    with _folder(results) as folder:
        return [*(_outcome(item, folder) for item in planned.items), *adopted]


def strangers(planned: Planned, results: Path) -> list[str]:
    """Names in RESULTS that belong to no item of the plan."""
    known = {item.id for item in planned.items}
    try:
        return sorted(markdown.one_line(name) for name in os.listdir(results) if name not in known)
    except OSError:
        return []


class _Unsound(Exception):
    """Says what is wrong with a file that a job left."""


@contextmanager
def _folder(results: Path) -> Iterator[int | None]:
    try:
        opened = os.open(results, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise HubdiffError(
            f"{results} can't be read: {error.strerror}",
            next_step="Give the folder that holds one folder for each item.",
        ) from error
    try:
        yield opened
    finally:
        os.close(opened)


def _outcome(item: Item, folder: int | None) -> Outcome:
    try:
        result = _read(folder, item, RESULT)
        if result is None:
            return Outcome(item, FAILED, "its job left no result")
        return _judged(item, result, folder)
    except _Unsound as wrong:
        return Outcome(item, FAILED, words(str(wrong)))


def _judged(item: Item, result: Mapping[str, Any], folder: int | None) -> Outcome:
    named = result.get("item")
    if not isinstance(named, dict) or named.get("key") != item.key:
        raise _Unsound(f"{RESULT} is of another item")
    status = result.get("status")
    if status == REFUSED:
        return Outcome(item, REJECTED, words(result.get("why")), result)
    if status != RAN:
        return Outcome(item, FAILED, words(result.get("why")), result)
    gated = gate(item, result)
    if not gated.passed:
        return Outcome(item, REJECTED, words("; ".join(gated.reasons)), result, gated.numbers)
    if item.publish.mode == NONE:
        return Outcome(item, DONE, None, result, gated.numbers)
    output = _output(item, folder)
    if output is None:
        return Outcome(item, FAILED, "it was not published", result, gated.numbers)
    return Outcome(item, DONE, None, result, gated.numbers, output)


def _output(item: Item, folder: int | None) -> dict[str, Any] | None:
    said = _read(folder, item, PUBLISHED)
    if said is None:
        return None
    to, commit, branch = item.publish.to, said.get("commit"), said.get("branch")
    url, pr_url = said.get("url"), said.get("pr_url")
    if said.get("to") != to or to is None:
        raise _Unsound(f"{PUBLISHED} names another repo than the plan")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise _Unsound(f"{PUBLISHED} names no commit")
    if branch not in (None, item.branch) and not _is_pull_request(branch):
        raise _Unsound(f"{PUBLISHED} names another branch than {item.branch}")
    for address in (url, pr_url):
        if address is not None and hub_address(address, to) is None:
            raise _Unsound(f"{PUBLISHED} has an address that is not one of {to}")
    return {"url": url, "pr_url": pr_url, "commit": commit, "branch": branch}


def _is_pull_request(branch: object) -> bool:
    return isinstance(branch, str) and re.fullmatch(r"refs/pr/\d{1,9}", branch) is not None


def _read(folder: int | None, item: Item, name: str) -> dict[str, Any] | None:
    """A JSON object that the job of an item left, or None. Raises ``_Unsound``."""
    if folder is None:
        return None
    data = _bytes(folder, item, name)
    if data is None:
        return None
    try:
        document = json.loads(data, parse_constant=_no_number, parse_int=_short_number)
    except (ValueError, RecursionError) as error:
        raise _Unsound(f"{name} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise _Unsound(f"{name} is no JSON object")
    if name == RESULT and document.get("version") != PLAN_VERSION:
        raise _Unsound(f"{name} is not of version {PLAN_VERSION}")
    return document


def _bytes(folder: int, item: Item, name: str) -> bytes | None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    inner = file = -1
    try:
        inner = os.open(item.id, flags | os.O_DIRECTORY, dir_fd=folder)
        file = os.open(name, flags, dir_fd=inner)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _Unsound(f"{name} is no file")
        most = _MOST_BYTES[name]
        with os.fdopen(os.dup(file), "rb") as stream:
            data = stream.read(most + 1)
        if len(data) > most:
            raise _Unsound(f"{name} has more than {most} bytes")
        return data
    except FileNotFoundError:
        return None
    except OSError as error:  # a link, a file in place of the folder, no right to read
        raise _Unsound(f"{name} can't be read: {error.strerror}") from None
    finally:
        for opened in (inner, file):
            if opened >= 0:
                os.close(opened)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _short_number(text: str) -> int:
    if len(text) > 20:
        raise ValueError("a number of more than 20 digits")
    return int(text)
