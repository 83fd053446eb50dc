"""``hubdiff unpack``: a delta as dense tensors that any tool can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, count, pass_session
from hubdiff.summary import size_text

if TYPE_CHECKING:
    from hubdiff.jobs.unpack import Unpacked


@click.command(
    "unpack",
    short_help="Write a delta as dense safetensors.",
    cls=shared.Command,
    usage="DELTA --output DIR [OPTIONS]",
    examples=("hubdiff unpack me/tuned-delta --output ./dense",),
)
@click.argument("delta")
@click.option("--output", required=True, metavar="DIR", help="The folder to write.")
@click.option("--force", is_flag=True, help="Replace what stands at DIR.")
@shared.cache
@shared.json_output
@pass_session
def command(session: Session, delta: str, output: str, force: bool, cache: bool) -> None:
    """Write DELTA as plain safetensors: Δ of every tensor that changed, dense, in bf16, fp16 or
    fp32."""
    from hubdiff.jobs.unpack import unpack

    stopped = f"Stopped. {output} is as it was, nothing is left behind."
    with session.working(if_stopped=stopped) as progress:
        unpacked = unpack(delta, output, force=force, cache=cache, progress=progress)
    session.show(unpacked.as_json(), lambda page: _draw(page, unpacked))


def _draw(page: Page, unpacked: Unpacked) -> None:
    page.fields(
        [
            ("written", unpacked.where),
            ("files", ", ".join(f"{f.path} ({size_text(f.size)})" for f in unpacked.files)),
            (
                "tensors",
                f"{count(unpacked.tensors, 'tensor')}; {unpacked.unchanged:,} unchanged, left out",
            ),
        ]
    )
