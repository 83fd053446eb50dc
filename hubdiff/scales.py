"""Scales: α for all tensors, or per tensor by glob, as a caller gives it and as a record keeps it.

A number stands for every tensor; a mapping gives globs on the delta's tensor names, in order, and
the last one that matches a name wins. Braces are expanded as a shell does: ``{a,b}``, ``{0..7}``,
``{0..30..2}``, also inside each other. A name that nothing matches has the scale 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from functools import lru_cache
from itertools import pairwise

from hubdiff.errors import CannotApply

ALL = "*"
LARGEST_FLOAT32 = 3.4028234663852886e38
# What one pair of braces too many could ask for: {0..999999} is a typing error, not a plan.
MOST_EXPANDED = 1000

_RANGE = re.compile(r"(-?\d{1,9})\.\.(-?\d{1,9})(?:\.\.(-?\d{1,9}))?")


def is_number(value: object) -> bool:
    """Whether a caller gave a number, as types would have it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Scales:
    """``pairs`` of (glob, scale), in order. No pairs: 1 for all."""

    pairs: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, given: float | Mapping[str, float]) -> Scales:
        """From a number, or from a mapping glob → number. Raises ``CannotApply`` for one that
        float32 can't hold, or for braces that mean too much."""
        pairs = given.items() if isinstance(given, Mapping) else [(ALL, given)]
        for glob, scale in pairs:
            if not is_number(scale) or not abs(scale) <= LARGEST_FLOAT32:
                raise CannotApply(
                    f"the scale {scale!r} is not a float32 number",
                    next_step="Give a finite --scale.",
                )
            _expanded(glob)
        return cls(tuple((glob, float(scale)) for glob, scale in pairs))

    @property
    def one(self) -> float | None:
        """The scale of every tensor, None where it depends on the tensor."""
        if not self.pairs:
            return 1.0
        return self.pairs[0][1] if len(self.pairs) == 1 and self.pairs[0][0] == ALL else None

    def of_tensor(self, name: str) -> float:
        found = (scale for glob, scale in reversed(self.pairs) if matches(name, glob))
        return next(found, 1.0)

    def check(self, names: Collection[str]) -> None:
        """Raise ``CannotApply`` for a glob that matches none of ``names``: it is misspelt."""
        for glob, scale in self.pairs:
            if any(matches(name, glob) for name in names):
                continue
            near = get_close_matches(_expanded(glob)[0], names, n=3, cutoff=0.3)
            hint = f"; the nearest names are {', '.join(near)}" if near else ""
            raise CannotApply(
                f"--scale {glob}={scale:g}: no tensor of the delta matches that glob{hint}",
                next_step="Check it against the tensor names (hubdiff inspect --json).",
            )

    def as_json(self) -> float | dict[str, float]:
        """As ``of`` takes it."""
        return dict(self.pairs) if self.one is None else self.one

    def __str__(self) -> str:
        if self.one is not None:
            return f"{self.one:g}"
        return ", ".join(f"{scale:g} for {glob}" for glob, scale in self.pairs)


def matches(name: str, glob: str) -> bool:
    return any(pattern.match(name) for pattern in _patterns(glob))


def expand_braces(glob: str) -> list[str]:
    """The globs without braces that ``glob`` stands for, in the order a shell gives them. A pair of
    braces that is neither a list nor a range stands for itself. Raises ``CannotApply`` for more
    than ``MOST_EXPANDED``."""
    found = _first_braces(glob)
    if found is None:
        return [glob]
    before, choices, after = found
    rests = expand_braces(after)
    inner = [text for choice in choices for text in expand_braces(choice)]
    if len(inner) * len(rests) > MOST_EXPANDED:
        raise _too_many(glob)
    return [before + choice + rest for choice in inner for rest in rests]


def _first_braces(glob: str) -> tuple[str, list[str], str] | None:
    """What stands before the first pair of braces that means something, its choices, the rest."""
    for start, char in enumerate(glob):
        if char != "{":
            continue
        end, commas = _closing(glob, start)
        if end is None:
            continue
        inside = glob[start + 1 : end]
        if commas:
            cuts = [start, *commas, end]
            choices = [glob[a + 1 : b] for a, b in pairwise(cuts)]
            return glob[:start], choices, glob[end + 1 :]
        numbers = _RANGE.fullmatch(inside)
        if numbers:
            return glob[:start], _numbers(numbers, glob), glob[end + 1 :]
    return None


def _closing(glob: str, start: int) -> tuple[int | None, list[int]]:
    """Where the brace at ``start`` closes, and the commas that are its own."""
    depth, commas = 0, []
    for place in range(start, len(glob)):
        char = glob[place]
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 1:
            commas.append(place)
        if depth == 0:
            return place, commas
    return None, []


def _numbers(numbers: re.Match[str], glob: str) -> list[str]:
    first, last, step = numbers.groups()
    begin, end = int(first), int(last)
    stride = max(1, abs(int(step or 1)))
    if abs(end - begin) // stride >= MOST_EXPANDED:
        raise _too_many(glob)
    # {08..10} keeps its zeros.
    padded = any(re.match(r"-?0\d", text) for text in (first, last))
    width = max(len(first), len(last)) if padded else 0
    direction = 1 if begin <= end else -1
    return [f"{n:0{width}d}" for n in range(begin, end + direction, direction * stride)]


def _too_many(glob: str) -> CannotApply:
    return CannotApply(
        f"the braces of {glob!r} stand for more than {MOST_EXPANDED:,} globs",
        next_step="Write * where any number will do.",
    )


@lru_cache(maxsize=256)
def _expanded(glob: str) -> list[str]:
    return expand_braces(glob)


@lru_cache(maxsize=256)
def _patterns(glob: str) -> list[re.Pattern[str]]:
    return [re.compile(translate(one)) for one in _expanded(glob)]
