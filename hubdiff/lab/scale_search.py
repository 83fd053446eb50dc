"""A small search for the scale of a delta.

The score over α is a hill with noise on it: coarse steps find it, and the wider gap beside the best
so far is halved while evaluations are left. α is chosen on one half of the examples; the other half
says what it is worth, since the best of many on the same examples always looks better than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hubdiff.lab.scores import Key, TaskScore

COARSE = (0.0, 0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Tried:
    """``choosing`` and ``held_out`` are the mean scores over the tasks on the two halves, good when
    large; ``stderr`` is that of all examples together."""

    scale: float
    choosing: float
    held_out: float
    stderr: float | None


def search(
    measure: Callable[[float], Tried], evaluations: int, coarse: Sequence[float] = COARSE
) -> list[Tried]:
    """What was tried, in the order of the scale; ``evaluations`` at most."""
    tried = {scale: measure(scale) for scale in coarse[:evaluations]}
    while len(tried) < evaluations:
        scale = _next(tried)
        if scale is None:
            break
        tried[scale] = measure(scale)
    return [tried[scale] for scale in sorted(tried)]


def best(tried: Sequence[Tried]) -> Tried:
    """The best on the half that chooses; of equals the nearest to 1, what the tune itself was."""
    return max(tried, key=lambda one: (one.choosing, -abs(one.scale - 1), one.scale))


def _next(tried: Mapping[float, Tried]) -> float | None:
    """The middle of the wider gap beside the best; None where both are too small to matter."""
    scales = sorted(tried)
    at = scales.index(best(list(tried.values())).scale)
    gaps = [(scales[i + 1] - scales[i], i) for i in (at - 1, at) if 0 <= i < len(scales) - 1]
    width, i = max(gaps, default=(0.0, 0))
    return (scales[i] + scales[i + 1]) / 2 if width > 0.05 else None


def halves(scores: Sequence[TaskScore]) -> tuple[float, float]:
    """The mean score over tasks on the even and on the odd examples, small ones turned where small
    is good."""
    means = [[], []]  # type: list[list[float]]
    for score in scores:
        sign = 1.0 if score.higher_is_better else -1.0
        for half, found in enumerate(means):
            values = [v for (_, number), v in score.outcomes.items() if number % 2 == half]
            found.append(sign * sum(values) / len(values))
    even, odd = (sum(found) / len(found) for found in means)
    return even, odd


def held_out(score: TaskScore) -> dict[Key, float]:
    """The outcomes that did not choose."""
    return {key: value for key, value in score.outcomes.items() if key[1] % 2 == 1}
