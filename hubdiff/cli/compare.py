"""``hubdiff compare``: base, target and delta side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, duration, pass_session
from hubdiff.cli.evaluate import GOES_ON, split_tasks, task_options

if TYPE_CHECKING:
    from hubdiff.jobs.compare import Comparison


@click.command(
    "compare",
    short_help="Evaluate base, tuned, target and target + Δ side by side.",
    cls=shared.Command,
    usage="DELTA --to TARGET --tasks NAME,… [OPTIONS]",
    examples=(
        "hubdiff compare me/delta --to org/base-v2 --suite paper --output comparison",
        "hubdiff compare me/delta --to org/base-v2 --tasks my_task.yaml --tuned-target me/tuned-v2",
    ),
)
@click.argument("delta")
@click.option("--to", "target", required=True, metavar="TARGET", help="The base it goes onto.")
@click.option("--base", metavar="REF", help="The delta's own base. Default: what it names.")
@click.option("--tuned", metavar="REF", help="The tuned model. Default: its base with DELTA on it.")
@click.option("--tuned-target", metavar="REF", help="TARGET, fine-tuned itself: for the recovery.")
@task_options
@click.option("--scale", type=float, default=1.0, metavar="S", help="On TARGET. Default: 1.")
@click.option(
    "--output", metavar="DIR", help="Write comparison.md, .png and .json and each answer here."
)
@shared.json_output
@pass_session
def command(session: Session, delta: str, target: str, **options: Any) -> None:
    """Evaluate the delta's base, the tuned model, TARGET and TARGET + Δ on the same tasks.

    Says whether Δ changes anything, example by example: McNemar's exact test where an answer is
    right or wrong, else paired permutations. With --tuned-target also the recovery: (result −
    target) / (tuned target − target), and its 95 % interval. Models are merged in memory, one at a
    time. A run that was stopped goes on from the answers it has. Needs pip install "hubdiff[eval]".
    """
    from hubdiff.jobs.compare import compare

    with session.working(if_stopped=GOES_ON) as progress:
        found = compare(delta, target, **split_tasks(options), progress=progress)
    session.show(found.as_json(), lambda page: _draw(page, found))


def _draw(page: Page, found: Comparison) -> None:
    from hubdiff.jobs.compare import (
        TUNED_TARGET,
        change_words,
        p_words,
        recovery_words,
        score_words,
    )

    page.fields(list(found.models.items()))
    page.line()
    recovered = TUNED_TARGET in found.models
    page.table(
        ["task", "examples", *found.models, *(["recovery"] if recovered else [])],
        [
            (
                one.task,
                f"{one.scores[0].examples:,}",
                *(score_words(score) for score in one.scores),
                *([recovery_words(one.recovery)] if recovered else []),
            )
            for one in found.tasks
        ],
    )
    page.line()
    page.table(
        ["target + Δ − target", "difference", "better", "worse", "p"],
        [
            (
                one.task,
                change_words(one.change),
                f"{one.change.better:,}",
                f"{one.change.worse:,}",
                p_words(one.change),
            )
            for one in found.tasks
            if one.change is not None
        ],
    )
    page.line()
    page.fields([("took", duration(found.seconds)), ("written to", found.output)])
