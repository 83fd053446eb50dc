"""Encodings: bit patterns to bytes and back, nothing else.

An encoding is a pure function on one *segment*: a 1-D array of at most ``SEGMENT`` unsigned
integers, the bit patterns of a tensor's elements. It knows no tensor names, no floats, no torch.

- ``decode(encode(bits))`` gives every bit back; the same bits give the same bytes on every run.
- ``decode`` fills ``out``, whose dtype and length are what the manifest declared, or raises
  ``CorruptPayload``. It trusts no length it reads, and allocates a small multiple of ``out``.
- On disk everything is little-endian. FORMAT.md, "Payloads", specifies the bytes.

A new encoding is one module here, one line in ``ENCODINGS`` and one test module; the shared battery
in tests/encodings picks it up from the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from hubdiff.encodings._frames import Stream
from hubdiff.encodings.packed import Packed
from hubdiff.encodings.plain import Plain
from hubdiff.encodings.planes import Planes

__all__ = ["ENCODINGS", "SEGMENT", "Encoding", "Stream"]

# Elements per segment. Smaller ones cost size (64Ki: +1.3 %), larger ones decode slower (2Mi: by a
# third) and hold more memory; readers work in parallel over segments.
SEGMENT = 1 << 20


class Encoding(Protocol):
    @property
    def name(self) -> str:
        """What the manifest calls it."""

    @property
    def widths(self) -> frozenset[int]:
        """The element widths, in bits, that it takes."""

    def encode(self, bits: np.ndarray) -> bytes:
        """The blob of one segment. ``bits`` is 1-D, unsigned, of an accepted width."""

    def decode(self, blob: bytes | memoryview, out: np.ndarray) -> None:
        """Fill ``out`` (1-D, C-contiguous, unsigned) from ``blob``; CorruptPayload if it can't."""


ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {encoding.name: encoding for encoding in (Packed(), Planes(), Plain())}
)
