"""``hubdiff demo``: the whole journey on this machine, with a small family trained on the spot."""

from __future__ import annotations

from pathlib import Path

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Session, pass_session


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

    Runs a Hub of its own in a temporary folder: no account, no network, about two minutes.
    """
    from hubdiff.demo import demo

    with session.working(if_stopped="Stopped. Nothing outside the demo's folder was touched.") as p:
        result = demo(Path(keep) if keep else None, progress=p)
    session.show(result.as_json(), lambda page: page.line(str(result)))
