"""Headers: what the safetensors library writes is read, what it writes is read by the library, and
nothing else gets through."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from hubdiff.errors import BadSafetensors
from hubdiff.files import LocalReader
from hubdiff.safetensors_io import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    build_header,
    parse_header,
    read_header,
    tensor_bytes,
)


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def raw(document: Any) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text


def parse(document: Any, data_bytes: int) -> Any:
    header = raw(document)
    return parse_header(header, len(header) + data_bytes, "w.safetensors")


GOOD = {
    "__metadata__": {"format": "pt"},
    "b": entry("BF16", [2, 3], 4, 16),
    "a": entry("F32", [], 0, 4),
    "empty": entry("F16", [0, 5], 16, 16),
    "bytes": entry("U8", [3], 16, 19),
}


def test_a_good_header_is_read_in_file_order() -> None:
    header = parse(GOOD, 19)
    assert [tensor.name for tensor in header.tensors] == ["a", "b", "empty", "bytes"]
    start = len(header.raw)
    first, second, *_ = header.tensors
    assert (first.begin, first.end, first.count, first.nbytes) == (start, start + 4, 1, 4)
    assert (second.dtype, second.shape, second.count) == ("BF16", (2, 3), 6)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == start + 19


# What is wrong, the header, bytes of data, and words of the message.
BAD: dict[str, tuple[Any, int, str]] = {
    "truncated": (GOOD, 18, "truncated"),
    "bytes after the last tensor": (GOOD, 20, "after the last tensor"),
    "no tensors but data": ({}, 3, "after the last tensor"),
    "overlap": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6, "'b' overlaps"),
    "the same bytes twice": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, 4, "over"),
    "hole": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, 10, "before 'b'"),
    "hole at the start": ({"a": entry("U8", [4], 1, 5)}, 5, "before 'a'"),
    "beyond the file": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [9], 4, 13)}, 4, "trunc"),
    "offsets backwards": ({"a": entry("U8", [4], 4, 0)}, 4, "'a' has the data_offsets"),
    "three offsets": ({"a": entry("U8", [4], 0, 4, 4)}, 4, "data_offsets"),
    "negative offset": ({"a": entry("U8", [4], -4, 0)}, 4, "data_offsets"),
    "huge offset": ({"a": entry("U8", [4], 2**64, 2**64 + 4)}, 4, "data_offsets"),
    "bool offset": ({"a": entry("U8", [1], False, True)}, 1, "data_offsets"),
    "float offset": ({"a": entry("U8", [4], 0, 4.0)}, 4, "data_offsets"),
    "offsets are no list": ({"a": {**GOOD["a"], "data_offsets": "04"}}, 4, "data_offsets"),
    "wrong span": ({"a": entry("F32", [2], 0, 4)}, 4, "needs 8 bytes"),
    "negative length": ({"a": entry("U8", [-4], 0, 4)}, 4, "has the shape"),
    "bool length": ({"a": entry("U8", [True], 0, 1)}, 1, "has the shape"),
    "float length": ({"a": entry("U8", [4.0], 0, 4)}, 4, "has the shape"),
    "shape is a number": ({"a": entry("U8", 4, 0, 4)}, 4, "has the shape"),
    "huge shape": ({"a": entry("U8", [2**62, 2**62], 0, 4)}, 4, "larger than any file"),
    "shape of a thousand huge lengths": ({"a": entry("U8", [2**62] * 1000, 0, 4)}, 4, "larger"),
    "unknown dtype": ({"a": entry("F12", [4], 0, 4)}, 4, "unknown dtype 'F12'"),
    "dtype is a list": ({"a": entry(["U8"], [4], 0, 4)}, 4, "unknown dtype"),
    "dtype is null": ({"a": entry(None, [4], 0, 4)}, 4, "unknown dtype"),
    "half a byte": ({"a": entry("F4", [3], 0, 2)}, 2, "whole bytes"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, 1, "lacks dtype"),
    "tensor is a string": ({"a": "x"}, 0, "lacks dtype"),
    "metadata is a list": ({"__metadata__": []}, 0, "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "half a surrogate pair": ({"\ud800": entry("U8", [1], 0, 1)}, 1, "Unicode"),
    "a name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(GOOD["a"]).encode(),) * 2), 4, "'a' twice"),
    "a field twice": (b'{"a":{"shape":[1],"shape":[1],"dtype":"U8","data_offsets":[0,1]}}', 1, "t"),
    "not JSON": (b'{"a":', 0, "not JSON"),
    "not UTF-8": (b'{"\xff":1}', 0, "not JSON"),
    "nested without end": (b'{"a":' + b"[" * 200_000, 0, "not JSON"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", 0, "not JSON"),
    "a list": (b"[]", 0, "not a JSON object"),
    "space before the brace": (b" {}", 0, "not a JSON object"),
    "no header": (b"", 0, "not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_refused_with_its_file_and_reason(case: str) -> None:
    document, data_bytes, words = BAD[case]
    with pytest.raises(BadSafetensors) as caught:
        parse(document, data_bytes)
    assert str(caught.value).startswith("w.safetensors: ")
    assert words in str(caught.value)
    assert caught.value.next_step


def test_sub_byte_dtypes_count_bits() -> None:
    header = parse({"a": entry("F4", [4], 0, 2), "b": entry("F6_E2M3", [4], 2, 5)}, 5)
    assert [tensor.nbytes for tensor in header.tensors] == [2, 3]
    assert tensor_bytes("F6_E3M2", [8, 3]) == 18


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"\x02\x00\x00", "3 bytes"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "the limit is"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "the limit is"),
        ((3).to_bytes(8, "little") + b"{}", "ends after 10"),
        (raw(GOOD) + bytes(18), "truncated"),
        (b"<!DOCTYPE html><html>", "the limit is"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    reader = LocalReader(path)
    with pytest.raises(BadSafetensors, match=words):
        read_header(reader, "model.safetensors")
    reader.close()


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_valid_or_refused_never_a_crash(data: st.DataObject) -> None:
    good = bytearray(raw(GOOD))
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        where = data.draw(st.integers(0, len(good) - 1), "where")
        good[where] = data.draw(
            st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789-{}[],:" eE.')), "byte"
        )
    size = len(good) + data.draw(st.sampled_from([19, 18, 20, 0]), "bytes of data")
    try:
        header = parse_header(bytes(good), size, "w")
    except BadSafetensors:
        return
    position = len(header.raw)
    for tensor in header.tensors:
        assert tensor.begin == position
        assert tensor.nbytes == tensor_bytes(tensor.dtype, tensor.shape)
        position = tensor.end
    assert position == header.file_size == size


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 100))
def test_arbitrary_bytes_are_refused_or_valid(text: bytes, data_bytes: int) -> None:
    header = raw(b"{" + text)
    with contextlib.suppress(BadSafetensors):
        assert parse_header(header, len(header) + data_bytes, "w").file_size


SAVED = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint16, torch.uint32, torch.uint64, torch.complex64,
]  # fmt: skip


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.zeros(3, 5).to(dtype) for dtype in SAVED}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 7), "ü · 名": torch.ones(1)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "ü"})
    reader = LocalReader(tmp_path / "a.safetensors")
    header = read_header(reader, "a")
    reader.close()
    assert {t.name: t.shape for t in header.tensors} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {t.name: t.nbytes for t in header.tensors} == {n: t.nbytes for n, t in tensors.items()}
    assert header.metadata == {"format": "pt", "note": "ü"}
    assert {t.dtype for t in header.tensors} <= set(DTYPE_BITS)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=80, deadline=None)
@given(
    names=st.lists(NAMES, unique=True, max_size=5),
    metadata=st.dictionaries(NAMES, NAMES, max_size=3),
    data=st.data(),
)
def test_our_headers_are_read_by_the_library(
    names: list[str], metadata: dict[str, str], data: st.DataObject
) -> None:
    tensors = []
    for name in names:
        dtype = data.draw(st.sampled_from(["F64", "F32", "BF16", "U8"]))
        shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
        tensors.append((name, dtype, shape, tensor_bytes(dtype, shape)))
    header = build_header(tensors, metadata)
    assert len(header) % 8 == 0
    content = header + bytes(sum(nbytes for *_, nbytes in tensors))
    theirs = safetensors.deserialize(content)
    assert {(n, i["dtype"], tuple(i["shape"])) for n, i in theirs} == {t[:3] for t in tensors}
    ours = parse_header(header, len(content), "w")
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in ours.tensors if t.nbytes] == [
        t for t in tensors if t[3]
    ]
    assert ours.metadata == metadata


def test_a_built_file_loads_with_its_values(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    header = build_header([("x", "F32", (2, 3), 24)], {}, room=512)
    assert len(header) == 512
    (tmp_path / "a.safetensors").write_bytes(header + tensor.numpy().tobytes())
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], tensor)


def test_a_header_that_does_not_fit_its_room_is_refused() -> None:
    with pytest.raises(ValueError, match="16 are reserved"):
        build_header([("x", "F32", (2, 3), 24)], {}, room=16)


def test_we_accept_no_damage_that_the_library_refuses() -> None:
    good = save({"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16)})
    end = 8 + int.from_bytes(good[:8], "little")
    ours_only = set()
    for where in range(8, end):
        for flip in (1, 4, 32):
            damaged = bytearray(good)
            damaged[where] ^= flip
            try:
                parse_header(bytes(damaged[:end]), len(damaged), "w")
                accepted = True
            except BadSafetensors:
                accepted = False
            try:
                safetensors.deserialize(bytes(damaged))
                reference = True
            except safetensors.SafetensorError:
                reference = False
            if accepted and not reference:
                ours_only.add(bytes(damaged[8:end]))
    assert ours_only == set()
