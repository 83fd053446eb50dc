from __future__ import annotations

import pytest

from hubdiff.encodings import SEGMENT
from hubdiff.encodings.payload import index_bytes, parse_index, segment_counts, write_index
from hubdiff.errors import CorruptPayload


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [1]),
        (SEGMENT, [SEGMENT]),
        (SEGMENT + 1, [SEGMENT, 1]),
        (3 * SEGMENT - 1, [SEGMENT, SEGMENT, SEGMENT - 1]),
    ],
)
def test_segments_cover_the_tensor(count: int, expected: list[int]) -> None:
    assert segment_counts(count) == expected
    assert index_bytes(count, 1) == 4 * len(expected)
    assert index_bytes(count, 2) == 8 * len(expected)


def test_index_gives_each_blob_its_range() -> None:
    index = write_index([10, 0, 20, 5])
    assert index == bytes([10, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 5, 0, 0, 0])
    ranges = parse_index(index, SEGMENT + 1, 2, 16 + 35)
    assert ranges == [(16, 10), (26, 0), (26, 20), (46, 5)]
    assert ranges[1 * 2 + 0].offset == 26


def test_a_layer_may_leave_any_segment_alone() -> None:
    ranges = parse_index(write_index([0, 0, 7, 0]), SEGMENT + 1, 2, 16 + 7)
    assert [size for _, size in ranges] == [0, 0, 7, 0]


def test_a_tensor_without_elements_has_an_empty_payload() -> None:
    assert write_index([]) == b""
    assert parse_index(b"", 0, 1, 0) == []


@pytest.mark.parametrize(
    ("sizes", "count", "layers", "payload", "says"),
    [
        ([5], 1, 1, 10, "end at byte 9, expected 10"),
        ([5], 1, 1, 8, "end at byte 9, expected 8"),
        ([], 0, 1, 1, "end at byte 0, expected 1"),
        ([5, 5], 1, 1, 18, "8 bytes, expected 4"),
        ([5], 1, 2, 9, "4 bytes, expected 8"),
        ([5], 10**18, 2, 9, "4 bytes, expected"),
        ([0xFFFFFFFF, 0xFFFFFFFF], SEGMENT + 1, 1, 6, "end at byte 8589934598"),
    ],
)
def test_an_index_that_does_not_add_up_is_refused(
    sizes: list[int], count: int, layers: int, payload: int, says: str
) -> None:
    with pytest.raises(CorruptPayload, match=says):
        parse_index(write_index(sizes), count, layers, payload)
