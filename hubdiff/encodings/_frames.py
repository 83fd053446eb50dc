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

    def stream(self, what: str, least: int, most: int | None = None) -> np.ndarray:
        """The next stream, of ``least`` to ``most`` bytes (exactly ``least`` by default).

        A 1-D uint8 array, read-only when it is a view of the blob or of a frame's content.
        """
        raw_size, stored_size = _STREAM.unpack(self.take(_STREAM.size, f"the header of {what}"))
        if not least <= raw_size <= (least if most is None else most):
            wanted = f"{least}" if most is None else f"{least} to {most}"
            raise self.fail(f"{what} declares {raw_size} bytes, expected {wanted}")
        if stored_size > raw_size:
            raise self.fail(f"{what} stores {stored_size} bytes for {raw_size}")
        body = self.take(stored_size, what)
        if stored_size == raw_size:
            return np.frombuffer(body, np.uint8)
        if stored_size == 1:
            return np.full(raw_size, body[0], np.uint8)
        return np.frombuffer(self._frame(body, raw_size, what), np.uint8)

    def end(self) -> None:
        left = len(self._blob) - self._offset
        if left:
            raise self.fail(f"{left} bytes follow its end")

    def _frame(self, body: memoryview, raw_size: int, what: str) -> bytes:
        try:
            size = zstandard.frame_content_size(body)
            if size != raw_size:
                raise self.fail(f"the frame of {what} holds {size} bytes, expected {raw_size}")
            content: bytes = _decompressor().decompress(
                body, max_output_size=raw_size, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise self.fail(f"the frame of {what} can't be read ({error})") from error
        if len(content) != raw_size:
            raise self.fail(f"the frame of {what} gave {len(content)} bytes, expected {raw_size}")
        return content
