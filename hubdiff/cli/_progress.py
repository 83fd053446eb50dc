"""Progress on stderr: bars on a terminal, plain lines anywhere else.

``HF_HUB_DISABLE_PROGRESS_BARS=1``, which silences huggingface_hub, silences these too; notes are
still printed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from hubdiff.progress import Progress
from hubdiff.summary import size_text

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# A line for each tenth, none within a second of the last; and a sign of life in between.
_SHORTEST_GAP, _LONGEST_GAP = 1.0, 30.0
Clean = Callable[[str], str]


@contextmanager
def open_progress(stream: TextIO, clean: Clean) -> Iterator[Progress]:
    """The progress display that suits ``stream``. ``clean`` makes text safe to print."""
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Notes(stream, clean)
    elif stream.isatty() and os.environ.get("TERM") != "dumb":
        with _bars(stream) as bars:
            yield Bars(bars, clean)
    else:
        yield Lines(stream, clean)


class Notes:
    """Notes only."""

    def __init__(self, stream: TextIO, clean: Clean) -> None:
        self._stream, self._clean = stream, clean

    def start(self, what: str, total: int, unit: str = "") -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def _print(self, text: str) -> None:
        self._stream.write(self._clean(text) + "\n")
        self._stream.flush()


class Story(Notes):
    """Notes as they are: what happens is told by them alone."""

    def note(self, text: str) -> None:
        self._print(text)


class Lines(Notes):
    """A line when a phase starts and when it ends, and some between when it takes long."""

    def __init__(
        self, stream: TextIO, clean: Clean, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stream, clean)
        self._clock = clock

    def start(self, what: str, total: int, unit: str = "") -> None:
        self._what, self._total, self._done, self._tenths = what, total, 0, 0
        self._unit = unit
        self._began = self._last = self._clock()
        self._print(f"{what}: {_many(total, unit)}")

    def advance(self, count: int) -> None:
        self._done += count
        now = self._clock()
        tenths = 10 * self._done // self._total if self._total else 10
        waited = now - self._last
        next_tenth = self._tenths < tenths < 10 and waited >= _SHORTEST_GAP
        if next_tenth or waited >= _LONGEST_GAP:
            self._tenths, self._last = tenths, now
            rate = self._done / max(now - self._began, 1e-3)
            left = (self._total - self._done) / rate if rate else 0
            share = 100 * self._done / self._total if self._total else 100
            self._print(
                f"{self._what}: {share:.0f} %, {_part(self._done, self._total, self._unit)}, "
                f"{_rate(rate, self._unit)}, {left:.0f} s left"
            )

    def finish(self) -> None:
        took = self._clock() - self._began
        rate = _rate(self._done / max(took, 1e-3), self._unit)
        self._print(f"{self._what}: done, {_many(self._done, self._unit)} in {took:.1f} s ({rate})")


class Bars:
    """Bars drawn by rich; before the first phase, a sign that headers are being read."""

    def __init__(self, bars: RichProgress, clean: Clean) -> None:
        self._bars, self._clean = bars, clean
        self._task: TaskID | None = None
        self._waiting: TaskID | None = bars.add_task("reading headers", total=None)

    def start(self, what: str, total: int, unit: str = "") -> None:
        if self._waiting is not None:
            self._bars.remove_task(self._waiting)
            self._waiting = None
        self._task = self._bars.add_task(self._clean(what), total=total, unit=unit)

    def advance(self, count: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, count)

    def finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=self._bars.tasks[-1].completed)
            self._task = None

    def note(self, text: str) -> None:
        self._bars.console.print(f"note: {self._clean(text)}", highlight=False, markup=False)


@contextmanager
def _bars(stream: TextIO) -> Iterator[RichProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        """Bytes done, of how many, at what rate, and how long it will take."""

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            return Text(_amount(task), no_wrap=True)

    console = Console(file=stream, markup=False, emoji=False)
    bar = BarColumn(bar_width=12 if console.width < 100 else 30)
    columns: list[Any] = [TextColumn("{task.description}"), bar, Amount()]
    with Progress(*columns, console=console) as progress:
        try:
            yield progress
        finally:
            for task in progress.tasks:
                if task.total is None:
                    progress.remove_task(task.id)


def _amount(task: Any) -> str:
    if task.total is None:
        return ""
    unit = task.fields.get("unit", "")
    if task.finished:
        took = task.finished_time or 0.0
        rate = _rate(task.total / max(took, 1e-3), unit)
        return f"{_many(task.total, unit)} in {took:.1f} s, {rate}"
    rate = f", {_rate(task.speed, unit)}" if task.speed else ""
    left = task.time_remaining
    eta = f", {_clock(left)} left" if left is not None else ""
    return f"{_part(task.completed, task.total, unit)}{rate}{eta}"


def _part(done: float, total: float, unit: str) -> str:
    return f"{f'{done:,.0f}' if unit else size_text(done)} of {_many(total, unit)}"


def _many(count: float, unit: str) -> str:
    if not unit:
        return size_text(count)
    return f"{count:,.0f} {unit.removesuffix('s') if count == 1 else unit}"


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.1f} {unit}/s" if unit else f"{size_text(rate)}/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
