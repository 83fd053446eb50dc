"""What apply and load share: the deltas, the method and the device that a caller asks for, and the
second plan of a target that only looked like the own base."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from hubdiff.checkpoint import Checkpoint, open_checkpoint
from hubdiff.delta import open_delta_tree
from hubdiff.errors import CannotApply, RefError, WrongBase
from hubdiff.jobs.together import open_alike
from hubdiff.pair import Filters
from hubdiff.plan import METHODS, MODES, MergePlan, Method, Weighted, float32, make_plan
from hubdiff.ranks import ALONE, Ranks
from hubdiff.refs import ModelRef, parse_weighted
from hubdiff.scales import is_number

R = TypeVar("R")
# A delta as a caller names it: a ref, which may end in ":WEIGHT", or a ref and its weight.
DeltaRef = str | Path | tuple[str | Path, float]
TIES_DENSITY = 0.2


@contextmanager
def opened_models(
    delta: str | Path | Sequence[DeltaRef], to: str | Path, cache: bool, ranks: Ranks = ALONE
) -> Iterator[tuple[list[Weighted], Checkpoint]]:
    """The deltas with their weights and the target they go onto, open."""
    with ExitStack() as stack:
        named = weighted_refs(delta)
        *deltas, target_tree = open_alike(
            ranks, [*(ref for ref, _ in named), ModelRef.parse(to)], cache=cache
        )
        assert target_tree is not None
        opened = []
        for tree, (_, weight) in zip(deltas, named, strict=True):
            assert tree is not None
            opened.append(Weighted(stack.enter_context(open_delta_tree(tree)), weight))
        yield opened, stack.enter_context(open_checkpoint(target_tree))


def weighted_refs(delta: str | Path | Sequence[DeltaRef]) -> list[tuple[ModelRef, float]]:
    """Every delta that a caller names, with its weight. Raises ``RefError``, or ``CannotApply`` for
    a weight that float32 can't hold."""
    if isinstance(delta, str | Path):
        delta = [delta]
    if not delta:
        raise RefError("no delta was given", next_step="Name one delta or several.")
    found = []
    for item in delta:
        if isinstance(item, str | Path):
            found.append(parse_weighted(item))
        elif isinstance(item, tuple) and len(item) == 2 and is_number(item[1]):
            found.append((ModelRef.parse(item[0]), float(item[1])))
        else:
            raise RefError(
                f"{item!r} is neither a ref nor a pair (ref, weight)",
                next_step='Write [("org/delta", 0.7), "org/other:0.5"].',
            )
        float32(found[-1][1], f"the weight of {found[-1][0]}")
    return found


def method_of(name: str, density: float | None, seed: int | None) -> Method:
    """The method of that name. Raises ``CannotApply`` for a setting that it does not take, or a
    value that makes no sense."""
    if name not in METHODS:
        raise CannotApply(
            f"there is no method {name!r}", next_step=f"Use one of {', '.join(METHODS)}."
        )
    for setting, value in (("density", density), ("seed", seed)):
        if value is not None and setting not in METHODS[name]:
            raise CannotApply(
                f"the method {name} takes no {setting}", next_step=f"Leave out --{setting}."
            )
    if density is None and name == "dare":
        raise CannotApply(
            "the method dare needs a density, the share of Δ that it keeps",
            next_step="Give --density D, for example 0.1.",
        )
    if density is None:
        density = TIES_DENSITY if name == "ties" else 1.0
    if not is_number(density) or not 0 < density <= 1:
        raise CannotApply(
            f"the density {density!r} is not a share", next_step="Give --density D, 0 < D <= 1."
        )
    if seed is not None and (not is_number(seed) or seed != int(seed) or seed < 0):
        raise CannotApply(
            f"the seed {seed!r} is no whole number from 0", next_step="Give --seed N, 0 <= N."
        )
    return Method(name, density, seed or 0)


def choose_device(name: str, ranks: Ranks = ALONE) -> str:
    """The name of a torch device that is here: ``cpu``, ``cuda:N`` or ``mps``; of several ranks on
    a machine with several GPUs each gets its own for ``auto`` and ``cuda``. torch itself is asked
    only where a GPU is in question. Raises ``RefError`` for a device that is not here."""
    if name == "auto" and not _cuda_driver():
        name = "cpu"
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.size > 1 and torch.cuda.is_available():
        name = f"cuda:{ranks.local % torch.cuda.device_count()}"
    kind = name.partition(":")[0]
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(kind, False):
        raise RefError(
            f"there is no device {name!r} here", next_step="Use --device auto, or --device cpu."
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RefError(
            f"{name!r} is not a device", next_step="Write cpu, cuda, cuda:N or mps."
        ) from error
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RefError(
            f"there is no {name}, only {torch.cuda.device_count()} CUDA devices",
            next_step="Use --device auto.",
        )
    return str(device)


def _cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def vocab_mode(name: str | None) -> str | None:
    """A way of matching vocabularies that exists. Raises ``CannotApply``."""
    if name is not None and name not in MODES:
        raise CannotApply(
            f"there is no way {name!r} of matching vocabularies",
            next_step=f"Use one of {', '.join(MODES)}.",
        )
    return name


def run_plan(
    plan: MergePlan, filters: Filters, vocab: str | None, run: Callable[[MergePlan], R]
) -> R:
    """``run`` the plan, or where it shows that the target only looked like the own base, the plan
    of a transfer."""
    try:
        return run(plan)
    except WrongBase:
        if plan.proved:
            raise
        # The sampled tensors were the base's, another was not: it is a sibling after all.
        plan = make_plan(plan.deltas, plan.target, filters=filters, as_transfer=True, vocab=vocab)
        return run(plan)
