"""``hubdiff verify``: every hash of a delta, and with both sides every bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, count, pass_session

if TYPE_CHECKING:
    from hubdiff.jobs.verify import Verified


@click.command(
    "verify",
    short_help="Check every hash; with both sides, every bit.",
    cls=shared.Command,
    usage="DELTA [--base BASE] [--tuned TUNED] [OPTIONS]",
    examples=(
        "hubdiff verify me/tuned-delta",
        "hubdiff verify me/tuned-delta --base org/base --tuned org/tuned",
    ),
)
@click.argument("delta")
@click.option("--base", metavar="BASE", help="Also rebuild every file of tuned, in memory.")
@click.option("--tuned", metavar="TUNED", help="Also compare with the files of this model.")
@shared.cache
@shared.json_output
@pass_session
def command(session: Session, delta: str, base: str | None, tuned: str | None, cache: bool) -> None:
    """Check DELTA: the hash of every file and every tensor.

    With --base the tuned model is rebuilt in memory and compared with its recorded hashes; with
    --tuned too, that proves it equal to TUNED in every bit. Exit code 1 when anything is wrong.
    """
    from hubdiff.jobs.verify import verify

    with session.working() as progress:
        verified = verify(delta, base=base, tuned=tuned, cache=cache, progress=progress)
    session.show(verified.as_json(), lambda page: _draw(page, delta, verified))


def _draw(page: Page, delta: str, verified: Verified) -> None:
    page.line(f"{delta} is whole.")
    page.items(_findings(verified), most=10)


def _findings(verified: Verified) -> list[str]:
    files, tensors = count(verified.files, "file"), count(verified.tensors, "tensor")
    found = [
        f"{files} of the delta: every sha256 is right",
        f"{tensors} decoded: every hash is right",
    ]
    if verified.base_tensors is not None:
        found.append(f"{count(verified.base_tensors, 'tensor')} of the base: every hash is right")
    if verified.rebuilt is not None:
        found.append(f"{count(verified.rebuilt, 'file')} of tuned rebuilt: every sha256 is right")
    if verified.tuned_files is not None:
        files = count(verified.tuned_files, "file")
        found.append(f"{files} of the model given with --tuned: those the delta was made from")
    if verified.why:
        found.append(f"not rebuilt: {verified.why}")
    return found
