"""``hubdiff search``: deltas on the Hub by words."""

from __future__ import annotations

import click

from hubdiff.cli import _command as shared
from hubdiff.cli import list_deltas as listing
from hubdiff.cli._output import Session, pass_session


@click.command(
    "search",
    short_help="Search deltas on the Hub.",
    cls=shared.Command,
    usage="WORDS... [OPTIONS]",
    examples=("hubdiff search smollm2", "hubdiff search llama math apache-2.0 --json"),
)
@click.argument("words", nargs=-1, required=True)
@listing.limit
@shared.json_output
@pass_session
def command(session: Session, words: tuple[str, ...], limit: int) -> None:
    """Search the deltas on the Hub: every one of WORDS stands in the name, the base, the tags, the
    languages or the licence."""
    from hubdiff.jobs.registry import search

    with session.working():
        found = search(words, limit=limit)
    session.show(found.as_json(), lambda page: listing.draw(page, found))
