"""``hubdiff export``: a delta as an adapter that PEFT loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, count, pass_session
from hubdiff.summary import percent, size_text

if TYPE_CHECKING:
    from hubdiff.jobs.export import Exported


@click.command(
    "export",
    short_help="Write a delta as a PEFT adapter.",
    cls=shared.Command,
    usage="DELTA --as peft --output DIR [OPTIONS]",
    examples=(
        "hubdiff export me/tuned-delta --as peft --output ./adapter",
        "hubdiff export ./adapter-delta --as peft --output ./adapter --base ./base",
    ),
)
@click.argument("delta")
@click.option("--as", "format", required=True, metavar="peft", help="The format; peft is the one.")
@click.option("--output", required=True, metavar="DIR", help="The folder to write.")
@click.option(
    "--base", metavar="BASE", help="The base, if needed. Default: the one that DELTA names."
)
@click.option("--force", is_flag=True, help="Replace what stands at DIR.")
@shared.cache
@shared.json_output
@pass_session
def command(
    session: Session,
    delta: str,
    format: str,
    output: str,
    base: str | None,
    force: bool,
    cache: bool,
) -> None:
    """Write DELTA as an adapter that PEFT loads.

    A delta made from an adapter gives that adapter back, byte for byte; the base is read only if
    the adapter has whole tensors. One made with --rank or --energy gives a new adapter of its
    factors; what can't be in an adapter is listed with its share of the change.
    """
    from hubdiff.jobs.export import export

    stopped = f"Stopped. {output} is as it was, nothing is left behind."
    with session.working(if_stopped=stopped) as progress:
        exported = export(
            delta, output, format=format, base=base, force=force, cache=cache, progress=progress
        )
        for note in exported.notes:
            progress.note(note)
        if exported.left_out:
            share = sum(left.share for left in exported.left_out)
            tensors = count(len(exported.left_out), "tensor")
            progress.note(f"{tensors} not in the adapter, with {percent(share)} of ‖Δ‖²")
    session.show(exported.as_json(), lambda page: _draw(page, exported))


def _draw(page: Page, exported: Exported) -> None:
    files = ", ".join(f"{f.path} ({size_text(f.size)})" for f in exported.files)
    same = "the adapter that the delta was made from, byte for byte"
    page.fields(
        [
            ("written", exported.where),
            ("files", files),
            ("modules", f"{exported.modules:,} with factors"),
            ("is", same if exported.same_files else None),
        ]
    )
    if exported.left_out:
        page.heading(f"Changed and not in the adapter ({len(exported.left_out):,})")
        page.items([f"{o.name}: {percent(o.share)} of ‖Δ‖², {o.reason}" for o in exported.left_out])
