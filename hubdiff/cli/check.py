"""``hubdiff check``: whether a delta can be put on a target, and whether it should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session
from hubdiff.summary import percent, size_text

if TYPE_CHECKING:
    from hubdiff.compat import Finding
    from hubdiff.forecast import Forecast, Row
    from hubdiff.jobs.check import Checked

EXIT_CODES = {"go": 0, "doubtful": 3, "refuse": 4}


@click.command(
    "check",
    short_help="Say whether a delta suits a model, before it is applied.",
    cls=shared.Command,
    usage="DELTA --to TARGET [OPTIONS]",
    examples=(
        "hubdiff check me/tuned-delta --to org/base-v2",
        "hubdiff check me/tuned-delta --to org/base-v2 --plot forecast.png",
        "hubdiff check ./tuned-delta --to ./base-v2 --json",
    ),
)
@click.argument("delta")
@click.option("--to", required=True, metavar="TARGET", help="The model it is meant for.")
@shared.vocab
@click.option("--plot", metavar="FILE", help="Draw the forecast, layer by layer, as a PNG.")
@shared.cache
@shared.json_output
@pass_session
def command(
    session: Session, delta: str, to: str, vocab: str | None, plot: str | None, cache: bool
) -> int:
    """Say whether DELTA can be put on TARGET, and whether the result would be worth anything.

    Reads headers, configs and tokenizers, and a sample of TARGET's weights: at most 64 MB. The base
    that DELTA was made from is not needed. apply does the same first, and stops on refuse.

    Exit codes: 0 go, 3 doubtful, 4 refuse.
    """
    from hubdiff.jobs.check import check

    with session.working() as progress:
        checked = check(delta, to, vocab=vocab, plot=plot, cache=cache, progress=progress)
    session.show(checked.as_json(), lambda page: _draw(page, checked, plot))
    return EXIT_CODES[checked.verdict.level]


def _draw(page: Page, checked: Checked, plot: str | None) -> None:
    page.fields(
        [
            ("verdict", checked.verdict.level),
            *(("because", reason.text) for reason in checked.verdict.reasons),
            ("what to do", checked.next_step),
            ("delta", checked.delta),
            ("target", checked.target),
        ]
    )
    page.heading("Can it be applied")
    own, *others = checked.findings
    page.fields([(own.subject, own.text), *((f.subject, _finding(f)) for f in others)])
    if checked.forecast is not None:
        _draw_forecast(page, checked.forecast)
        if plot is not None:
            page.line()
            page.fields([("picture", plot)])


def _finding(finding: Finding) -> str:
    return f"{finding.state}: {finding.text}"


def _draw_forecast(page: Page, forecast: Forecast) -> None:
    total = forecast.total
    page.heading("Should it be applied")
    page.fields(
        [
            ("cosine of base and target", _number(total.cosine)),
            ("‖target − base‖/‖base‖", _share(total.drift)),
            ("‖Δ‖/‖base‖", _share(total.reach)),
            ("‖target − base‖/‖Δ‖", _number(total.drift_over_delta)),
            ("cosine of Δ and target − base", _number(total.along)),
            ("rounded away by the target", _share(total.rounded_away)),
            (
                "sample",
                f"{forecast.elements:,} weights of {forecast.tensors:,} tensors, "
                f"{size_text(forecast.read)} read of the target",
            ),
        ]
    )
    page.heading("By layer and kind")
    page.table(
        ["layer", "kind", "cosine", "target moved", "Δ", "moved / Δ", "along Δ"],
        [_row(row, forecast.rows) for row in forecast.rows],
    )


def _row(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    several = len({other.stack for other in rows if other.layer is not None}) > 1
    layer = "outside" if row.layer is None else str(row.layer)
    moments = row.moments
    return (
        f"{row.stack} {layer}" if several and row.stack else layer,
        row.kind,
        _number(moments.cosine),
        _share(moments.drift),
        _share(moments.reach),
        _number(moments.drift_over_delta),
        _number(moments.along),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)
