"""report: what a run did and where everything stands, as Markdown: for the summary of a job, and in
one issue that is written anew, never a second one.

Names, reasons and numbers come from repos and from jobs that run anybody's code. They are shown and
do nothing else: no HTML, no link but those that hubdiff makes, nobody is mentioned.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubdiff import markdown
from hubdiff.backport import github
from hubdiff.backport.charts import picture
from hubdiff.backport.gate import entry, number
from hubdiff.backport.items import BACKPORT, RECYCLE
from hubdiff.backport.lock import ADOPTED, DONE, FAILED, LOCK, REJECTED, Lock, read_lock
from hubdiff.backport.outcomes import (
    Outcome,
    Planned,
    hub_address,
    merge_outcomes,
    now,
    read_outcomes,
    read_planned,
    run_address,
    words,
)
from hubdiff.card import page
from hubdiff.progress import Progress, Silent

TEMPLATE = "backport_report.md"
TITLE, LABEL = "hubdiff: fine-tunes on new bases", "hubdiff"
MARK = "<!-- hubdiff:report"
ISSUE_CHARACTERS = 65_536
SUMMARY_BYTES = 1 << 20
_TRIES = 3
# How many rows, pictures and reasons are shown, less and less until all of it fits.
_MOST = (1000, 300, 100, 50, 25, 10, 5, 2, 1)
_PICTURES = 6
_NAME = 120  # characters
_RUN = re.compile(r"https?://[A-Za-z0-9.:-]+/[\w.-]+/[\w.-]+/actions/runs/\d{1,20}", re.ASCII)


@dataclass(frozen=True)
class Reported:
    """``text`` is the Markdown. ``action``: what became of the issue, created, updated or
    unchanged; None where none was asked for, or there was nothing to tell."""

    text: str
    summary: str | None
    issue: str | None
    action: str | None
    dry_run: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "summary": self.summary,
            "issue": self.issue,
            "action": self.action,
            "dry_run": self.dry_run,
        }


def report(
    plan: str | Path,
    results: str | Path,
    *,
    lock: str | Path = LOCK,
    summary: str | Path | None = None,
    issue: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Reported:
    """Tell people what became of the items of ``plan``.

    Args:
        results: the folder with one folder for each item.
        lock: what is known from before.
        summary: a file that the report is appended to, such as ``$GITHUB_STEP_SUMMARY``.
        issue: OWNER/REPO, where one issue is kept up to date, with ``GITHUB_TOKEN``. It is found by
            a mark in its text, opened where there is none, and opened again where it was closed
            and there is something new. It is left alone where nothing changed.
        dry_run: write nothing and ask nobody.

    Raises ``HubdiffError``; the summary is written before the issue.
    """
    planned = read_planned(Path(plan))
    outcomes = read_outcomes(planned, Path(results))
    fresh = [one.entry(now()) for one in outcomes]
    known = read_lock(lock)
    known = known.after(planned.document, merge_outcomes(known, fresh))
    view = _View(planned, outcomes, known)
    text = view.fitting(ISSUE_CHARACTERS, len)
    if dry_run:
        return Reported(text, None, None, None, True)
    if summary is not None:
        _append(Path(summary), view)
    if issue is None:
        return Reported(text, _shown(summary), None, None, False)
    action, url = _upsert(github.GitHub(issue), text, view.is_news, progress or Silent())
    return Reported(text, _shown(summary), url, action, False)


def _shown(summary: str | Path | None) -> str | None:
    return None if summary is None else str(summary)


def _append(summary: Path, view: _View) -> None:
    """GitHub drops a summary of more than 1 MiB, with all that other steps put there."""
    there = summary.stat().st_size if summary.exists() else 0
    room = SUMMARY_BYTES - there - 2
    text = view.fitting(min(room, SUMMARY_BYTES), lambda text: len(text.encode()))
    with summary.open("a", encoding="utf-8") as file:
        file.write(("\n" if there else "") + text)


# --- the issue ---


def _upsert(
    hub: github.GitHub, text: str, is_news: bool, progress: Progress
) -> tuple[str | None, str | None]:
    for attempt in range(_TRIES):
        found = _find(hub)
        if found is not None:
            return _update(hub, found, text, is_news)
        if not is_news:
            return None, None
        try:
            return "created", hub.create(TITLE, text, [LABEL]).url
        except github.Unavailable as error:
            # The issue may be there all the same: look for it before the next try.
            if attempt == _TRIES - 1:
                raise
            progress.note(f"{error}; looking again")
            time.sleep(github.WAIT_SECONDS * 2**attempt)
    raise AssertionError("the last try returns or raises")


def _find(hub: github.GitHub) -> github.Issue | None:
    """The oldest issue with the mark: among those with the label, which not everybody may give;
    else among all that were opened by somebody who could, for a label can be lost."""
    for label in (LABEL, None):
        found = [one for one in hub.issues(label=label) if one.body.startswith(MARK)]
        if label is None:
            found = [one for one in found if one.trusted]
        if found:
            return min(found, key=lambda one: one.number)
    return None


def _update(hub: github.GitHub, found: github.Issue, text: str, is_news: bool) -> tuple[str, str]:
    # GitHub gives line ends back as it got them from whoever edited last.
    old = found.body.replace("\r\n", "\n").strip()
    same_state = old.partition("\n")[0] == text.partition("\n")[0]
    if old == text.strip() or (same_state and not is_news):
        return "unchanged", found.url
    state = {"state": "open"} if found.state != "open" else {}
    return "updated", hub.change(found.number, body=text, **state).url


# --- what is told ---


@dataclass(frozen=True)
class _View:
    """All there is to tell, and how much of it is shown."""

    planned: Planned
    outcomes: Sequence[Outcome]
    known: Lock

    @property
    def is_news(self) -> bool:
        """Whether this run did anything."""
        return bool(self.outcomes)

    def fitting(self, most: int, size: Callable[[str], int]) -> str:
        """The report, with as much in it as ``most`` has room for."""
        for rows in _MOST:
            text = self.text(rows)
            if size(text) <= most:
                return text
        return f"{self._mark()}\n" if most > 200 else ""

    def text(self, rows: int) -> str:
        ported = [one for one in self.outcomes if one.status != ADOPTED]
        adopted = [one for one in self.outcomes if one.status == ADOPTED]
        pictures = [shown for one in ported if (shown := picture(one)) is not None]
        return page(
            TEMPLATE,
            mark=self._mark(),
            run=run_address(),
            headline=_headline(ported, adopted, self.planned),
            done=_limited([_done_row(one) for one in ported], rows),
            pictures=_limited(pictures, min(rows, _PICTURES)),
            needed=list(self._needed(rows)),
            skipped=_limited([(_code(b), _prose(w)) for b, w in self.planned.skipped], rows),
            families=_limited(list(_families(self.known, rows)), rows),
        )

    def _needed(self, most: int) -> Iterator[dict[str, Any]]:
        """What a person should look at, the newest first: from the lock, so that it stays until it
        is mended."""
        latest = sorted(_latest(self.known).values(), key=lambda one: str(one.get("at")))
        for status, advice in _ADVICE.items():
            found = [
                {
                    "what": _code(one.get("delta")),
                    "base": _base(one.get("base")),
                    "times": _times(one.get("attempts")) if status == FAILED else "",
                    "why": _prose(one.get("why") or "no reason was given"),
                    "run": _run_link(one.get("run")),
                }
                for one in reversed(latest)
                if one.get("status") == status
            ]
            if found:
                yield {"advice": advice, "items": _limited(found, most)}

    def _mark(self) -> str:
        """Hidden in the text: what finds the issue again, and tells whether it would say the same.
        The digest is of what is known, without when and where."""
        apart = ("at", "run")
        items = {
            key: {k: v for k, v in one.items() if k not in apart}
            for key, one in self.known.items.items()
        }
        state = json.dumps([items, self.planned.skipped], sort_keys=True)
        return f"{MARK} {hashlib.sha256(state.encode()).hexdigest()[:16]} -->"


_ADVICE = {
    FAILED: "**Failed.** It is tried again by itself a few times. Where it fails always alike, the "
    "log of the run says more; a larger `runner` helps where disk or memory ran out. After that it "
    "is tried again where `limits.attempts` is raised, or its settings in hubdiff.yaml are others.",
    REJECTED: "**Rejected.** It is left alone until its scales, tasks or gate in hubdiff.yaml are "
    "others.",
}


@dataclass(frozen=True)
class _Limited:
    shown: Sequence[Any]
    more: int


def _limited(values: Sequence[Any], most: int) -> _Limited:
    return _Limited(values[:most], max(0, len(values) - most))


def _headline(ported: Sequence[Outcome], adopted: Sequence[Outcome], planned: Planned) -> str:
    parts = []
    for status in (DONE, REJECTED, FAILED):
        if count := sum(one.status == status for one in ported):
            parts.append(f"{count} {status}")
    if adopted:
        parts.append(f"{len(adopted)} seen for the first time and left alone")
    waiting = planned.document.get("waiting")
    if isinstance(waiting, int) and waiting > 0:
        parts.append(f"{waiting} waiting for the next run")
    return ", ".join(parts) if parts else "nothing was to be done"


def _done_row(one: Outcome) -> dict[str, str]:
    check = one.result.get("check")
    verdict = check.get("verdict") if isinstance(check, dict) else None
    scores, task = one.result.get("scores"), one.item.gate.task
    sides = scores if isinstance(scores, dict) else {}
    return {
        "delta": _code(f"{one.item.family}/{one.item.delta}"),
        "base": _base(one.item.base),
        "direction": _known(one.item.direction, (RECYCLE, BACKPORT)),
        "verdict": _code(verdict) if verdict is not None else "–",
        "scale": _number(one.scale),
        "before": _score(entry(sides.get("base"), task)),
        "after": _score(entry(sides.get("result"), task)),
        "gate": _gate(one),
        "where": _where(one.output, one.item.publish.to),
    }


def _gate(one: Outcome) -> str:
    if one.numbers or one.status == DONE:
        return "passed" if one.status != REJECTED else "refused"
    return "–"


def _score(found: Mapping[str, Any]) -> str:
    value, error = number(found.get("value")), number(found.get("stderr"))
    return _number(value) + (f" ± {error:.2g}" if value is not None and error is not None else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _where(output: Any, to: object = None) -> str:
    """A link to where it is: the pull request, or else the commit."""
    if not isinstance(output, dict):
        return "–"
    for name, said in (("pr_url", "pull request"), ("url", "branch")):
        address = output.get(name)
        if _linkable(address, to):
            return f"[{said}]({address})"
    return "published"


def _linkable(address: object, to: object) -> bool:
    """Addresses in the lock were checked when they went in; whoever edits it may change them."""
    if not isinstance(address, str):
        return False
    if isinstance(to, str):
        return hub_address(address, to) is not None
    found = re.match(r"https?://[^/]+/([\w.-]+/[\w.-]+)(?:/|$)", address, re.ASCII)
    return found is not None and hub_address(address, found[1]) is not None


# --- what is known ---


def _latest(known: Lock) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The last word on each delta and base repo: the delta may have got a newer source, the base
    newer weights."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for _, one in sorted(known.items.items(), key=lambda pair: (str(pair[1].get("at")), pair[0])):
        found[str(one.get("delta")), str(one.get("base")).partition("@")[0]] = one
    return dict(
        sorted(found.items(), key=lambda pair: (_natural(pair[0][0]), _natural(pair[0][1])))
    )


def _families(known: Lock, most: int) -> Iterator[dict[str, Any]]:
    """For each family a table: a row for a base, a column for a delta."""
    latest = _latest(known)
    names: dict[str, None] = dict.fromkeys(delta.partition("/")[0] for delta, _ in latest)
    for name in names:
        here = {pair: one for pair, one in latest.items() if pair[0].partition("/")[0] == name}
        deltas = _limited(list(dict.fromkeys(delta for delta, _ in here)), most)
        bases = sorted({base for _, base in here}, key=_natural)
        rows = [
            [_code(base), *(_cell(here.get((delta, base))) for delta in deltas.shown)]
            for base in bases
        ]
        yield {
            "name": _code(name),
            "deltas": [_code(delta.partition("/")[2]) for delta in deltas.shown],
            "left_out": deltas.more,
            "rows": _limited(rows, most),
        }


def _natural(text: str) -> list[tuple[int, int, str]]:
    """An order in which 1.10 comes after 1.9."""
    parts = re.findall(r"\d{1,18}|\D+", text, re.ASCII)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _cell(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else _status(one)


def _status(one: Mapping[str, Any]) -> str:
    status = str(one.get("status"))
    if status == FAILED:
        return f"failed{_times(one.get('attempts'))}"
    if status != DONE:
        return _known(status, (ADOPTED, REJECTED))
    value = number(one.get("value"))
    shown = "" if value is None else f" {value:.4g}"
    where = _where(one.get("output"))
    return f"done{shown}" + ("" if where == "–" else f", {where}")


def _times(attempts: object) -> str:
    return f" {attempts} times" if isinstance(attempts, int) and 1 < attempts < 1000 else ""


def _run_link(address: object) -> str:
    sound = isinstance(address, str) and _RUN.fullmatch(address)
    return f" ([run]({address}))" if sound else ""


# --- words of others ---


def _code(value: object) -> str:
    """A name; GitHub looks for no mentions in code."""
    text = markdown.one_line(value if isinstance(value, str) else "unknown")
    return markdown.code(text if len(text) <= _NAME else f"{text[: _NAME - 1]}…")


def _known(value: str, ours: Sequence[str]) -> str:
    return value if value in ours else _code(value)


def _base(ref: object) -> str:
    repo, _, commit = words(ref).partition("@")
    return _code(f"{repo}@{commit[:7]}" if commit else repo)


# What GitHub makes links and notices of in plain text: people, issues, bare addresses.
_CALLS = re.compile(r"@|#(?=\d)|(?i:gh-(?=\d)|www\.|://)")


def _prose(value: object) -> str:
    """A reason: every character is shown, and none calls anybody."""
    text = markdown.text(words(value))
    return _CALLS.sub(lambda found: f"{found[0]}&#8203;", text)
