"""``hubdiff list``: the deltas on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session
from hubdiff.summary import percent, size_text

if TYPE_CHECKING:
    from hubdiff.jobs.registry import Entry, Listing

limit = click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    metavar="N",
    help="This many at most. Default: 50.",
)


@click.command(
    "list",
    short_help="List deltas on the Hub.",
    cls=shared.Command,
    usage="[OPTIONS]",
    examples=("hubdiff list --base org/base", "hubdiff list --author me --json"),
)
@click.option("--base", metavar="REPO", help="Only deltas of this base.")
@click.option("--author", metavar="NAME", help="Only those of this user or organisation.")
@limit
@shared.json_output
@pass_session
def command(session: Session, base: str | None, author: str | None, limit: int) -> None:
    """List the deltas on the Hub, the last modified first: what they are made of, and their sizes
    against the model's."""
    from hubdiff.jobs.registry import list_deltas

    with session.working():
        found = list_deltas(base=base, author=author, limit=limit)
    session.show(found.as_json(), lambda page: draw(page, found))


def draw(page: Page, found: Listing) -> None:
    if not found.entries:
        page.line("No delta was found.")
        return
    page.table(
        ["delta", "base", "size", "of tuned", "‖Δ‖/‖base‖", "licence", "modified"],
        [_row(entry) for entry in found.entries],
    )
    problems = [f"{e.repo}: {e.problem}" for e in found.entries if e.problem]
    if problems:
        page.heading("Not readable as a delta")
        page.items(problems)
    if found.more:
        page.line()
        page.line("There are more: raise --limit.")


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        entry.repo,
        (entry.base or "–").partition("@")[0],
        "–" if entry.size is None else size_text(entry.size),
        "–" if entry.size_share is None else percent(entry.size_share),
        "–" if entry.relative_norm is None else percent(entry.relative_norm),
        entry.licence or "–",
        entry.modified or "–",
    )
