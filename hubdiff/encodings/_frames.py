"""Streams: runs of bytes of a checked length, the one building block of packed blobs.

A stream is ``raw_size: u32, stored_size: u32, body``. ``stored_size`` alone tells how to read the
body: equal to ``raw_size``, the bytes themselves; 1, one byte repeated; otherwise one zstd frame.
A frame is only used where it is smaller, so the three can't be confused.

Nothing is allocated before its size is known to be what the caller expects: a frame's own content
size is compared first, so a small blob can't ask for a large buffer.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

import numpy as np
import zstandard

from hubdiff.errors import CorruptPayload

_STREAM = struct.Struct("<II")

_local = threading.local()  # a (de)compressor shared by two threads crashes the process


def corrupt(what: str) -> CorruptPayload:
    return CorruptPayload(
        what,
        next_step="Fetch the delta again; if it still fails, its publisher has to push it again.",
    )


def _compressor() -> zstandard.ZstdCompressor:
    """Matching nearly off: entropy-coded bytes have no repeats, so this is Huffman coding in
    standard frames. Pinned, because the same bits must give the same bytes."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(
                strategy=zstandard.STRATEGY_FAST,
                window_log=17,
                hash_log=6,
                min_match=7,
                write_content_size=True,
                write_checksum=True,
            )
        )
    compressor: zstandard.ZstdCompressor = _local.compressor
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _local.decompressor
    return decompressor


def write_stream(raw: np.ndarray) -> bytes:
    """``raw``, a 1-D uint8 array, as a stream: constant, compressed or as it is."""
    body = bytes(raw[:1])
    if raw.size > 1 and not (raw == raw[0]).all():
        body = _compressor().compress(np.ascontiguousarray(raw).data)
        if len(body) >= raw.size:
            body = raw.tobytes()
    return _STREAM.pack(raw.size, len(body)) + body


@dataclass(frozen=True)
class Stream:
    """A stream whose sizes are checked and whose body is still as it was stored: whoever needs the
    bytes says where to decode them. ``what`` names it in errors."""

    raw_size: int
    body: memoryview
    what: str
    encoding: str

    @property
    def repeated(self) -> int | None:
        """The one byte that the stream repeats, if it is stored so."""
        return self.body[0] if len(self.body) == 1 < self.raw_size else None

    @property
    def framed(self) -> bool:
        """Stored as a zstd frame."""
        return len(self.body) < self.raw_size and self.repeated is None

    def content(self) -> np.ndarray:
        """A 1-D uint8 array, read-only when it is a view of the blob or of a frame's content."""
        if self.repeated is not None:
            return np.full(self.raw_size, self.repeated, np.uint8)
        return np.frombuffer(self._unpacked() if self.framed else self.body, np.uint8)

    def check_frame(self) -> None:
        """Raise ``CorruptPayload`` unless the frame says that it holds ``raw_size`` bytes."""
        try:
            size = zstandard.frame_content_size(self.body)
        except zstandard.ZstdError as error:
            raise self.fail(f"can't be read ({error})") from error
        if size != self.raw_size:
            raise self.fail(f"holds {size} bytes, expected {self.raw_size}")

    def fail(self, what: str) -> CorruptPayload:
        return corrupt(f"Corrupt {self.encoding} blob: the frame of {self.what} {what}.")

    def _unpacked(self) -> bytes:
        self.check_frame()
        try:
            content: bytes = _decompressor().decompress(
                self.body, max_output_size=self.raw_size, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise self.fail(f"can't be read ({error})") from error
        if len(content) != self.raw_size:
            raise self.fail(f"gave {len(content)} bytes, expected {self.raw_size}")
        return content


class BlobReader:
    """A cursor over one blob. Every read names what it reads, for the error message."""

    def __init__(self, blob: bytes | memoryview, encoding: str) -> None:
        self._blob = memoryview(blob).cast("B")
        self._offset = 0
        self._encoding = encoding

    def fail(self, what: str) -> CorruptPayload:
        return corrupt(f"Corrupt {self._encoding} blob: {what}.")

    def take(self, size: int, what: str) -> memoryview:
        left = len(self._blob) - self._offset
        if size > left:
            raise self.fail(f"{what} needs {size} bytes, {left} are left")
        piece = self._blob[self._offset : self._offset + size]
        self._offset += size
        return piece

    def uint(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def stream(self, what: str, least: int, most: int | None = None) -> Stream:
        """The next stream, of ``least`` to ``most`` bytes (exactly ``least`` by default)."""
        raw_size, stored_size = _STREAM.unpack(self.take(_STREAM.size, f"the header of {what}"))
        if not least <= raw_size <= (least if most is None else most):
            wanted = f"{least}" if most is None else f"{least} to {most}"
            raise self.fail(f"{what} declares {raw_size} bytes, expected {wanted}")
        if stored_size > raw_size:
            raise self.fail(f"{what} stores {stored_size} bytes for {raw_size}")
        return Stream(raw_size, self.take(stored_size, what), what, self._encoding)

    def end(self) -> None:
        left = len(self._blob) - self._offset
        if left:
            raise self.fail(f"{left} bytes follow its end")
