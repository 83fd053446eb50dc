"""What check and apply share: comparing a target with the bases of deltas, and the verdict."""

from __future__ import annotations

from hubdiff.forecast import Forecast, look
from hubdiff.plan import MergePlan
from hubdiff.verdict import Reason, Verdict, judge


def forecasts(plan: MergePlan) -> list[Forecast]:
    """Compare the target with the base of every delta that has a sample, in their order."""
    return [look(at) for at in plan.looks]


def advice(plan: MergePlan) -> Verdict | None:
    """The verdict on a plan by its numbers alone: what stops a plan was found when it was made.
    None where there is nothing to compare."""
    if not plan.looks:
        return None
    names = {item.delta: item.name for item in plan.deltas}
    reasons: list[Reason] = []
    for at, forecast in zip(plan.looks, forecasts(plan), strict=True):
        whose = f"{names[at.delta]}: " if len(plan.deltas) > 1 else ""
        reasons += [Reason(r.verdict, f"{whose}{r.text}") for r in judge(forecast).reasons]
    return Verdict(tuple(reasons))
