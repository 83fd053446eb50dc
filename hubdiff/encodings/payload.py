"""A tensor's payload: an index of blob sizes, then the blobs.

A tensor of ``count`` elements is cut into segments of ``SEGMENT`` elements, the last one shorter.
Each segment has one blob per layer: layer 0, and layer 1 where the manifest declares a tail. The
index is one ``u32`` per blob, segment by segment, so any segment can be found and read alone.

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


def segment_counts(count: int) -> list[int]:
    """Elements in each segment of a tensor of ``count`` elements."""
    full, rest = divmod(count, SEGMENT)
    return [SEGMENT] * full + [rest] * (rest > 0)


def index_bytes(count: int, layers: int) -> int:
    """Bytes of the index, known before any of the payload is read."""
    return -(-count // SEGMENT) * layers * _SIZE.itemsize


def write_index(sizes: Sequence[int]) -> bytes:
    """The index for blobs of these sizes, given in payload order (segment by segment)."""
    return np.array(sizes, _SIZE).tobytes()


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
    sizes = np.frombuffer(raw, _SIZE).astype(np.int64)
    ends = np.cumsum(sizes) + expected
    total = int(ends[-1]) if sizes.size else 0
    if total != payload_bytes:
        raise corrupt(f"A payload's blobs end at byte {total}, expected {payload_bytes}.")
    return [BlobRange(int(end - size), int(size)) for end, size in zip(ends, sizes, strict=True)]
