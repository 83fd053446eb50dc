from __future__ import annotations

import pytest

from hubdiff.encodings import SEGMENT
from hubdiff.encodings.payload import index_bytes, parse_index, write_index
from hubdiff.errors import CorruptPayload


@pytest.mark.parametrize(
    ("count", "segments"),
    [(1, 1), (SEGMENT, 1), (SEGMENT + 1, 2), (3 * SEGMENT - 1, 3)],
)
def test_all_blobs_but_the_last_have_a_size(count: int, segments: int) -> None:
    for layers in (1, 2):
        assert index_bytes(count, layers) == 4 * (segments * layers - 1)
        assert len(write_index([1] * segments * layers)) == index_bytes(count, layers)


def test_index_gives_each_blob_its_range() -> None:
    index = write_index([10, 0, 20, 5])
    assert index == bytes([10, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0])
    ranges = parse_index(index, SEGMENT + 1, 2, 12 + 35)
    assert ranges == [(12, 10), (22, 0), (22, 20), (42, 5)]
    assert ranges[1 * 2 + 0].offset == 22


def test_a_layer_may_leave_any_segment_alone() -> None:
    ranges = parse_index(write_index([0, 0, 7, 0]), SEGMENT + 1, 2, 12 + 7)
    assert [size for _, size in ranges] == [0, 0, 7, 0]


def test_a_payload_of_one_blob_is_that_blob() -> None:
    assert write_index([9]) == b""
    assert parse_index(b"", SEGMENT, 1, 9) == [(0, 9)]


def test_a_tensor_without_elements_has_an_empty_payload() -> None:
    assert write_index([]) == b""
    assert index_bytes(0, 2) == 0
    assert parse_index(b"", 0, 1, 0) == []


@pytest.mark.parametrize(
    ("sizes", "count", "layers", "payload", "says"),
    [
        ([5, 1], 1, 2, 8, "last blob begins at byte 9, the payload has 8"),
        ([], 0, 1, 1, "no elements has 1 bytes"),
        ([5, 5], 1, 1, 18, "4 bytes, expected 0"),
        ([5], 1, 2, 9, "0 bytes, expected 4"),
        ([5], 10**18, 2, 9, "0 bytes, expected"),
        ([0xFFFFFFFF, 0xFFFFFFFF, 1], 2 * SEGMENT + 1, 1, 6, "begins at byte 8589934598"),
    ],
)
def test_an_index_that_does_not_add_up_is_refused(
    sizes: list[int], count: int, layers: int, payload: int, says: str
) -> None:
    with pytest.raises(CorruptPayload, match=says):
        parse_index(write_index(sizes), count, layers, payload)
