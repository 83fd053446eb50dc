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
        "hubdiff verify me/tuned-delta --chain",
        "hubdiff verify me/tuned-delta --key signing.pub",
    ),
)
@click.argument("delta")
@click.option("--base", metavar="BASE", help="Also rebuild every file of tuned, in memory.")
@click.option("--tuned", metavar="TUNED", help="Also compare with the files of this model.")
@click.option("--chain", is_flag=True, help="Also follow and check every pin, back to the start.")
@shared.trust
@shared.cache
@shared.json_output
@pass_session
def command(
    session: Session,
    delta: str,
    base: str | None,
    tuned: str | None,
    chain: bool,
    key: str | None,
    signed_by: str | None,
    issuer: str | None,
    cache: bool,
) -> None:
    """Check DELTA: the hash of every file and every tensor.

    With --base the tuned model is rebuilt in memory and compared with its recorded hashes; with
    --tuned too, that proves it equal to TUNED in every bit. With --key or --signed-by the delta
    must carry that signature. Exit code 1 when anything is wrong.
    """
    if (key is not None and signed_by is not None) or (issuer and signed_by is None):
        raise click.UsageError("give one of --key and --signed-by; --issuer goes with the latter")
    from hubdiff.jobs.verify import verify
    from hubdiff.signing import Trust

    signature = Trust.of(key, signed_by, issuer) if key or signed_by else None
    with session.working() as progress:
        verified = verify(
            delta,
            base=base,
            tuned=tuned,
            chain=chain,
            signature=signature,
            cache=cache,
            progress=progress,
        )
    session.show(verified.as_json(), lambda page: _draw(page, delta, verified))


def _draw(page: Page, delta: str, verified: Verified) -> None:
    page.line(f"{delta} is whole.")
    page.items(_findings(verified), most=40)


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
    if verified.sampled is not None:
        found.append(f"the sample: {verified.sampled:,} values are the base's")
    if verified.signed_by:
        found.append(f"signed by {verified.signed_by}")
    for link in verified.chain or ():
        end = f"; {link.end}" if link.end else ""
        files = count(link.files, "file")
        found.append(f"{link.made} was made from {link.origin}: {files} as recorded{end}")
    if verified.why:
        found.append(f"not rebuilt: {verified.why}")
    return found
