"""safetensors headers: parsed and validated whole before any tensor byte is trusted.

A file is ``u64 LE header length · JSON header · tensor bytes``. What the format demands and this
module checks: known dtypes, sizes that follow from shapes, offsets inside the file, no overlap, no
hole, no byte left over, no name twice (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hubdiff.errors import BadSafetensors
from hubdiff.files import ByteReader

# The limit of the reference implementation; a header above it is an attack or a broken file.
MAX_HEADER_BYTES = 100_000_000
_MAX_BITS = 1 << 63

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of one file; ``begin`` and ``end`` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A validated header. ``raw`` holds the bytes before the first tensor, length field included;
    ``tensors`` stand in file order."""

    raw: bytes
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    file_size: int


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a dense tensor. Raises ValueError where they don't make whole bytes, or more than
    any file holds (a product without a bound could take forever to compute)."""
    bits = DTYPE_BITS[dtype]
    for length in shape:
        bits *= length
        if bits >= _MAX_BITS:
            raise ValueError("a tensor of that shape is larger than any file")
    if bits % 8:
        raise ValueError(f"{bits} bits are not whole bytes")
    return bits // 8


def read_header(reader: ByteReader, where: str) -> Header:
    """The header of an open file; ``where`` names the file in errors."""
    if reader.size < 8:
        raise _bad(where, f"the file has {reader.size} bytes, not even a header length")
    length = int.from_bytes(_read(reader, 0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise _bad(where, f"the header claims {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}")
    if length + 8 > reader.size:
        raise _bad(
            where, f"the header claims {length:,} bytes, the file ends after {reader.size:,}"
        )
    raw = length.to_bytes(8, "little") + _read(reader, 8, length)
    return parse_header(raw, reader.size, where)


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Validate ``raw`` (length field and JSON) as the header of a file of ``file_size`` bytes."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length != len(raw) - 8:
        raise _bad(where, "the header length does not match the header")
    document = _parse_json(raw[8:], where)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(where, "__metadata__ must map strings to strings")
    entries = [_parse_entry(name, value, len(raw), where) for name, value in document.items()]
    # Empty tensors share an offset with their neighbour: the end decides their order.
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_coverage(entries, len(raw), file_size, where)
    return Header(raw, tuple(entries), metadata, file_size)


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    metadata: Mapping[str, str],
    *,
    room: int | None = None,
) -> bytes:
    """Header bytes for ``(name, dtype, shape, nbytes)`` laid out one after the other, padded with
    spaces to 8 bytes, or to exactly ``room`` bytes (length field included)."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        document[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    total = room if room is not None else -(-(8 + len(text)) // 8) * 8
    if 8 + len(text) > total:
        raise ValueError(f"the header needs {8 + len(text)} bytes, {total} are reserved")
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)


def _read(reader: ByteReader, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    reader.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before, in linear time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = first_repeated(name for name, _ in pairs)
        if twice is not None:
            raise _bad(where, f"the header names {twice!r} twice")
        return dict(pairs)

    if not text.startswith(b"{"):
        raise _bad(where, "the header is not a JSON object")
    try:
        document = json.loads(text, object_pairs_hook=refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise _bad(where, f"the header is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise _bad(where, "the header is not a JSON object")
    return document


def _parse_entry(name: str, value: Any, data_start: int, where: str) -> TensorEntry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _bad(where, f"tensor {name!r} lacks dtype, shape or data_offsets")
    if not _is_text(name):
        raise _bad(where, f"the name {name!r} is not Unicode text")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad(where, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _naturals(shape):
        raise _bad(where, f"tensor {name!r} has the shape {shape!r}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(where, f"tensor {name!r} has the data_offsets {offsets!r}")
    entry = TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    try:
        expected = tensor_bytes(dtype, entry.shape)
    except ValueError as error:
        raise _bad(where, f"tensor {name!r}: {error}") from error
    if entry.nbytes != expected:
        raise _bad(
            where,
            f"tensor {name!r} ({dtype}, {list(entry.shape)}) needs {expected:,} bytes, "
            f"its offsets span {entry.nbytes:,}",
        )
    return entry


def _is_text(name: str) -> bool:
    """JSON can spell half a surrogate pair, which no UTF-8 file can hold."""
    return not any(0xD800 <= ord(char) < 0xE000 for char in name)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_coverage(entries: list[TensorEntry], start: int, file_size: int, where: str) -> None:
    position = start
    for entry in entries:
        if entry.begin < position:
            raise _bad(where, f"tensor {entry.name!r} overlaps the one before it")
        if entry.begin > position:
            raise _bad(where, f"{entry.begin - position:,} bytes before {entry.name!r} are unused")
        position = entry.end
    if position > file_size:
        raise _bad(
            where,
            f"the header describes {position:,} bytes, the file has {file_size:,} (truncated)",
        )
    if position < file_size:
        raise _bad(where, f"{file_size - position:,} bytes after the last tensor are unused")


def _bad(where: str, what: str) -> BadSafetensors:
    return BadSafetensors(
        f"{where}: {what}",
        next_step="The file is damaged or not safetensors; download or save it again.",
    )
