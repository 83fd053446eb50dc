"""check: can a delta be put on a target, and should it be?"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubdiff.checkpoint import open_checkpoint
from hubdiff.compat import Compatibility, Finding, compatibility
from hubdiff.delta import open_delta_tree
from hubdiff.files import open_tree
from hubdiff.forecast import Forecast
from hubdiff.jobs.advice import forecasts, reasons_of
from hubdiff.jobs.merging import vocab_mode
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.verdict import THRESHOLDS, Verdict, judge
from hubdiff.writer import disk_errors, require_place


@dataclass(frozen=True)
class Checked:
    """``findings`` are what headers, configs and tokenizers tell, ``forecast`` what the sample
    does: None on the own base, where nothing is uncertain, and where there is no sample."""

    delta: str
    target: str
    own_base: bool
    verdict: Verdict
    findings: tuple[Finding, ...]
    forecast: Forecast | None
    next_step: str | None

    def as_json(self) -> dict[str, Any]:
        return {
            "delta": self.delta,
            "target": self.target,
            "own_base": self.own_base,
            **self.verdict.as_json(),
            "next_step": self.next_step,
            "findings": [asdict(finding) for finding in self.findings],
            "forecast": self.forecast and self.forecast.as_json(),
            "thresholds": [
                {
                    "number": limit.number,
                    "doubtful": limit.doubtful,
                    "refuse": limit.refuse,
                    "below": limit.below,
                    "evidence": limit.evidence,
                }
                for limit in THRESHOLDS
            ],
        }


def check(
    delta: str | Path,
    to: str | Path,
    *,
    vocab: str | None = None,
    plot: str | Path | None = None,
    cache: bool = False,
    progress: Progress | None = None,
) -> Checked:
    """Tell whether ``delta`` can be put on ``to``, and whether the result would be worth anything.

    Reads headers, configs, tokenizers, the delta's sample and the same places of the target: at
    most 64 MB, whatever the size of the models. The delta's base is not needed.

    Args:
        delta, to: refs (``org/name``, ``org/name@revision``, ``hf://…``) or folders.
        vocab: how rows of two vocabularies are matched, as ``apply`` takes it.
        plot: where to write a picture of the forecast, layer by layer, as a PNG.
        cache: keep what is downloaded in the local Hub cache.

    Raises ``HubdiffError`` for models that can't be read; that they don't go together is a verdict.
    """
    progress = progress or Silent()
    if plot is not None:
        require_place(Path(plot))
    with ExitStack() as stack:
        tree = open_tree(ModelRef.parse(delta), cache=cache)
        opened = stack.enter_context(open_delta_tree(tree))
        target = stack.enter_context(open_checkpoint(open_tree(ModelRef.parse(to), cache=cache)))
        found = compatibility(opened, target, vocab_mode(vocab))
        forecast = None
        if found.plan is not None and not found.own_base:
            (forecast,) = forecasts(found.plan)
        verdict = _verdict(found, forecast)
        checked = Checked(
            str(opened.tree.pin),
            str(target.tree.pin),
            found.own_base,
            verdict,
            found.findings,
            forecast,
            found.stop.next_step if found.stop else None,
        )
    if plot is not None:
        if forecast is None:
            progress.note("there is nothing to draw: no sample was compared")
        else:
            _draw(forecast, verdict, Path(plot))
    return checked


def _verdict(found: Compatibility, forecast: Forecast | None) -> Verdict:
    if found.own_base:
        return Verdict(())
    if found.plan is None:
        return Verdict(tuple(reasons_of(found.findings)))
    return judge(forecast, reasons_of(found.findings))


def _draw(forecast: Forecast, verdict: Verdict, file: Path) -> None:
    from hubdiff.forecast_picture import forecast_picture

    cosine = forecast.total.cosine
    title = verdict.level + ("" if cosine is None else f": cosine of base and target {cosine:.3g}")
    with disk_errors(file), file.open("wb") as stream:
        forecast_picture(forecast, stream, title=title)
