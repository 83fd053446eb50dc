"""``hubdiff push-delta``: compute Δ = tuned − base and publish it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, count, duration, pass_session
from hubdiff.refs import ModelRef
from hubdiff.summary import percent, size_text

if TYPE_CHECKING:
    from hubdiff.jobs.push import Pushed
    from hubdiff.manifest import Manifest


@click.command(
    "push-delta",
    short_help="Publish what a fine-tune changed.",
    cls=shared.Command,
    usage="TUNED REPO [--base BASE] [OPTIONS]",
    examples=(
        "hubdiff push-delta org/tuned me/tuned-delta --base org/base",
        "hubdiff push-delta ./checkpoint-900 me/tuned-delta --base org/base@v1 --private",
        "hubdiff push-delta ./tuned ./tuned-delta --base ./base",
    ),
)
@click.argument("tuned")
@click.argument("repo")
@click.option(
    "--base", metavar="BASE", help="What was fine-tuned. Default: base_model of the card."
)
@click.option("--plain", is_flag=True, help="Store dense tensors that any tool can read; larger.")
@click.option(
    "--tuned-master",
    metavar="REF",
    help="The same fine-tune in float32: a better Δ for other bases.",
)
@shared.filters("tensors")
@shared.private
@shared.pr
@click.option("--force", is_flag=True, help="Replace what stands at REPO.")
@shared.cache
@click.option("--dry-run", is_flag=True, help="Say what would be read and written; do neither.")
@shared.json_output
@pass_session
def command(session: Session, tuned: str, repo: str, **options: Any) -> None:
    """Compute Δ = TUNED − BASE and publish it as REPO, with a card.

    On its own base the delta rebuilds TUNED byte for byte; on another base it adds. REPO may be a
    path: then the same files are written into that folder and nothing is published.
    """
    if ModelRef.parse(repo).path is not None and (options["pr"] or options["private"]):
        raise click.UsageError("--pr and --private need a repo on the Hub, REPO is a folder")

    from hubdiff.jobs.push import push_delta

    with session.working_together(if_stopped=_if_stopped(repo)) as (progress, ranks):
        pushed = push_delta(tuned, repo, **options, progress=progress, ranks=ranks)
        for note in _notes(pushed.manifest) if pushed.manifest else ():
            progress.note(note)
        if options["pr"] and not pushed.dry_run and pushed.pr_url is None:
            progress.note(f"{pushed.where} {shared.NO_PR}")
    session.show(pushed.as_json(), lambda page: _draw(page, pushed))


def _if_stopped(repo: str) -> str:
    said = f"Stopped. Nothing was published at {repo}"
    if ModelRef.parse(repo).path is not None:
        return f"{said}, nothing is left behind."
    # It is made at the start, where no right to make one is said before the work.
    return f"{said}; a repo that is new stays there, empty."


def _notes(manifest: Manifest) -> list[str]:
    """What the delta can't do that its author may count on."""
    notes = []
    if manifest.partial:
        notes.append(
            "made with --include or --exclude: it can be added to a base, but can't rebuild "
            f"{manifest.tuned.name}"
        )
    if manifest.not_portable_reason:
        notes.append(f"good for its own base only: {manifest.not_portable_reason}")
    if manifest.not_carried:
        files = count(len(manifest.not_carried), "file")
        size = size_text(sum(file.size for file in manifest.not_carried))
        notes.append(f"{files} of {manifest.tuned.name} not carried ({size}); inspect lists them")
    return notes


def _draw(page: Page, pushed: Pushed) -> None:
    if pushed.dry_run:
        reads = size_text(pushed.tuned_bytes + pushed.base_bytes)
        page.line(
            f"Would make a delta at {pushed.where}; no weights were read, nothing was written."
        )
        page.fields(
            [
                ("tuned", f"{pushed.tuned} ({size_text(pushed.tuned_bytes)})"),
                ("base", f"{pushed.base} ({size_text(pushed.base_bytes)})"),
                ("reads", reads),
            ]
        )
        return
    from hubdiff.jobs.inspect import Inspection

    assert pushed.manifest is not None
    summary = Inspection(pushed.where, pushed.manifest).summary
    share = f", {percent(summary.size_share)} of" if summary.size_share is not None else " for"
    rate = (pushed.tuned_bytes + pushed.base_bytes) / max(pushed.seconds, 1e-3)
    encodings = ", ".join(f"{name} {size_text(n)}" for name, n in summary.encodings.items())
    page.fields(
        [
            ("delta", pushed.where),
            (
                "size",
                f"{size_text(summary.delta_bytes)}{share} the model's "
                f"{size_text(summary.tuned_bytes)}",
            ),
            ("encodings", encodings),
            ("base", pushed.base),
            ("tuned", pushed.tuned),
            ("time", f"{duration(pushed.seconds)}, reading {size_text(rate)}/s"),
            ("commit", pushed.url),
            ("pull request", pushed.pr_url),
        ]
    )
    page.heading("Use it")
    page.line(
        f"  hubdiff apply {shlex.quote(pushed.where)} --to {shlex.quote(pushed.base)} --output DIR"
    )
