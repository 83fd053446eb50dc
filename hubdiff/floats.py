"""Bit patterns of 16- and 32-bit floats as numbers, with numpy alone, and numbers as BF16."""

from __future__ import annotations

import numpy as np

BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_QUIET_NAN = 0x7FC0


def floats(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that ``patterns`` (unsigned, little-endian) stand for, exact in float32."""
    if dtype == "BF16":
        wide: np.ndarray = (patterns.astype(np.uint32) << 16).view(np.float32)
        return wide
    return patterns.view(f"<f{BYTES[dtype]}").astype(np.float32, copy=False)


def bf16(values: np.ndarray) -> np.ndarray:
    """The BF16 patterns of float32 ``values``, rounded to nearest even; every NaN is the quiet
    one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = _QUIET_NAN
    return rounded


def to_dtype(patterns: np.ndarray, dtype: str, wanted: str) -> np.ndarray:
    """Patterns of ``dtype`` as those of another, rounded to nearest even where it is narrower."""
    if dtype == wanted:
        return patterns
    values = floats(patterns, dtype)
    if wanted == "BF16":
        return bf16(values)
    size = {"F16": 2, "F32": 4, "F64": 8}[wanted]
    with np.errstate(over="ignore"):  # what is too large for F16 is infinite there
        return values.astype(f"<f{size}").view(f"<u{size}")
