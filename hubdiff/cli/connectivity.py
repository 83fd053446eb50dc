"""``hubdiff connectivity``: the loss along the line between two models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session

if TYPE_CHECKING:
    from hubdiff.jobs.connectivity import Connectivity


@click.command(
    "connectivity",
    short_help="Measure the loss on the line between two models.",
    cls=shared.Command,
    usage="BASE TARGET --data FILE|DATASET [OPTIONS]",
    examples=(
        "hubdiff connectivity org/base org/base-v2 --data held-out.jsonl",
        "hubdiff connectivity org/base org/base-v2 --delta me/delta --data held-out.jsonl "
        "--plot line.png",
    ),
)
@click.argument("base")
@click.argument("target")
@click.option("--data", required=True, metavar="DATA", help="As finetune takes it.")
@click.option("--delta", metavar="DELTA", help="Also from BASE + Δ to TARGET + Δ.")
@click.option(
    "--points", type=click.IntRange(min=2), default=11, metavar="N", help="On a line. Default: 11."
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=256, metavar="N", help="Examples. Default: 256."
)
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=1024,
    metavar="N",
    help="Tokens of an example at most. Default: 1024.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=8,
    metavar="N",
    help="Examples at a time. Default: 8.",
)
@click.option(
    "--device",
    default="auto",
    metavar="DEVICE",
    help="auto, cpu, cuda, cuda:N or mps. Default: auto.",
)
@click.option("--plot", metavar="FILE", help="Draw the losses as a PNG.")
@shared.cache
@shared.json_output
@pass_session
def command(session: Session, base: str, target: str, **options: Any) -> None:
    """Measure the loss on DATA along the straight line from BASE to TARGET.

    Where it climbs between the two, a barrier, the bases lie in different basins, and a delta of
    one does little good on the other. One model is in memory at a time, in float32. Needs
    pip install "hubdiff[finetune]".
    """
    from hubdiff.jobs.connectivity import connectivity

    with session.working() as progress:
        found = connectivity(base, target, **options, progress=progress)
    session.show(found.as_json(), lambda page: _draw(page, found, options["plot"]))


def _draw(page: Page, found: Connectivity, plot: str | None) -> None:
    page.fields(
        [
            ("base", found.base),
            ("target", found.target),
            ("delta", found.delta),
            ("examples", f"{found.examples:,}, {found.tokens:,} tokens that count"),
        ]
    )
    page.line()
    page.table(
        ["at", *(line.name for line in found.lines)],
        [
            (f"{t:.2f}", *(_number(line.losses[number]) for line in found.lines))
            for number, t in enumerate(found.points)
        ],
    )
    page.line()
    page.fields([(f"barrier, {line.name}", _number(line.barrier)) for line in found.lines])
    page.fields([("picture", plot)])


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4f}"
