"""Should a delta be put on a target? ``go``, ``doubtful`` or ``refuse``, with reasons in words.

All thresholds are in ``THRESHOLDS``, each with what it rests on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hubdiff.forecast import Forecast
from hubdiff.summary import percent

GO, DOUBTFUL, REFUSE = "go", "doubtful", "refuse"
_RANKS = (GO, DOUBTFUL, REFUSE)
_MOST_STRANGE = 0.001  # of a sample: a model that works has none, or a few


@dataclass(frozen=True)
class Threshold:
    """From which value of a ``number`` of the forecast on a target is ``doubtful``, and from which
    it is refused (None: never for this). ``below``: small values are the bad ones. ``says`` is the
    reason, with the value as {}; ``evidence`` what the limits rest on."""

    number: str
    doubtful: float
    refuse: float | None
    below: bool
    says: str
    evidence: str

    def verdict(self, value: float) -> str:
        def beyond(limit: float) -> bool:
            return value < limit if self.below else value > limit

        if self.refuse is not None and beyond(self.refuse):
            return REFUSE
        return DOUBTFUL if beyond(self.doubtful) else GO


THRESHOLDS = (
    Threshold(
        "cosine",
        0.95,
        0.5,
        True,
        "the target is far from the delta's base: the cosine of their weights is {}",
        "Of a skill that a toy family learnt, 99 % came along to a base trained on to a cosine of "
        "0.993, 45 % at 0.94 and 9 % at 0.81 (README, Forecasts). Models of equal shapes that have "
        "nothing in common (silero-vad 5.1 and 6.0) are near 0.2, and the sum of two is noise.",
    ),
    Threshold(
        "drift",
        0.25,
        0.42,
        False,
        "the target's weights moved by {} of their norm since the delta's base",
        "Two families of five toy models (README, The matrix of transfers), whose gains this "
        "number orders best. Over a drift of at most 0.21 a fifth to all of what a fine-tune gains "
        "came along, over 0.30 to 0.32 less than half, from 0.40 on nothing, and from 0.45 on it "
        "did harm to bases that were good at the task. Another toy family (Forecasts) still got "
        "45 % at 0.39; 0.42 is half way. No large model was measured. A cosine does not see a "
        "model whose weights are scaled.",
    ),
    Threshold(
        "along",
        0.5,
        None,
        False,
        "the target went the way of the tune already: the cosine of Δ and target − base is {}",
        "It is 1 where the target is the tuned model itself, and adding Δ once more overshoots. "
        "Bases trained on with other data are at 0.02 to 0.05, two fine-tunes for other ends of "
        "one base at 0.04.",
    ),
    Threshold(
        "rounded_away",
        0.5,
        None,
        False,
        "the target's dtype is too coarse for {} of the changes: rounded, they are gone",
        "Arithmetic: above one half, most of what the tune changed is not in the result. In the "
        "pairs measured it was at most 5 %, where Δ was a tiny one.",
    ),
)


@dataclass(frozen=True)
class Reason:
    verdict: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """The worst of the ``reasons``; ``go`` where there are none."""

    reasons: tuple[Reason, ...]

    @property
    def level(self) -> str:
        return max((reason.verdict for reason in self.reasons), key=_RANKS.index, default=GO)

    @property
    def why(self) -> str:
        """The reasons that decided, in one line."""
        return "; ".join(reason.text for reason in self.reasons if reason.verdict == self.level)

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.level,
            "reasons": [{"verdict": r.verdict, "text": r.text} for r in self.reasons],
        }


def judge(forecast: Forecast | None, others: Iterable[Reason] = ()) -> Verdict:
    """The verdict on a forecast (None: there is none) and on what else was found."""
    found = list(others)
    if forecast is None:
        found.append(Reason(DOUBTFUL, "no sample of the delta can be compared with the target"))
    else:
        found += _reasons(forecast)
    return Verdict(tuple(found))


def _reasons(forecast: Forecast) -> Sequence[Reason]:
    found: list[Reason] = []
    if forecast.cosine is None:
        found.append(Reason(DOUBTFUL, "the sample of the target has nothing to compare"))
    if forecast.strange > _MOST_STRANGE:
        text = f"{percent(forecast.strange)} of the sample are no finite numbers"
        found.append(Reason(REFUSE if forecast.strange > 0.5 else DOUBTFUL, text))
    for threshold in THRESHOLDS:
        holder = forecast if threshold.number == "cosine" else forecast.total
        value = getattr(holder, threshold.number)
        if value is None:
            continue
        level = threshold.verdict(value)
        if level != GO:
            found.append(Reason(level, threshold.says.format(f"{value:.3g}")))
    return found
