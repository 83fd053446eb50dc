"""The merge plan: every file of the result, where its bytes come from, and what it will cost.

Made from headers, manifests and listings alone; the plan that ``--dry-run`` prints is the object
that ``merge`` runs. Two cases: on its own base a delta rebuilds the tuned repo file by file; on any
other target Δ, or that of several deltas merged, is added to the target's tensors in the target's
own layout and dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence

from hubdiff.checkpoint import Checkpoint
from hubdiff.errors import CannotApply, NotPortable
from hubdiff.pair import Filters
from hubdiff.plan.alignment import MODES, Alignment
from hubdiff.plan.own_base import own_base_plan
from hubdiff.plan.recognise import Verdict, recognise
from hubdiff.plan.transfer import transfer_plan
from hubdiff.plan.types import (
    CARD,
    METHODS,
    OWN_BASE,
    PORTABLE_GROUPS,
    TRANSFER,
    MergePlan,
    Method,
    Step,
    Term,
    Weighted,
    WeightsFile,
    WholeFile,
    float32,
    trim_passes,
)
from hubdiff.scales import Scales

__all__ = [
    "CARD",
    "METHODS",
    "MODES",
    "OWN_BASE",
    "PORTABLE_GROUPS",
    "TRANSFER",
    "Alignment",
    "MergePlan",
    "Method",
    "Step",
    "Term",
    "Weighted",
    "WeightsFile",
    "WholeFile",
    "float32",
    "make_plan",
    "trim_passes",
]


def make_plan(
    deltas: Sequence[Weighted],
    target: Checkpoint,
    *,
    scale: Scales | None = None,
    method: Method | None = None,
    filters: Filters | None = None,
    as_transfer: bool = False,
    vocab: str | None = None,
) -> MergePlan:
    """Plan ``deltas`` onto ``target``. ``method`` None: linear. ``as_transfer`` rules the own-base
    case out. ``vocab``: ``align``, ``strict`` or ``rows``, how rows of two vocabularies are
    matched; None: as ``alignment`` decides. Raises ``CannotApply`` and its kin when they don't go
    together."""
    scale, filters = scale or Scales(), filters or Filters()
    _check_method(deltas, method)
    if len(deltas) > 1 and method is None:
        method = Method("linear")
    if len(deltas) == 1 and method is not None and method.name == "linear":
        method = None  # one term needs no float32: its sum is exact
    verdict = _verdict(deltas, target, scale, method, filters, as_transfer)
    if verdict.own_base:
        return own_base_plan(deltas[0].delta, target, verdict)
    for delta in (item.delta for item in deltas):
        if delta.manifest.not_portable_reason:
            raise NotPortable(
                f"{delta.tree.pin} can't be added to another base: "
                f"{delta.manifest.not_portable_reason} (and {target.tree.pin} is not its own base: "
                f"{verdict.reason})",
                next_step=f"Apply it to its own base, {delta.manifest.base.name}; or make a delta "
                "from unquantised weights.",
            )
    reason = f"the target is not the delta's own base: {verdict.reason}"
    if verdict.reason == deltas[0].delta.manifest.no_rebuild_reason:
        reason = f"the delta has no own base to rebuild on: {verdict.reason}"
    if len(deltas) > 1:
        reason = f"{len(deltas)} deltas are merged ({method}), so nothing is rebuilt"
    return transfer_plan(deltas, target, scale, filters, method, reason, vocab)


def _check_method(deltas: Sequence[Weighted], method: Method | None) -> None:
    ties = method is not None and method.name == "ties"
    if ties and len(deltas) == 1 and deltas[0].weight != 1:
        raise CannotApply(
            "ties takes the weighted mean, in which the weight of a single delta cancels out",
            next_step="Give --scale instead of the weight.",
        )


def _verdict(
    deltas: Sequence[Weighted],
    target: Checkpoint,
    scale: Scales,
    method: Method | None,
    filters: Filters,
    as_transfer: bool,
) -> Verdict:
    if as_transfer:
        return Verdict(False, True, "a tensor differs from the base's")
    if scale.one != 1.0:
        return Verdict(False, True, f"the scale is {scale}")
    if filters:
        return Verdict(False, True, "only some tensors are taken")
    if len(deltas) > 1:
        return Verdict(False, True, f"{len(deltas)} deltas are merged")
    if deltas[0].weight != 1.0:
        return Verdict(False, True, f"the weight is {deltas[0].weight:g}")
    if method is not None:
        return Verdict(False, True, f"the method is {method}")
    delta = deltas[0].delta
    if delta.manifest.no_rebuild_reason:
        return Verdict(False, True, delta.manifest.no_rebuild_reason)
    return recognise(delta, target)
