"""``hubdiff apply``: a delta onto a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, count, duration, pass_session
from hubdiff.summary import size_text

if TYPE_CHECKING:
    from hubdiff.jobs.apply import Applied


@click.command(
    "apply",
    short_help="Put a delta on a model: its own base or another.",
    cls=shared.Command,
    usage="DELTA --to TARGET (--output DIR | --push-to REPO) [OPTIONS]",
    examples=(
        "hubdiff apply me/tuned-delta --to org/base --output ./tuned",
        "hubdiff apply me/tuned-delta --to org/base-v2 --push-to me/tuned-v2",
        "hubdiff apply me/tuned-delta --to org/base-v2 --output ./half --scale 0.5",
        "hubdiff apply me/tuned-delta --to org/base-v2 --output ./tuned-v2 --dry-run",
    ),
)
@click.argument("delta")
@click.option("--to", required=True, metavar="TARGET", help="The model to put it on.")
@click.option("--output", metavar="DIR", help="Write the result into this folder.")
@click.option("--push-to", metavar="REPO", help="Publish the result as this repo on the Hub.")
@click.option(
    "--scale", type=shared.Scale(), default=1.0, metavar="A", help="Add A · Δ. Default: 1."
)
@click.option(
    "--device",
    default="auto",
    metavar="DEVICE",
    help="auto, cpu, cuda, cuda:N or mps. Default: auto.",
)
@shared.filters("tensors")
@shared.private
@shared.pr
@click.option("--force", is_flag=True, help="Replace what stands at DIR or REPO.")
@shared.cache
@click.option("--dry-run", is_flag=True, help="Print the plan; read no weights, write nothing.")
@shared.json_output
@pass_session
def command(session: Session, delta: str, **options: Any) -> None:
    """Put DELTA on TARGET.

    On the delta's own base, recognised by content, the tuned model comes back: every file, byte for
    byte. On any other base of the family the result is TARGET + A · Δ, rounded once.

    A run with --output that was stopped goes on where it was when the same command is run again.
    """
    output, push_to = options["output"], options["push_to"]
    if (output is None) == (push_to is None):
        raise click.UsageError("give either --output DIR or --push-to REPO")
    if output is not None and (options["pr"] or options["private"]):
        raise click.UsageError("--pr and --private go with --push-to REPO")

    from hubdiff.jobs.apply import apply

    stopped = (
        f"Stopped. Nothing was published at {push_to}; a repo that is new stays there, empty."
        if output is None
        else f"Stopped. {output} is as it was; run the same command again to go on from here."
    )
    with session.working_together(if_stopped=stopped) as (progress, ranks):
        applied = apply(delta, **options, command=session.command, progress=progress, ranks=ranks)
        if options["pr"] and not applied.dry_run and applied.pr_url is None:
            progress.note(f"{applied.where} {shared.NO_PR}")
    session.show(applied.as_json(), lambda page: _draw(page, applied))


def _draw(page: Page, applied: Applied) -> None:
    if applied.dry_run:
        _draw_plan(page, applied)
    else:
        _draw_result(page, applied)


def _draw_result(page: Page, applied: Applied) -> None:
    plan, written = applied.plan, sum(file.size for file in applied.files)
    rate = f"{size_text(written / max(applied.seconds, 1e-3))}/s"
    copied = len(plan["files"]) - len(_planned(applied))
    page.fields(
        [
            ("result", applied.where),
            ("case", _case(plan)),
            ("because", plan["reason"]),
            (
                "written",
                f"{count(len(applied.files), 'file')}, {size_text(written)} in "
                f"{duration(applied.seconds)} ({rate})",
            ),
            ("copied", f"{count(copied, 'file')}, by the Hub itself" if copied else None),
            ("commit", applied.url),
            ("pull request", applied.pr_url),
        ]
    )
    _draw_remarks(page, plan)


def _planned(applied: Applied) -> list[dict[str, Any]]:
    """The files of the plan that were written here."""
    written = {file.path for file in applied.files}
    return [file for file in applied.plan["files"] if file["path"] in written]


def _case(plan: dict[str, Any]) -> str:
    scale = "" if plan["scale"] == 1.0 else f" at scale {plan['scale']:g}"
    return f"{plan['case']}{scale}"


def _draw_plan(page: Page, applied: Applied) -> None:
    plan = applied.plan
    page.line("The plan: no weights were read, nothing was written.")
    page.line()
    page.fields(
        [
            ("case", _case(plan)),
            ("because", plan["reason"]),
            ("delta", plan["delta"]),
            ("target", plan["target"]),
            ("result", applied.where),
        ]
    )
    page.line()
    page.table(
        ["file", "size", "tensors changed", ""],
        [
            (
                file["path"],
                size_text(file["bytes"]),
                f"{file['changed']:,} of {file['tensors']:,}" if "changed" in file else "",
                file["action"],
            )
            for file in plan["files"]
        ],
    )
    page.line()
    read = plan["read"]
    page.fields(
        [
            ("read", f"{size_text(read['target'])} target + {size_text(read['delta'])} delta"),
            ("network", size_text(read["network"])),
            ("write", size_text(plan["write"])),
            ("memory", f"at most {size_text(plan['peak_memory'])}"),
        ]
    )
    _draw_remarks(page, plan)


def _draw_remarks(page: Page, plan: dict[str, Any]) -> None:
    """What a reader of the result should know; nothing in most cases."""
    notes = [f"{file['path']}: {file['note']}" for file in plan["files"] if file.get("note")]
    sections = (
        ("Notes", [*plan["notes"], *notes]),
        ("Kept from the target, the tuned model has no such tensor", plan["kept"]),
        ("Left out", [f"{item['path']}: {item['reason']}" for item in plan["left_out"]]),
    )
    for title, texts in sections:
        if texts:
            page.heading(title)
            page.items(texts)
