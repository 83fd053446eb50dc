"""Streams: three ways to store a run of bytes, none of which a reader has to trust."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import zstandard

from hubdiff.encodings._frames import BlobReader, write_stream, write_varint
from hubdiff.errors import CorruptPayload


def _stream(body: bytes) -> bytes:
    return write_varint(len(body)) + body


def _read(blob: bytes, size: int) -> bytes:
    reader = BlobReader(blob, "test")
    stream = reader.stream("the stream", size)
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
    head = write_varint(stored)
    assert blob[: len(head)] == head
    assert len(blob) == len(head) + stored
    assert _read(blob, len(raw)) == raw


def test_frames_are_standard_zstd_with_size() -> None:
    raw = np.random.default_rng(0).geometric(0.3, 5000).astype(np.uint8)
    frame = write_stream(raw)[2:]
    parameters = zstandard.get_frame_parameters(frame)
    assert parameters.content_size == 5000
    assert not parameters.has_checksum  # payloads have a hash
    assert parameters.dict_id == 0
    assert zstandard.ZstdDecompressor().decompress(frame) == raw.tobytes()


@pytest.mark.parametrize(
    ("blob", "size", "says"),
    [
        (b"", 1, "size of the stream needs 1 bytes, 0 are left"),
        (b"\x80", 1, "size of the stream needs 1 bytes, 0 are left"),
        (b"\xff" * 5 + b"\x00", 1, "size of the stream is written in more than 5 bytes"),
        (_stream(b"12345"), 4, "stores 5 bytes for 4"),
        (_stream(b"12345")[:-1], 5, "needs 5 bytes, 4 are left"),
        (_stream(b"12345") + b"6", 5, "1 bytes follow its end"),
        (_stream(b""), 5, "can't be read"),
        (_stream(b"not a frame"), 99, "can't be read"),
        (_stream(FRAME), 1001, "holds 1000 bytes, expected 1001"),
        (_stream(FRAME[:-1]), 1000, "can't be read"),
        (_stream(FRAME + b"\x00"), 1000, "can't be read"),
        (_stream(FRAME + FRAME), 1000, "can't be read"),
    ],
)
def test_wrong_lengths_are_named(blob: bytes, size: int, says: str) -> None:
    with pytest.raises(CorruptPayload, match=says):
        _read(blob, size)


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 16_383, 16_384, 1 << 20, 0xFFFFFFFF])
def test_numbers_come_back(number: int) -> None:
    written = write_varint(number)
    reader = BlobReader(written, "test")
    assert reader.varint("a number") == number
    reader.end()
    assert len(written) == max(1, -(-number.bit_length() // 7))


@pytest.mark.parametrize("unknown", [True, False], ids=["no size", "another size"])
def test_a_frame_that_expands_is_never_expanded(unknown: bool) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=not unknown).compress(bytes(1 << 26))
    tracemalloc.start()
    with pytest.raises(CorruptPayload, match="holds"):
        _read(_stream(bomb), 10_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_skippable_frames_are_refused() -> None:
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
    with pytest.raises(CorruptPayload):
        _read(_stream(skippable), 1000)
