"""``hubdiff alias``: a name that moves for a delta on the Hub."""

from __future__ import annotations

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Session, pass_session


@click.command(
    "alias",
    short_help="Let a name stand for a commit of a delta.",
    cls=shared.Command,
    usage="DELTA NAME [OPTIONS]",
    examples=(
        "hubdiff alias me/tuned-delta@v1.2 production",
        "hubdiff alias me/tuned-delta@v1.3 production --move",
        "hubdiff alias me/tuned-delta production --remove",
        "hubdiff apply me/tuned-delta@production --to org/base --output ./tuned",
    ),
)
@click.argument("delta")
@click.argument("name")
@click.option("--move", is_flag=True, help="It may stand for another commit already.")
@click.option("--remove", is_flag=True, help="Take the alias away.")
@shared.json_output
@pass_session
def command(session: Session, delta: str, name: str, move: bool, remove: bool) -> None:
    """Let NAME stand for the commit that DELTA stands for: DELTA@NAME, wherever a ref is accepted.

    An alias is a tag of the Hub, so nobody commits to it by mistake, and it moves with --move only.
    """
    if move and remove:
        raise click.UsageError("give one of --move and --remove")
    from hubdiff.jobs.pointers import alias

    with session.working():
        pointer = alias(delta, name, move=move, remove=remove)
    if pointer.removed:
        said = f"is gone; it was {pointer.before}"
    elif pointer.before in (None, pointer.commit):
        said = pointer.commit
    else:
        said = f"{pointer.commit}, was {pointer.before}"
    session.show(pointer.as_json(), lambda page: page.fields([(pointer.ref, said)]))
