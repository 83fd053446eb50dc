"""Streams: runs of bytes of a known length, the one building block of packed blobs.

A stream is ``stored_size: varint, body``. ``stored_size`` alone tells how to read the body: equal
to the length, the bytes themselves; 1, one byte repeated; otherwise one zstd frame. A frame is only
used where it is smaller, so the three can't be confused. A blob of a small tensor has little more
than the heads of its streams, so these are as short as can be.

Nothing is allocated before its size is known to be what the caller expects: a frame's own content
size is compared first, so a small blob can't ask for a large buffer.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import zstandard

from hubdiff.errors import CorruptPayload

_VARINT_BYTES = 5  # enough for 32 bits

_local = threading.local()  # a (de)compressor shared by two threads crashes the process


def corrupt(what: str) -> CorruptPayload:
    return CorruptPayload(
        what,
        next_step="Fetch the delta again; if it still fails, its publisher has to push it again.",
    )


def _compressor() -> zstandard.ZstdCompressor:
    """Matching nearly off: entropy-coded bytes have no repeats, so this is Huffman coding in
    standard frames. Without zstd's checksum, since the payload has a hash. Pinned, because the same
    bits must give the same bytes."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(
                strategy=zstandard.STRATEGY_FAST,
                window_log=17,
                hash_log=6,
                min_match=7,
                write_content_size=True,
            )
        )
    compressor: zstandard.ZstdCompressor = _local.compressor
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _local.decompressor
    return decompressor


def write_varint(value: int) -> bytes:
    """LEB128: seven bits to a byte, the lowest first, the top bit set on all but the last."""
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def is_constant(values: np.ndarray) -> bool:
    """Whether ``values`` (not empty) are all the same. Two of them nearly always tell."""
    return bool(values[0] == values[values.size // 2] and (values == values[0]).all())


def write_stream(raw: np.ndarray) -> bytes:
    """``raw``, a 1-D uint8 array, as a stream: constant, compressed or as it is."""
    body = bytes(raw[:1])
    if raw.size > 1 and not is_constant(raw):
        body = _compressor().compress(np.ascontiguousarray(raw).data)
        if len(body) >= raw.size:
            body = raw.tobytes()
    return write_varint(len(body)) + body


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

    def varint(self, what: str) -> int:
        value = 0
        for place in range(_VARINT_BYTES):
            byte = self.uint(1, what)
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                return value
        raise self.fail(f"{what} is written in more than {_VARINT_BYTES} bytes")

    def count(self, what: str, least: int, most: int) -> int:
        """A varint between two bounds."""
        value = self.varint(what)
        if not least <= value <= most:
            raise self.fail(f"{what} is {value}, expected {least} to {most}")
        return value

    def stream(self, what: str, size: int) -> Stream:
        """The next stream, of ``size`` bytes."""
        stored_size = self.varint(f"the size of {what}")
        if stored_size > size:
            raise self.fail(f"{what} stores {stored_size} bytes for {size}")
        return Stream(size, self.take(stored_size, what), what, self._encoding)

    def plain(self, what: str, size: int) -> Stream:
        """``size`` bytes that are not worth compressing, as a stream without a head."""
        return Stream(size, self.take(size, what), what, self._encoding)

    def end(self) -> None:
        left = len(self._blob) - self._offset
        if left:
            raise self.fail(f"{left} bytes follow its end")
