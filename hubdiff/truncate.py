"""Truncated SVD: the best factors of a given rank for a matrix, and how far off they are.

Singular values and vectors come from the eigenvalues of the smaller Gram matrix, ΔᵀΔ or ΔΔᵀ, summed
in float64 of a float32 Δ: as exact as float32 can tell, and the only large thing in memory besides
Δ itself. √σ goes into either factor, so that both have the same magnitude, which float16 needs.

The factors are BF16 where that costs next to nothing. For a Δ of full rank, what is cut off is
hundreds of times the rounding of BF16; a Δ that was a product to begin with needs F32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hubdiff.encodings import SEGMENT
from hubdiff.encodings.low_rank import Product
from hubdiff.manifest import LowRank

_TOLERATED = 1.01  # the error of BF16 factors over that of F32 ones
_NOISE = 1e-13  # eigenvalues below this share of the largest are rounding
_ROWS = 1024


@dataclass(frozen=True)
class Truncation:
    """What to keep of every matrix: the ``rank`` largest singular values, or as many of them as
    hold ``energy`` of ‖Δ‖². One of the two is None."""

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Truncated:
    """The factors as a payload, and what the manifest says of them."""

    payload: bytes
    low_rank: LowRank


def truncate(delta: torch.Tensor, wanted: Truncation, most_bytes: int) -> Truncated | None:
    """The factors of ``delta`` (two dimensions, float32). None where they would not be smaller than
    ``most_bytes``, and for a Δ that is 0 or not finite. Needs the memory of Δ, five times that of
    the smaller Gram matrix (float64), and the factors."""
    square = sum(float(piece.square().sum()) for piece in _pieces(delta))
    if not 0 < square < math.inf:
        return None
    svd = _SVD(delta, square)
    if wanted.rank is not None:
        return svd.factors(min(wanted.rank, svd.rank), 0.0, most_bytes)
    assert wanted.energy is not None
    # Rounded factors keep a little less than the singular values promise: one more then serves.
    for rank in range(svd.rank_for(wanted.energy), svd.rank + 1):
        found = svd.factors(rank, wanted.energy, most_bytes)
        if found is not None or svd.product(rank, "BF16").nbytes >= most_bytes:
            return found
    return None


class _SVD:
    """Singular values and the singular vectors of the shorter side."""

    def __init__(self, delta: torch.Tensor, square: float) -> None:
        self._delta, self._square = delta, square
        self._tall = delta.shape[0] >= delta.shape[1]
        long = delta if self._tall else delta.T
        side = long.shape[1]
        gram = torch.zeros(side, side, dtype=torch.float64)
        for piece in _pieces(long):
            gram.addmm_(piece.T, piece)
        values, vectors = torch.linalg.eigh(gram)
        self._values, self._vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        self.rank = max(1, int((self._values > _NOISE * self._values[0]).sum()))

    def rank_for(self, energy: float) -> int:
        kept = torch.cumsum(self._values, 0) / self._square
        return min(int((kept < energy).sum()) + 1, self.rank)

    def product(self, rank: int, dtype: str) -> Product:
        return Product.of(tuple(self._delta.shape), rank, dtype, 1.0)

    def factors(self, rank: int, energy: float, most_bytes: int) -> Truncated | None:
        """The smaller of BF16 and F32 factors that will do."""
        if self.product(rank, "BF16").nbytes >= most_bytes:
            return None
        left, right = self._exact(rank)
        exact = self._stored(left, right, "F32")
        rounded = self._stored(left, right, "BF16")
        best = exact.low_rank.error
        if rounded.low_rank.error <= _TOLERATED * best and _keeps(rounded, energy):
            return rounded
        small = len(exact.payload) < most_bytes
        return exact if small and _keeps(exact, energy) else None

    def _exact(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """L and R in float64."""
        root = self._values[:rank].sqrt().sqrt()
        vectors = self._vectors[:, :rank]
        long = self._delta if self._tall else self._delta.T
        others = torch.cat([piece @ vectors for piece in _pieces(long)])
        one, other = others / root, (vectors * root).T
        return (one, other) if self._tall else (other.T, one.T)

    def _stored(self, left: torch.Tensor, right: torch.Tensor, dtype: str) -> Truncated:
        payload = b"".join(_bytes(factor, dtype) for factor in (left, right))
        rank = left.shape[1]
        kept = float(self._values[:rank].sum()) / self._square
        error = self._error(self.product(rank, dtype), payload)
        return Truncated(payload, LowRank(rank, None, 1.0, dtype, error, min(kept, 1.0)))

    def _error(self, product: Product, payload: bytes) -> float:
        """‖Δ − L·R‖/‖Δ‖ of the very elements that a reader makes."""
        flat, missing = self._delta.reshape(-1), 0.0
        for first in range(0, len(flat), SEGMENT):
            here = flat[first : first + SEGMENT]
            made = np.empty(len(here), np.float32)
            product.fill(payload, first, made)
            missing += float((here.double() - torch.from_numpy(made).double()).square().sum())
        return math.sqrt(missing / self._square)


def _keeps(made: Truncated, energy: float) -> bool:
    return 1 - made.low_rank.error**2 >= energy


def _pieces(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows at a time, in float64."""
    return (piece.double() for piece in matrix.split(_ROWS))


def _bytes(factor: torch.Tensor, dtype: str) -> bytes:
    if dtype == "BF16":
        return (
            factor.float().bfloat16().contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
        )
    return factor.float().contiguous().numpy().astype("<f4").tobytes()
