"""``hubdiff recycle``: fine-tune a list of bases, each from the delta of the one before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session

if TYPE_CHECKING:
    from hubdiff.jobs.recycle import Recycled


@click.command(
    "recycle",
    short_help="Fine-tune a list of bases, each from the last one's delta.",
    cls=shared.Command,
    usage="PLAN.yaml [OPTIONS]",
    examples=("hubdiff recycle plan.yaml --dry-run", "hubdiff recycle plan.yaml"),
)
@click.argument("plan")
@click.option("--dry-run", is_flag=True, help="Show the steps, and write nothing.")
@click.option(
    "--force",
    is_flag=True,
    help="Also start from a delta that check refuses, make again what the plan now has otherwise, "
    "and replace what stands at the places of models and deltas.",
)
@shared.json_output
@pass_session
def command(session: Session, plan: str, dry_run: bool, force: bool) -> None:
    """Fine-tune the bases of PLAN one after the other, each from itself with the delta of the one
    before on it: Algorithm 1 of Lin et al. 2025, iterative or direct.

    PLAN has the keys method (iterative, or direct, which takes FT(base) − base as the delta), data,
    recipe, set (on top of the recipe), output, push (where each delta goes; {name} and {number} are
    the base's; a folder is written ./DIR), private, and bases. A base is a ref, or has base, push,
    and the first also tuned or delta, where it is fine-tuned already. Paths begin at PLAN's folder.

    Each transfer is checked first, as hubdiff check does, and refuse stops the run. A run that was
    stopped goes on when the same command is run again, with the commits it began with. The output
    has the tuned models, report.md and report.json. One process; needs pip install
    "hubdiff[finetune]".
    """
    from hubdiff.jobs.recycle import recycle

    stopped = (
        "Stopped. What is finished is kept: run the same command again to go on from the last "
        "checkpoint."
    )
    with session.working(if_stopped=stopped) as progress:
        made = recycle(
            plan, dry_run=dry_run, force=force, command=session.command, progress=progress
        )
    session.show(made.as_json(), lambda page: _draw(page, made))


def _draw(page: Page, made: Recycled) -> None:
    from hubdiff.jobs.recycle_report import HEADINGS, MARKDOWN, cells, start_of

    steps = made.report["steps"]
    if made.dry_run:
        page.table(
            ["step", "base", "starts from", "delta goes to", "now"],
            [
                (
                    step["name"],
                    step["base"],
                    start_of(step),
                    made.goes_to[step["name"]],
                    made.states[step["name"]],
                )
                for step in steps
            ],
        )
        page.line("dry run: nothing was written")
        return
    page.table(HEADINGS, [cells(step) for step in steps])
    page.line()
    deltas = [(f"Δ of {step['name']}", step["delta"]["ref"]) for step in steps]
    page.fields([*deltas, ("report", str(Path(made.output) / MARKDOWN))])
