"""A few thousand of the inputs of fuzz.py on every run; all 200,000 with that script itself."""

from __future__ import annotations

import random

import pytest
from fuzz import TARGETS, fuzz, mutated, strange


@pytest.mark.parametrize("target", TARGETS)
def test_only_hubdiff_errors_come_out(target: str) -> None:
    counts = fuzz(700, seed=1, only=target)
    assert counts[f"{target} refused"] > 100, counts


def test_mutations_do_change_something() -> None:
    data, document = bytes(range(200)), {"a": [1, {"b": None}], "c": "d"}
    rng = random.Random(0)
    assert sum(mutated(rng, data) != data for _ in range(200)) > 190
    assert sum(strange(rng, document) != document for _ in range(200)) > 150
