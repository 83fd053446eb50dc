"""Two models side by side: which tensor of the tuned one belongs to which of the base, and whether
their difference can be expressed at all. Reads headers and configs, never a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.configs import quantised
from hubdiff.errors import CannotDiff, ShapeMismatch, VocabularyMismatch
from hubdiff.names import Rename, differs_in_rows_only, match_names
from hubdiff.rows import whole_name
from hubdiff.safetensors_io import DTYPE_BITS

FLOATS = frozenset({"BF16", "F16", "F32"})
_FP8 = ("F8_", "F4", "F6_")


@dataclass(frozen=True)
class Filters:
    """Which tensors take part: those that match an ``include`` glob (all when there is none) and no
    ``exclude`` glob."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, include: str | Iterable[str], exclude: str | Iterable[str]) -> Filters:
        """From what a caller gives: one glob, or several."""
        return cls(*((g,) if isinstance(g, str) else tuple(g) for g in (include, exclude)))

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def takes(self, name: str) -> bool:
        """Whether a tensor takes part, or the tensor that these rows are of."""
        name = whole_name(name)
        included = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return included and not any(fnmatchcase(name, glob) for glob in self.exclude)


@dataclass(frozen=True)
class TensorPair:
    """A tensor of the tuned model, its place in the base (None: added) and in the masters."""

    name: str
    tuned_name: str
    tuned: Placed
    base: Placed | None
    master: Placed | None

    @property
    def is_float(self) -> bool:
        """Whether its Δ is a number; other tensors travel as raw bits."""
        return self.base is not None and {self.tuned.entry.dtype, self.base.entry.dtype} <= FLOATS


@dataclass(frozen=True)
class Pair:
    """``tensors`` are keyed by tuned name and exclude what the filters leave out."""

    tuned: Checkpoint
    base: Checkpoint
    master: Checkpoint | None
    tensors: dict[str, TensorPair]
    removed: tuple[str, ...]
    rename: Rename | None
    filters: Filters
    not_portable_reason: str | None


def pair_models(
    tuned: Checkpoint, base: Checkpoint, master: Checkpoint | None, filters: Filters
) -> Pair:
    """Match tensors and refuse what has no difference. Raises ``CannotDiff``, ``ShapeMismatch`` or
    ``VocabularyMismatch``."""
    match = match_names(tuned.tensors, base.tensors)
    _check_overlap(tuned, base, len(match.pairs))
    masters = _match_masters(tuned, master)
    tensors = {}
    for name, placed in tuned.tensors.items():
        base_name = match.pairs.get(name)
        pair = TensorPair(
            base_name or _rest_name(name, match.pairs),
            name,
            placed,
            base.tensors[base_name] if base_name else None,
            masters.get(name),
        )
        if filters.takes(pair.name):
            check_shapes(pair.name, placed, pair.base, "tuned model", "base")
            _check_packing(pair)
            tensors[name] = pair
    if not tensors:
        raise CannotDiff(
            f"no tensor of {tuned.tree.pin} passes --include/--exclude",
            next_step="Check the globs against the tensor names (hubdiff inspect, or the index).",
        )
    matched = set(match.pairs.values())
    removed = tuple(name for name in base.tensors if name not in matched)
    reason = _not_portable(tuned, base)
    return Pair(tuned, base, master, tensors, removed, match.rename, filters, reason)


def _rest_name(name: str, pairs: Mapping[str, str]) -> str:
    """The name of a tensor without a partner. Rows of one that has a partner are called by it."""
    whole = whole_name(name)
    return pairs.get(whole, whole) + name[len(whole) :]


def check_shapes(name: str, one: Placed, other: Placed | None, one_is: str, other_is: str) -> None:
    """Refuse two shapes of one tensor, telling two vocabularies from two architectures."""
    if other is None or one.entry.shape == other.entry.shape:
        return
    a, b = one.entry.shape, other.entry.shape
    if differs_in_rows_only(name, a, b):
        raise VocabularyMismatch(
            f"{name} has {a[0]:,} rows in the {one_is} and {b[0]:,} in the {other_is}: the "
            "vocabularies differ",
            next_step="Resize one side to the other's vocabulary (model.resize_token_embeddings), "
            "or leave these tensors out with --exclude.",
        )
    raise ShapeMismatch(
        f"{name} is {list(a)} in the {one_is} and {list(b)} in the {other_is}",
        next_step="A delta only makes sense between models of one architecture and size; "
        "check the refs.",
    )


def _check_packing(pair: TensorPair) -> None:
    """Elements of less than a byte can only be compared with their like."""
    if pair.base is None or pair.tuned.entry.dtype == pair.base.entry.dtype:
        return
    tuned, base = pair.tuned.entry.dtype, pair.base.entry.dtype
    if min(DTYPE_BITS[tuned], DTYPE_BITS[base]) < 8:
        raise CannotDiff(
            f"{pair.name} is {tuned} in the tuned model and {base} in the base",
            next_step="Check --base: both sides must be quantised the same way.",
        )


def _check_overlap(tuned: Checkpoint, base: Checkpoint, matched: int) -> None:
    if 2 * matched >= min(len(tuned.tensors), len(base.tensors)):
        return
    only_tuned = next(iter(tuned.tensors), "nothing")
    only_base = next(iter(base.tensors), "nothing")
    raise CannotDiff(
        f"only {matched} of {len(tuned.tensors)} tensors of {tuned.tree.pin} have a partner among "
        f"the {len(base.tensors)} of {base.tree.pin} (for example {only_tuned!r} against "
        f"{only_base!r})",
        next_step="Check --base: it must be the model that TUNED was trained from.",
    )


def _match_masters(tuned: Checkpoint, master: Checkpoint | None) -> dict[str, Placed]:
    if master is None:
        return {}
    match = match_names(tuned.tensors, master.tensors)
    if not match.pairs:
        raise CannotDiff(
            f"no tensor of the masters {master.tree.pin} has a partner in {tuned.tree.pin}",
            next_step="--tuned-master must be the same fine-tune, saved in float32.",
        )
    masters = {name: master.tensors[other] for name, other in match.pairs.items()}
    for name, placed in masters.items():
        check_shapes(name, tuned.tensors[name], placed, "tuned model", "masters")
    return {n: placed for n, placed in masters.items() if placed.entry.dtype in FLOATS}


def _not_portable(tuned: Checkpoint, base: Checkpoint) -> str | None:
    for side, checkpoint in (("tuned model", tuned), ("base", base)):
        method = quantised(checkpoint.config)
        if method:
            return f"the {side}'s weights are quantised ({method})"
        dtypes = {placed.entry.dtype for placed in checkpoint.tensors.values()}
        packed = sorted(dtype for dtype in dtypes if dtype.startswith(_FP8))
        if packed:
            return f"the {side} has {packed[0]} weights, which can't be added to"
    return None
