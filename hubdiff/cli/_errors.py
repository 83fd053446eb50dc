"""The one table: what an error means for the exit code, and what is said about it.

Messages go to stderr; with --json stdout gets ``{"error": {"type", "message", "next_step"}}`` too.
Of several ranks, the one that failed says what went wrong, the others that it did; rank 0 speaks
for all where all would say the same, and on stdout, with the ``cause`` where another rank failed.
An error that hubdiff did not foresee is a bug of its own. Its traceback is kept in a file, since
the work that led to it may have taken hours and nobody wants to repeat it for a bug report.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from hubdiff.cli._output import Session, print_json, printable, styled, terminal_width, wrapped
from hubdiff.errors import HubdiffError, RankLost


@dataclass(frozen=True)
class Said:
    """An error in words. ``usage`` is printed before it; ``calm`` ones are not called errors.
    ``common``: all ranks would say the same."""

    message: str
    next_step: str | None = None
    usage: str | None = None
    calm: bool = False
    common: bool = False


def _foreseen(error: HubdiffError, session: Session) -> Said:
    return Said(str(error), error.next_step)


def _lost(error: RankLost, session: Session) -> Said:
    return Said(str(error), None if session.rank else error.next_step)


def _usage(error: click.ClickException, session: Session) -> Said:
    ctx = getattr(error, "ctx", None)
    return Said(
        error.format_message(),
        f"See {ctx.command_path} --help." if ctx else None,
        usage=ctx.get_usage() if ctx else None,
        common=True,
    )


def _help(error: click.ClickException, session: Session) -> Said:
    """No arguments at all: what is missing is the help itself."""
    return Said(error.format_message(), calm=True, common=True)


def _stopped(error: BaseException, session: Session) -> Said:
    return Said(session.if_stopped, calm=True, common=True)


def _system(error: OSError, session: Session) -> Said:
    return Said(
        f"{error.filename}: {error.strerror}" if error.filename else str(error),
        "Check that the file is there and that you may read and write it.",
    )


def _bug(error: Exception, session: Session) -> Said:
    details = "".join(traceback.format_exception(error))
    kept = None if os.environ.get("HUBDIFF_DEBUG") == "1" else _keep(details)
    if kept is None:
        click.echo(details, err=True)
    where = f"in {kept} (HUBDIFF_DEBUG=1 prints it)" if kept else "above"
    return Said(
        f"hubdiff failed in a way it should not: {type(error).__name__}: {error}",
        f"Please report it; the traceback is {where}.",
    )


def _keep(details: str) -> str | None:
    """The file that ``details`` are in now; None when no file can be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="hubdiff-traceback-", suffix=".txt", delete=False
        ) as file:
            file.write(details)
    except OSError:
        return None
    return file.name


@dataclass(frozen=True)
class Row:
    errors: tuple[type[BaseException], ...]
    exit_code: int
    words: Callable[..., Said]


# The first row that fits speaks.
TABLE = (
    Row((RankLost,), 1, _lost),
    Row((HubdiffError,), 1, _foreseen),
    Row((click.exceptions.NoArgsIsHelpError,), 2, _help),
    Row((click.ClickException,), 2, _usage),
    Row((KeyboardInterrupt, click.Abort), 130, _stopped),
    Row((OSError,), 1, _system),
    Row((Exception,), 1, _bug),
)


def speak(error: BaseException, session: Session) -> int:
    """Say it; returns the exit code."""
    row = next(row for row in TABLE if isinstance(error, row.errors))
    said = row.words(error, session)
    if not (said.common and session.rank):
        who = f"rank {session.rank}: " if session.several and not said.common else ""
        _print(said, who)
    if session.json and not session.rank:
        kind = "Stopped" if row.exit_code == 130 else type(error).__name__
        described: dict[str, Any] = {"type": kind, "message": said.message}
        described["next_step"] = said.next_step
        if isinstance(error, RankLost):
            described["cause"] = error.cause
        print_json({"error": described})
    return row.exit_code


def _print(said: Said, who: str) -> None:
    if said.usage:
        click.echo(said.usage, err=True)
    _paragraph(who + ("" if said.calm else "error: "), said.message, fg="red", bold=True)
    if said.next_step:
        _paragraph("next: ", said.next_step, bold=True)


def _paragraph(label: str, text: str, **style: Any) -> None:
    """A styled label, and text that keeps its own line breaks."""
    width = terminal_width(sys.stderr)
    lines = [
        part
        for line in text.splitlines() or [""]
        for part in wrapped(printable(line), width, len(label))
    ]
    click.echo((styled(label, sys.stderr, **style) if label else "") + "\n".join(lines), err=True)
