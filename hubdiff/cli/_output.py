"""What a command says and where: results on stdout for people or as JSON, notes on stderr.

``Session`` is one run of the command line. Text from repos (names, reasons, messages) is printed
without its control characters: a tensor can be called anything, also something that repaints a
terminal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import click

from hubdiff.cli._progress import open_progress
from hubdiff.memory import keep_freed_memory, upload_in_small_blocks
from hubdiff.progress import Progress, Silent
from hubdiff.ranks import Ranks, join, launched, launched_rank

NOTHING_LOST = "Stopped."
_MOST_LISTED = 8


class Session:
    """``command`` is the command line as typed, ``if_stopped`` what Ctrl-C would mean just now. Of
    several processes that torchrun started, the one of ``rank`` 0 speaks for all."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.command = ("hubdiff", *arguments)
        self.json = "--json" in arguments
        self.if_stopped = NOTHING_LOST
        self.rank, self.several = launched_rank(), launched() > 1

    @contextmanager
    def working(self, *, if_stopped: str = NOTHING_LOST) -> Iterator[Progress]:
        """Shows progress on stderr for as long as the block runs, in one process."""
        self.require_one_process()
        with self._progress(if_stopped) as progress:
            yield progress

    @contextmanager
    def working_launched(self, *, if_stopped: str) -> Iterator[Progress]:
        """As ``working``, also in the processes of a launcher that the work itself meets by
        (accelerate); the first shows the progress."""
        with self._progress(if_stopped) as progress:
            yield progress

    def require_one_process(self) -> None:
        """Refuse torchrun for work that is not shared."""
        if self.several:
            raise click.UsageError(
                "torchrun started several processes, and this command runs in one: run it without "
                "torchrun, or inside a torchrun job with TORCHELASTIC_RUN_ID unset"
            )

    @contextmanager
    def working_together(self, *, if_stopped: str) -> Iterator[tuple[Progress, Ranks]]:
        """As ``working``, with the ranks that share the work; rank 0 shows the progress of its own
        share."""
        with self._progress(if_stopped) as progress, join() as ranks:
            yield progress, ranks

    @contextmanager
    def _progress(self, if_stopped: str) -> Iterator[Progress]:
        self.if_stopped = if_stopped
        keep_freed_memory()
        upload_in_small_blocks()
        if self.rank:
            yield Silent()
        else:
            with open_progress(sys.stderr, printable) as progress:
                yield progress
        self.if_stopped = NOTHING_LOST

    def show(self, document: dict[str, Any], draw: Callable[[Page], None]) -> None:
        """The result of a command: ``document`` with --json, else what ``draw`` puts on a page."""
        if self.rank:
            return
        if self.json:
            print_json(document)
        else:
            draw(Page(sys.stdout))
        sys.stdout.flush()  # here, where a closed pipe is still handled


pass_session = click.make_pass_decorator(Session)


def print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2))


def printable(text: str) -> str:
    """``text`` with control and other invisible characters shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def styled(text: str, stream: TextIO, **style: Any) -> str:
    """``text`` in colour, where there is colour."""
    colour = stream.isatty() and not os.environ.get("NO_COLOR")
    return click.style(text, **style) if colour else text


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal; None when ``stream`` is a pipe or a file."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def wrapped(text: str, width: int | None, indent: int) -> list[str]:
    """``text`` in lines that leave room for ``indent``. Words, so names and paths, stay whole."""
    if width is None:
        return [text]
    room = max(20, width - indent)
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]


class Page:
    """Text for people. On a terminal prose is wrapped to its width; names, paths and commands are
    never broken, so they can be copied. Nothing is wrapped or cut in a pipe or a file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.width = stream, terminal_width(stream)

    def line(self, text: str = "") -> None:
        self._stream.write(printable(text) + "\n")

    def prose(self, text: str) -> None:
        for line in wrapped(printable(text), self.width, 0):
            self._stream.write(line + "\n")

    def heading(self, text: str) -> None:
        self._stream.write("\n" + styled(printable(text), self._stream, bold=True) + "\n")

    def fields(self, fields: Iterable[tuple[str, str | None]]) -> None:
        """Label and value, one a line; those without a value are left out."""
        known = [(label, printable(value)) for label, value in fields if value]
        width = max((len(label) for label, _ in known), default=0) + 2
        for label, value in known:
            first, *rest = wrapped(value, self.width, width)
            self._stream.write(styled(f"{label:{width}}", self._stream, dim=True) + first + "\n")
            self._stream.writelines(f"{'':{width}}{text}\n" for text in rest)

    def items(self, texts: Sequence[str], *, most: int = _MOST_LISTED) -> None:
        """A list; what goes beyond ``most`` is counted."""
        shown = texts if len(texts) <= most + 1 else texts[:most]
        for text in shown:
            first, *rest = wrapped(printable(text), self.width, 4)
            self._stream.write(f"  {first}\n")
            self._stream.writelines(f"    {line}\n" for line in rest)
        if len(shown) < len(texts):
            self.line(f"  … and {len(texts) - len(shown)} more (--json lists all)")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """The first column is text and folds when there is no room; the others are aligned right.
        A column called "" has no heading and is aligned left."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for i, name in enumerate(columns):
            left = i == 0 or not name
            table.add_column(
                name,
                justify="left" if left else "right",
                no_wrap=i > 0,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(printable(cell) for cell in row))
        # In a pipe there is no width to keep to; rich would assume 80 columns.
        console = Console(file=self._stream, width=self.width or 10_000, markup=False, emoji=False)
        with console.capture() as captured:
            console.print(table, highlight=False)
        self._stream.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """``0.8 s``, ``42 s``, ``3 min 5 s``, ``2 h 4 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
