"""``hubdiff tune-scale``: the scale at which a delta does most good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session
from hubdiff.cli.evaluate import GOES_ON, split_tasks, task_options

if TYPE_CHECKING:
    from hubdiff.jobs.tune_scale import TunedScale


@click.command(
    "tune-scale",
    short_help="Look for the best scale of a delta on a target.",
    cls=shared.Command,
    usage="DELTA --to TARGET --tasks NAME,… [OPTIONS]",
    examples=(
        "hubdiff tune-scale me/delta --to org/base-v2 --tasks paper/gsm8k --limit 200",
        "hubdiff tune-scale me/delta --to org/base-v2 --tasks my_task.yaml --plot scale.png",
    ),
)
@click.argument("delta")
@click.option("--to", "target", required=True, metavar="TARGET", help="The base it goes onto.")
@task_options
@click.option(
    "--evaluations",
    type=click.IntRange(min=3),
    default=9,
    metavar="N",
    help="How many scales to try. Default: 9.",
)
@click.option("--plot", metavar="FILE", help="Draw the curve as a PNG.")
@shared.json_output
@pass_session
def command(session: Session, delta: str, target: str, **options: Any) -> None:
    """Evaluate TARGET + α·DELTA at several scales α: 0, 0.5, 1 and 1.5, then between the best.

    The scale is chosen on every second example, and the others say what it is worth: the best of
    many looks better than it is on the examples that chose it. A run that was stopped goes on from
    the answers it has. Needs pip install "hubdiff[eval]".
    """
    from hubdiff.jobs.tune_scale import tune_scale

    with session.working(if_stopped=GOES_ON) as progress:
        found = tune_scale(delta, target, **split_tasks(options), progress=progress)
    session.show(found.as_json(), lambda page: _draw(page, found, options["plot"]))


def _draw(page: Page, found: TunedScale, plot: str | None) -> None:
    from hubdiff.jobs.compare import change_words, p_words

    page.fields([("delta", found.delta), ("target", found.target)])
    page.line()
    page.table(
        ["scale", "score, choosing half", "score, other half", "±, both"],
        [
            (
                f"{one.scale:g}" + (" ← best" if one is found.best else ""),
                f"{one.choosing:.4f}",
                f"{one.held_out:.4f}",
                f"{one.stderr:.4f}" if one.stderr is not None else "",
            )
            for one in found.tried
        ],
    )
    page.line()
    page.fields(
        [
            (
                f"{name}, {found.best.scale:g} against 1",
                f"{change_words(gain)} on the other half, p {p_words(gain)}" if gain else None,
            )
            for name, gain in found.gain.items()
        ]
    )
    page.fields([("picture", plot)])
