"""The merge plan: every file of the result, where its bytes come from, and what it will cost.

Made from headers, manifest and listings alone; the plan that ``--dry-run`` prints is the object
that ``merge`` runs. Two cases: on its own base a delta rebuilds the tuned repo file by file; on any
other target Δ is added to the target's tensors in the target's own layout and dtypes.
"""

from __future__ import annotations

from hubdiff.checkpoint import Checkpoint
from hubdiff.delta import Delta
from hubdiff.errors import NotPortable
from hubdiff.pair import Filters
from hubdiff.plan.own_base import own_base_plan
from hubdiff.plan.recognise import Verdict, recognise
from hubdiff.plan.transfer import Transfer
from hubdiff.plan.types import (
    CARD,
    OWN_BASE,
    PORTABLE_GROUPS,
    TRANSFER,
    MergePlan,
    Step,
    Term,
    WeightsFile,
    WholeFile,
)

__all__ = [
    "CARD",
    "OWN_BASE",
    "PORTABLE_GROUPS",
    "TRANSFER",
    "MergePlan",
    "Step",
    "Term",
    "WeightsFile",
    "WholeFile",
    "make_plan",
]


def make_plan(
    delta: Delta,
    target: Checkpoint,
    *,
    scale: float = 1.0,
    filters: Filters | None = None,
    as_transfer: bool = False,
) -> MergePlan:
    """Plan ``delta`` onto ``target``. ``as_transfer`` rules the own-base case out. Raises
    ``CannotApply`` and its kin when the two don't go together."""
    filters = filters or Filters()
    verdict = _verdict(delta, target, scale, filters, as_transfer)
    if verdict.own_base:
        return own_base_plan(delta, target, verdict)
    if delta.manifest.not_portable_reason:
        raise NotPortable(
            f"{delta.tree.pin} can't be added to another base: "
            f"{delta.manifest.not_portable_reason} (and {target.tree.pin} is not its own base: "
            f"{verdict.reason})",
            next_step=f"Apply it to its own base, {delta.manifest.base.name}; or make a delta from "
            "unquantised weights.",
        )
    return Transfer(delta, target, scale, filters, verdict).plan()


def _verdict(
    delta: Delta, target: Checkpoint, scale: float, filters: Filters, as_transfer: bool
) -> Verdict:
    if as_transfer:
        return Verdict(False, True, "a tensor differs from the base's")
    if scale != 1.0:
        return Verdict(False, True, f"the scale is {scale:g}")
    if filters:
        return Verdict(False, True, "only some tensors are taken")
    if delta.manifest.no_rebuild_reason:
        return Verdict(False, True, delta.manifest.no_rebuild_reason)
    return recognise(delta, target)
