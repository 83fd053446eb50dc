"""A tensor's payload: an index of blob sizes, then the blobs.

A tensor of ``count`` elements is cut into segments of ``SEGMENT`` elements, the last one shorter.
Each segment has one blob per layer: layer 0, and layer 1 where the manifest declares a tail. The
index is one ``u32`` per blob but the last, segment by segment, so any segment can be found and read
alone; the last blob has what is left of the payload.

A size of 0 means that this layer changes nothing in this segment. A tensor without elements has no
segments, no index and no bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hubdiff.encodings import SEGMENT
from hubdiff.encodings._frames import corrupt

_SIZE = np.dtype("<u4")


class BlobRange(NamedTuple):
    offset: int  # bytes from the start of the payload
    size: int


def index_bytes(count: int, layers: int) -> int:
    """Bytes of the index, known before any of the payload is read."""
    return max(0, -(-count // SEGMENT) * layers - 1) * _SIZE.itemsize


def write_index(sizes: Sequence[int]) -> bytes:
    """The index for blobs of these sizes, given in payload order (segment by segment)."""
    return np.array(sizes[:-1], _SIZE).tobytes()


def parse_index(
    raw: bytes | memoryview, count: int, layers: int, payload_bytes: int
) -> list[BlobRange]:
    """Where each blob lies, in payload order: that of segment s and layer l is ``s * layers + l``.

    ``raw`` is the first ``index_bytes(count, layers)`` bytes of a payload of ``payload_bytes``.
    Raises CorruptPayload unless the blobs fill the rest of the payload exactly.
    """
    expected = index_bytes(count, layers)
    if memoryview(raw).nbytes != expected:
        raise corrupt(
            f"The index of a payload of {payload_bytes} bytes is cut short: "
            f"{memoryview(raw).nbytes} bytes, expected {expected}."
        )
    blobs = -(-count // SEGMENT) * layers
    if not blobs:
        if payload_bytes:
            raise corrupt(f"The payload of no elements has {payload_bytes} bytes.")
        return []
    begins = expected + np.cumsum([0, *np.frombuffer(raw, _SIZE).tolist()], dtype=np.int64)
    if begins[-1] > payload_bytes:
        raise corrupt(
            f"A payload's last blob begins at byte {begins[-1]}, the payload has {payload_bytes}."
        )
    ends = [*begins[1:].tolist(), payload_bytes]
    return [BlobRange(b, e - b) for b, e in zip(begins.tolist(), ends, strict=True)]
