from __future__ import annotations

import numpy as np
import pytest

from hubdiff.encodings import ENCODINGS
from hubdiff.errors import CorruptPayload

PLANES = ENCODINGS["planes"]


def test_lowest_byte_comes_first() -> None:
    blob = PLANES.encode(np.array([0x0102, 0x0304], np.uint16))
    assert blob == b"\x02\x02\x04" + b"\x02\x01\x03"


def test_planes_that_never_change_cost_two_bytes() -> None:
    small = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint64)
    assert len(PLANES.encode(small)) == (2 + 4000) + 7 * 2


def test_dense_residuals_come_close_to_the_entropy_of_their_bytes() -> None:
    residuals = np.abs(np.random.default_rng(0).normal(0, 300, 1 << 18)).astype(np.uint32)
    bound = 0.0
    for plane in residuals.view(np.uint8).reshape(-1, 4).T:
        shares = np.unique(plane, return_counts=True)[1] / plane.size
        bound -= float((shares * np.log2(shares)).sum()) * plane.size / 8
    assert len(PLANES.encode(residuals)) < 1.07 * bound


def test_a_missing_plane_is_named() -> None:
    blob = PLANES.encode(np.arange(10, dtype=np.uint16))
    with pytest.raises(CorruptPayload, match="plane 2"):
        PLANES.decode(blob, np.empty(10, np.uint32))
