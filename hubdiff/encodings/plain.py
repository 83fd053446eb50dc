"""``plain``: the bytes themselves, little-endian. What any tool can read, and never larger."""

from __future__ import annotations

import sys

import numpy as np

from hubdiff.encodings._frames import corrupt


class Plain:
    name = "plain"
    widths = frozenset({8, 16, 32, 64})

    def encode(self, bits: np.ndarray) -> bytes:
        return bits.astype(bits.dtype.newbyteorder("<"), copy=False).tobytes()

    def decode(self, blob: bytes | memoryview, out: np.ndarray) -> None:
        if memoryview(blob).nbytes != out.nbytes:
            raise corrupt(
                f"Corrupt plain blob: {memoryview(blob).nbytes} bytes, expected {out.nbytes}."
            )
        out.view(np.uint8)[:] = np.frombuffer(blob, np.uint8)
        if sys.byteorder == "big":
            out.byteswap(inplace=True)
