"""``hubdiff demo``: the whole journey on this machine, with a small family trained on the spot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session, printable
from hubdiff.cli._progress import Story

if TYPE_CHECKING:
    from hubdiff.demo import DemoResult


@click.command(
    "demo",
    short_help="See it work, on this machine alone.",
    cls=shared.Command,
    usage="[--keep DIR] [OPTIONS]",
    examples=("hubdiff demo", "hubdiff demo --keep ./demo"),
)
@click.option("--keep", metavar="DIR", help="Work in this folder and leave everything there.")
@shared.json_output
@pass_session
def command(session: Session, keep: str | None) -> None:
    """Train a small model, fine-tune it, and move the fine-tune to its next version.

    Runs a Hub of its own in a temporary folder: no account, no network, about a minute. Every
    command that it shows can be typed by hand.
    """
    from hubdiff.demo import demo

    session.require_one_process()
    session.if_stopped = "Stopped. Nothing outside the demo's own folder was touched."
    result = demo(Path(keep) if keep else None, progress=Story(sys.stderr, printable))
    session.show(result.as_json(), lambda page: _draw(page, result))


def _draw(page: Page, result: DemoResult) -> None:
    page.line()
    for line in result.lines():
        if line.startswith(" "):
            page.line(line)  # a row of a table
        else:
            page.prose(line)
