"""Merge methods: several Δ of one segment, or parts of one, added to the target.

Each is a short pure function on torch tensors of one dimension, on whatever device they lie. Δ come
in float32 and in the order of the deltas, sums are made in float32 (float64 for a float64 target)
in that order, and ``numerics.settle`` rounds the result once. Products and sums are separate
operations, each rounded by IEEE 754: a fused multiply-add, which some devices would use for the
two, has other bits.

Sources: task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089); TIES, Yadav et al. 2023
(2306.01708); DARE, Yu et al. 2024 (2311.03099).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def linear(target: Tensor, deltas: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """target + Σ factor · Δ."""
    total = _wide(target)
    for delta, factor in zip(deltas, factors, strict=True):
        total = total + delta * factor
    return total


def ties(
    target: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], factors: Sequence[float]
) -> Tensor:
    """target + the weighted mean of the Δ that have the elected sign, that of Σ weight · Δ.

    A sum of exactly 0 elects plus. ``factors`` are the weights times what the mean is scaled with.
    Where the weights that agree add up to 0 they are not divided by. A NaN stays NaN.
    """
    votes = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    elected = torch.zeros_like(votes[0])
    for vote in votes:
        elected = elected + vote
    plus = elected >= 0
    total, share = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, vote, weight, factor in zip(deltas, votes, weights, factors, strict=True):
        agrees = ~torch.where(plus, vote <= 0, vote >= 0)
        total = total + torch.where(agrees, delta * factor, 0.0)
        share = share + agrees.to(share.dtype) * weight
    return _wide(target) + total / torch.where(share == 0, 1.0, share)


def trimmed(delta: Tensor, magnitude: Tensor, threshold: int, ties: int) -> Tensor:
    """Δ with 0 for all but the elements whose ``magnitude`` (a bit pattern without its sign) is
    above ``threshold``, and the first ``ties`` of those that equal it."""
    kept = magnitude > threshold
    if ties:
        equal = magnitude == threshold
        kept |= equal & (torch.cumsum(equal, 0) <= ties)
    return torch.where(kept, delta, 0.0)


def dropped(delta: Tensor, kept: Tensor, density: float) -> Tensor:
    """Δ / density where ``kept``, else 0: the same Δ on the average."""
    return torch.where(kept, delta / density, 0.0)


def drawn(identity: str, seed: int, segment: int, count: int, density: float) -> Tensor:
    """Which of the ``count`` elements of a segment are kept, each with the chance ``density``.

    The same everywhere and whatever else is computed: Philox 4x64-10, a counter-based generator,
    with its key from ``seed`` and ``identity`` (of the tensor and its Δ) and its counter from the
    segment. Its words are taken raw, which numpy keeps the same in all versions: the lower 32 bits
    of each first; an element is kept where they are below density · 2^32.
    """
    key = hashlib.blake2b(f"{seed}\0{identity}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(key, "<u8"), counter=[0, 0, 0, segment])
    words = generator.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u4")[:count]
    limit = round(density * 2**32)
    if limit == 2**32:
        return torch.ones(count, dtype=torch.bool)
    return torch.from_numpy(words < np.uint32(limit))


def _wide(target: Tensor) -> Tensor:
    return target if target.dtype == torch.float64 else target.float()
