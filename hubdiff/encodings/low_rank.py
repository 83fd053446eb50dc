"""``low-rank``: Δ of a matrix as the product of two factors, ``scale · L · R``.

Unlike the other encodings this one is no function on segments of bits: the payload is the two
factors as they are, L (rows × rank) and then R (rank × columns), row-major, little-endian, in one
of three float dtypes. Any run of the product's elements can be made from it.

The product is defined to the bit, so that every reader on every machine gets the same one: an
element is ``RN32(RN64(scale · Σ L[i, k] · R[k, j]))``, the sum taken in binary64 from k = 0 on. A
product of two numbers of 24 bits is exact in binary64, so a fused multiply-add changes nothing; a
matrix multiplication of a library does, because it chooses its own order. Where the result is a
zero of either sign it is −0.0, "no change".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hubdiff.encodings._frames import corrupt
from hubdiff.floats import BYTES, floats

_TILE = (64, 2048)  # rows and columns of the sums in work: 1 MiB, which stays in the cache


@dataclass(frozen=True)
class Product:
    """What a payload is the factors of: a ``rows`` × ``columns`` matrix, ``scale · L · R``."""

    rows: int
    columns: int
    rank: int
    dtype: str
    scale: float

    @classmethod
    def of(cls, shape: tuple[int, ...], rank: int, dtype: str, scale: float) -> Product:
        """For a tensor of two or more dimensions: all but the first are the columns."""
        return cls(shape[0], math.prod(shape[1:]), rank, dtype, scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return (self.rows + self.columns) * self.rank * BYTES[self.dtype]

    def fill(self, payload: bytes | memoryview, first: int, out: np.ndarray) -> None:
        """Write the elements from ``first`` on, counted row by row, into ``out`` (1-D, float32).
        Raises ``CorruptPayload`` for a payload of another size, or of numbers that are none."""
        left, right = self.factors(payload)
        done = 0
        for rows, columns in self._rectangles(first, len(out)):
            count = (rows.stop - rows.start) * (columns.stop - columns.start)
            tile = out[done : done + count].reshape(rows.stop - rows.start, -1)
            self._multiply(left[rows], right[:, columns], tile)
            done += count

    def factors(self, payload: bytes | memoryview) -> tuple[np.ndarray, np.ndarray]:
        """The bit patterns of L and R; they share the payload's memory."""
        if memoryview(payload).nbytes != self.nbytes:
            raise corrupt(
                f"Corrupt low-rank payload: {memoryview(payload).nbytes} bytes, expected "
                f"{self.nbytes}."
            )
        patterns = np.frombuffer(payload, f"<u{BYTES[self.dtype]}")
        cut = self.rows * self.rank
        return patterns[:cut].reshape(-1, self.rank), patterns[cut:].reshape(self.rank, -1)

    def _rectangles(self, first: int, count: int) -> Iterator[tuple[slice, slice]]:
        """A run of elements as what it has of its first row, whole rows, and the start of a last
        one."""
        last = first + count
        while first < last:
            row, column = divmod(first, self.columns)
            whole = (last - first) // self.columns if column == 0 else 0
            if whole:
                yield slice(row, row + whole), slice(0, self.columns)
                first += whole * self.columns
            else:
                end = min(self.columns, column + last - first)
                yield slice(row, row + 1), slice(column, end)
                first += end - column

    def require_numbers(self, payload: bytes | memoryview) -> None:
        """Raise ``CorruptPayload`` for a factor that holds Inf or NaN."""
        for factor in self.factors(payload):
            _wide(factor, self.dtype)

    def _multiply(self, left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
        import torch

        rows, columns = out.shape
        for c in range(0, columns, _TILE[1]):
            inner = torch.from_numpy(_wide(right[:, c : c + _TILE[1]], self.dtype))
            for r in range(0, rows, _TILE[0]):
                outer = torch.from_numpy(_wide(left[r : r + _TILE[0]], self.dtype))
                total = outer.new_zeros(outer.shape[0], inner.shape[1])
                for k in range(self.rank):
                    total.addcmul_(outer[:, k, None], inner[k])
                # "No change" for a zero: adding +0.0 would turn a −0.0 of the target into +0.0.
                rounded = total.mul_(self.scale).float()
                rounded[rounded == 0] = -0.0
                out[r : r + _TILE[0], c : c + _TILE[1]] = rounded.numpy()


def _wide(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """A piece of a factor as float64."""
    values = floats(patterns, dtype)
    if not np.isfinite(values).all():
        raise corrupt("Corrupt low-rank payload: a factor holds Inf or NaN.")
    return values.astype(np.float64)
