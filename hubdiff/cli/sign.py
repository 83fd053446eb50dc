"""``hubdiff sign``: a signature for a delta."""

from __future__ import annotations

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Session, pass_session


@click.command(
    "sign",
    short_help="Sign a delta.",
    cls=shared.Command,
    usage="DELTA [OPTIONS]",
    examples=(
        "hubdiff sign ./tuned-delta --key signing.pem",
        "hubdiff sign me/tuned-delta",
        "hubdiff verify me/tuned-delta --key signing.pub",
        "hubdiff verify me/tuned-delta --signed-by me@example.org",
    ),
)
@click.argument("delta")
@click.option(
    "--key",
    metavar="FILE",
    help="Your private key, a PEM file (P-256, P-384 or P-521). Default: keyless, by Sigstore.",
)
@shared.json_output
@pass_session
def command(session: Session, delta: str, key: str | None) -> None:
    """Sign DELTA: the manifest, which names every layer by its hash, by OpenSSF's model-signing.

    Without --key Sigstore asks who you are in a browser (in CI it takes the workflow's identity),
    and records the signature publicly. A key's password is read from HUBDIFF_KEY_PASSWORD. Needs
    pip install "hubdiff[sign]".
    """
    from hubdiff.jobs.sign import sign

    with session.working():
        signed = sign(delta, key=key)
    session.show(
        signed.as_json(),
        lambda page: page.fields(
            [("signed", signed.where), ("by", signed.by), ("commit", signed.url)]
        ),
    )
