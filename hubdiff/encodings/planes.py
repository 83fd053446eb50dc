"""``planes``: one stream per byte of the element, lowest byte first.

For raw bits (tensors a difference can't express) and for dense 32-bit residuals: bytes of the same
weight are alike, so each plane compresses, or is stored, on its own. Not for 16-bit floats, where
``packed`` does the same with the sign moved out of the way.
"""

from __future__ import annotations

import sys

import numpy as np

from hubdiff.encodings._frames import BlobReader, Stream, write_stream


def split(bits: np.ndarray) -> np.ndarray:
    """Row i holds byte i (little-endian) of every element: shape (itemsize, elements), a view."""
    little = np.ascontiguousarray(bits, bits.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(-1, bits.itemsize).T


def join(planes: list[np.ndarray], out: np.ndarray) -> None:
    """The inverse of ``split``, into ``out``."""
    columns = out.view(np.uint8).reshape(-1, out.itemsize).T
    low_first = columns if sys.byteorder == "little" else columns[::-1]
    for column, plane in zip(low_first, planes, strict=True):
        column[:] = plane


def parse(blob: bytes | memoryview, count: int, itemsize: int) -> list[Stream]:
    """The planes of ``count`` elements, lowest byte first."""
    reader = BlobReader(blob, Planes.name)
    planes = [reader.stream(f"plane {index}", count) for index in range(itemsize)]
    reader.end()
    return planes


class Planes:
    name = "planes"
    widths = frozenset({8, 16, 32, 64})

    def encode(self, bits: np.ndarray) -> bytes:
        return b"".join(write_stream(plane) for plane in split(bits))

    def decode(self, blob: bytes | memoryview, out: np.ndarray) -> None:
        join([plane.content() for plane in parse(blob, out.size, out.itemsize)], out)
