"""What check and apply share: comparing a target with the bases of deltas, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable

from hubdiff.compat import DOUBT, STOP, Finding, findings_on
from hubdiff.forecast import Forecast, look
from hubdiff.plan import OWN_BASE, MergePlan
from hubdiff.verdict import DOUBTFUL, REFUSE, Reason, Verdict, judge


def reasons_of(findings: Iterable[Finding]) -> list[Reason]:
    """What findings mean for the verdict."""
    levels = {STOP: REFUSE, DOUBT: DOUBTFUL}
    return [
        Reason(levels[found.state], f"{found.subject}: {found.text}")
        for found in findings
        if found.state in levels
    ]


def forecasts(plan: MergePlan) -> list[Forecast | None]:
    """The target compared with the base of every delta, in their order; None for one without a
    sample of what it acts on."""
    looks = {at.delta: at for at in plan.looks}
    found = (looks.get(item.delta) for item in plan.deltas)
    return [None if at is None else look(at) for at in found]


def advice(plan: MergePlan) -> Verdict | None:
    """The verdict on a plan; None on the own base, of which nothing is uncertain."""
    if plan.case == OWN_BASE:
        return None
    reasons: list[Reason] = []
    for item, forecast in zip(plan.deltas, forecasts(plan), strict=True):
        whose = f"{item.name}: " if len(plan.deltas) > 1 else ""
        found = reasons_of(findings_on(item.delta, plan.target, plan))
        reasons += [Reason(r.verdict, f"{whose}{r.text}") for r in judge(forecast, found).reasons]
    return Verdict(tuple(reasons))
