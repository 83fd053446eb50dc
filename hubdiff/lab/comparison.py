"""Two models on the same examples, and what of a skill came along.

Models answer the same questions, so what counts is the difference example by example: its spread is
much smaller than that of either score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hubdiff.lab.scores import Key

_RESAMPLED = 9_999
_AT_ONCE = 1 << 20  # numbers in memory
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Paired:
    """``difference`` = mean of (second − first) over the ``examples`` both answered, with its
    standard error (None of one example). ``better`` and ``worse``: how many examples the second did
    so. ``p``: how often chance alone would make a difference as large, either way."""

    examples: int
    difference: float
    stderr: float | None
    better: int
    worse: int
    p: float
    test: str


@dataclass(frozen=True)
class Recovery:
    """``share`` = (result − target) / (tuned target − target), with the 95 % interval ``low`` to
    ``high`` of a paired bootstrap over the examples; None where the skill does not show: its own
    score is not above the target's."""

    share: float | None
    low: float | None
    high: float | None


def paired(
    first: Mapping[Key, float],
    second: Mapping[Key, float],
    seed: int,
    *,
    higher_is_better: bool = True,
) -> Paired | None:
    """None where there is no example that both answered, or an answer that is no number. McNemar's
    exact test where every outcome is 0 or 1, else a permutation test that exchanges the two at
    random, example by example."""
    keys = [key for key in first if key in second]
    if not keys:
        return None
    a, b = (np.array([one[key] for key in keys]) for one in (first, second))
    d = b - a
    if not np.isfinite(d).all():
        return None
    larger, smaller = int((d > 0).sum()), int((d < 0).sum())
    better, worse = (larger, smaller) if higher_is_better else (smaller, larger)
    stderr = float(d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else None
    binary = bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
    p = _mcnemar(better, worse) if binary else _permuted(d, seed)
    test = "McNemar, exact" if binary else "paired permutations"
    return Paired(len(keys), float(d.mean()), stderr, better, worse, p, test)


def _mcnemar(better: int, worse: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _permuted(differences: np.ndarray, seed: int) -> float:
    from scipy.stats import permutation_test

    if not differences.any():
        return 1.0
    found = permutation_test(
        (differences, np.zeros_like(differences)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLED,
        batch=max(1, _AT_ONCE // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def recovery(
    target: Mapping[Key, float],
    result: Mapping[Key, float],
    tuned_target: Mapping[Key, float],
    seed: int,
    *,
    higher_is_better: bool = True,
) -> Recovery:
    """What of the skill of ``tuned_target`` the delta brought (Lin et al. 2025). Of scores that are
    good when small, all signs turn."""
    keys = [key for key in target if key in result and key in tuned_target]
    if not keys:
        return Recovery(None, None, None)
    rows = np.array([[one[key] for key in keys] for one in (target, result, tuned_target)])
    rows = rows if higher_is_better else -rows
    if not np.isfinite(rows).all():
        return Recovery(None, None, None)
    share = _share(rows.mean(axis=1))
    if share is None or len(keys) == 1:
        return Recovery(share, None, None)
    generator = np.random.default_rng(seed)
    drawn = [
        _share(rows[:, generator.integers(0, len(keys), len(keys))].mean(axis=1))
        for _ in range(1_000)
    ]
    # Where the skill does not show in a part of the samples, there is no interval to speak of.
    known = [value for value in drawn if value is not None]
    if len(known) < len(drawn):
        return Recovery(share, None, None)
    low, high = (float(value) for value in np.percentile(known, _INTERVAL))
    return Recovery(share, low, high)


def recovery_of_scores(
    target: float, result: float, tuned_target: float, *, higher_is_better: bool = True
) -> Recovery:
    """The same from the scores alone, where they are no means over examples: without interval."""
    scores = [score if higher_is_better else -score for score in (target, result, tuned_target)]
    return Recovery(_share(scores), None, None)


def _share(means: Sequence[float] | np.ndarray) -> float | None:
    target, result, tuned = (float(value) for value in means)
    return (result - target) / (tuned - target) if tuned > target else None
