"""Differences of bf16 models, made as a fine-tune makes them, without torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

UNCHANGED = 0x8000  # -0.0


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="session")
def bf16_delta() -> Callable[[int, float], np.ndarray]:
    """``bf16_delta(count, step)``: bits of round(base + N(0, step)) - base, base N(0, 0.02)."""

    def make(count: int, step: float) -> np.ndarray:
        rng = np.random.default_rng(7)
        base = _floats(_bf16_bits(rng.normal(0, 0.02, count)))
        tuned = _floats(_bf16_bits(base + rng.normal(0, step, count)))
        delta = _bf16_bits(tuned - base)
        delta[tuned == base] = UNCHANGED
        return delta

    return make
