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
        "hubdiff push-delta me/lora-adapter me/lora-delta",
        "hubdiff push-delta org/tuned me/tuned-r64 --base org/base --rank 64",
    ),
)
@click.argument("tuned")
@click.argument("repo")
@click.option(
    "--base",
    metavar="BASE",
    help="What was fine-tuned. Default: base_model of the card, or the base an adapter names.",
)
@click.option("--plain", is_flag=True, help="Store dense tensors that any tool can read; larger.")
@click.option(
    "--tuned-master",
    metavar="REF",
    help="The same fine-tune in float32: a better Δ for other bases.",
)
@click.option(
    "--rank",
    metavar="R",
    type=click.IntRange(1),
    help="Lossy: matrices as factors of rank R, where that is smaller.",
)
@click.option(
    "--energy",
    metavar="E",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Lossy: matrices as factors that hold this share of each ‖Δ‖², such as 0.9.",
)
@shared.filters("tensors")
@shared.private
@shared.public
@shared.pr
@click.option(
    "--force",
    is_flag=True,
    help="Replace what stands at REPO; publish a delta that is hardly smaller.",
)
@shared.cache
@click.option("--dry-run", is_flag=True, help="Say what would be read and written; do neither.")
@shared.json_output
@pass_session
def command(session: Session, tuned: str, repo: str, **options: Any) -> None:
    """Compute Δ = TUNED − BASE and publish it as REPO, with a card.

    On its own base the delta rebuilds TUNED byte for byte; on another base it adds. REPO may be a
    path: then the same files are written into that folder and nothing is published.

    TUNED may be a LoRA adapter of PEFT: its factors are kept as they are, and export gives the
    adapter back. With --rank or --energy the delta is a truncated SVD instead: it adds, with the
    error that is printed, and rebuilds nothing; one whole matrix of Δ is in memory at a time.
    """
    if sum(bool(options[name]) for name in ("rank", "energy", "plain")) > 1:
        raise click.UsageError("--rank, --energy and --plain exclude each other")
    hub_only = ("pr", "private", "public")
    if ModelRef.parse(repo).path is not None and any(options[name] for name in hub_only):
        raise click.UsageError("--pr, --private and --public need a repo, REPO is a folder")
    if options["private"] and options["public"]:
        raise click.UsageError("give one of --private and --public")

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
    if manifest.lossy:
        notes.append(
            f"lossy, {percent(manifest.lossy.error)} of Δ is missing (‖Δ − stored‖/‖Δ‖): it can be "
            f"added to a base, but can't rebuild {manifest.tuned.name}"
        )
    if manifest.adapter:
        notes.append(
            "made from an adapter: apply adds it to any base, its own too; hubdiff export gives "
            "the adapter back"
        )
    if manifest.not_portable_reason:
        notes.append(f"good for its own base only: {manifest.not_portable_reason}")
    if manifest.not_carried:
        files = count(len(manifest.not_carried), "file")
        size = size_text(sum(file.size for file in manifest.not_carried))
        notes.append(f"{files} of {manifest.tuned.name} not carried ({size}); inspect lists them")
    return notes


def _error(manifest: Manifest) -> str | None:
    if manifest.lossy is None:
        return None
    return f"{percent(manifest.lossy.error)}, measured as ‖Δ − stored‖/‖Δ‖"


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
                f"{size_text(summary.delta_bytes)}{share} "
                f"the {'adapter' if pushed.manifest.adapter else 'model'}'s "
                f"{size_text(summary.tuned_bytes)}",
            ),
            ("encodings", encodings),
            ("error", _error(pushed.manifest)),
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
