"""Streams: three ways to store a run of bytes, none of which a reader has to trust."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import zstandard

from hubdiff.encodings._frames import BlobReader, write_stream
from hubdiff.errors import CorruptPayload


def _stream(raw_size: int, body: bytes) -> bytes:
    return struct.pack("<II", raw_size, len(body)) + body


def _read(blob: bytes, least: int, most: int | None = None) -> bytes:
    reader = BlobReader(blob, "test")
    stream = reader.stream("the stream", least, most)
    reader.end()
    return stream.content().tobytes()


FRAME = zstandard.ZstdCompressor().compress(b"ab" * 500)


@pytest.mark.parametrize(
    ("raw", "stored"),
    [
        (b"", 0),
        (b"x", 1),
        (b"\x07" * 100_000, 1),
        (np.random.default_rng(0).bytes(1000), 1000),
        (b"ab", 2),
    ],
)
def test_constant_and_incompressible_runs_need_no_frame(raw: bytes, stored: int) -> None:
    blob = write_stream(np.frombuffer(raw, np.uint8))
    assert blob[:8] == struct.pack("<II", len(raw), stored)
    assert len(blob) == 8 + stored
    assert _read(blob, len(raw)) == raw


def test_frames_are_standard_zstd_with_size_and_checksum() -> None:
    raw = np.random.default_rng(0).geometric(0.3, 5000).astype(np.uint8)
    frame = write_stream(raw)[8:]
    parameters = zstandard.get_frame_parameters(frame)
    assert parameters.content_size == 5000
    assert parameters.has_checksum
    assert parameters.dict_id == 0
    assert zstandard.ZstdDecompressor().decompress(frame) == raw.tobytes()


@pytest.mark.parametrize(
    ("blob", "least", "most", "says"),
    [
        (b"\x01\x00", 1, None, "header of the stream needs 8 bytes, 2 are left"),
        (_stream(5, b"12345"), 4, None, "declares 5 bytes, expected 4"),
        (_stream(5, b"12345"), 6, 9, "declares 5 bytes, expected 6 to 9"),
        (_stream(5, b"12345")[:-1], 5, None, "needs 5 bytes, 4 are left"),
        (_stream(5, b"12345") + b"6", 5, None, "1 bytes follow its end"),
        (_stream(5, b"123456"), 5, None, "stores 6 bytes for 5"),
        (_stream(5, b""), 5, None, "can't be read"),
        (_stream(99, b"not a frame"), 99, None, "can't be read"),
        (_stream(1001, FRAME), 1001, None, "holds 1000 bytes, expected 1001"),
        (_stream(1000, FRAME[:-1]), 1000, None, "can't be read"),
        (_stream(1000, FRAME + b"\x00"), 1000, None, "can't be read"),
        (_stream(1000, FRAME + FRAME), 1000, None, "can't be read"),
    ],
)
def test_wrong_lengths_are_named(blob: bytes, least: int, most: int | None, says: str) -> None:
    with pytest.raises(CorruptPayload, match=says):
        _read(blob, least, most)


def test_a_flipped_bit_in_a_frame_is_seen() -> None:
    raw = np.random.default_rng(0).geometric(0.3, 5000).astype(np.uint8)
    blob = bytearray(write_stream(raw))
    blob[-100] ^= 4
    with pytest.raises(CorruptPayload, match="can't be read"):
        _read(bytes(blob), 5000)


@pytest.mark.parametrize("unknown", [True, False], ids=["no size", "another size"])
def test_a_frame_that_expands_is_never_expanded(unknown: bool) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=not unknown).compress(bytes(1 << 26))
    tracemalloc.start()
    with pytest.raises(CorruptPayload, match="holds"):
        _read(_stream(10_000, bomb), 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_skippable_frames_are_refused() -> None:
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
    with pytest.raises(CorruptPayload):
        _read(_stream(1000, skippable), 1000)
