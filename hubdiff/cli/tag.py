"""``hubdiff tag``: a version for a delta on the Hub."""

from __future__ import annotations

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Session, pass_session


@click.command(
    "tag",
    short_help="Give a delta on the Hub a version.",
    cls=shared.Command,
    usage="DELTA VERSION [OPTIONS]",
    examples=(
        "hubdiff tag me/tuned-delta v1.2",
        "hubdiff tag me/tuned-delta@7fd1a60 v1.1 --message 'the one of the paper'",
    ),
)
@click.argument("delta")
@click.argument("version")
@click.option("--message", metavar="TEXT", help="What is new in it.")
@shared.json_output
@pass_session
def command(session: Session, delta: str, version: str, message: str | None) -> None:
    """Give the commit that DELTA stands for a VERSION, a tag of the Hub that never moves.

    From then on DELTA@VERSION is that commit, wherever a ref is accepted.
    """
    from hubdiff.jobs.pointers import tag

    with session.working():
        pointer = tag(delta, version, message=message)
    said = "was there already" if pointer.before else "is new"
    session.show(
        pointer.as_json(),
        lambda page: page.fields([(pointer.ref, f"{pointer.commit}, {said}")]),
    )
