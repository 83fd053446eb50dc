"""The two binary formats a xet client uploads, and the hashes that name their parts.

xorb    chunks one after another, each with an 8-byte header: version, 24-bit stored length,
        compression scheme, 24-bit length. A footer that starts with ``XETBLOB`` may follow.
shard   48-byte records: per file its hash, the chunk ranges of xorbs that make it, and its sha256.

A hash is printed as four little-endian 64-bit words, not as its bytes in order.
Reference: https://huggingface.co/docs/xet
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import blake3
import lz4.frame

RECORD = 48
SHARD_MAGIC = b"HFRepoMetaData\0"
XORB_FOOTER = b"XETBLOB"
CHUNK_HEADER = 8
FLAG_VERIFICATION = 1 << 31
FLAG_SHA256 = 1 << 30
BOOKEND = b"\xff" * 32
DATA_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
MEAN_CHILDREN = 4
MAX_CHILDREN = 2 * MEAN_CHILDREN + 1

Node = tuple[bytes, int]  # a hash of the Merkle tree and the bytes below it


class BadXet(ValueError):
    pass


@dataclass(frozen=True)
class Segment:
    """Chunks ``start`` to ``end`` (not included) of a xorb; ``size`` is their length, unpacked."""

    xorb: str
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class ShardFile:
    hash: str
    sha256: str | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Chunk:
    offset: int
    stored: int
    scheme: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + CHUNK_HEADER + self.stored


def hex_hash(raw: bytes) -> str:
    return "".join(raw[i : i + 8][::-1].hex() for i in range(0, 32, 8))


def parse_shard(data: bytes) -> list[ShardFile]:
    if not data.startswith(SHARD_MAGIC) or len(data) < 2 * RECORD:
        raise BadXet("not a shard")
    records = (data[i : i + RECORD] for i in range(RECORD, len(data) - RECORD + 1, RECORD))
    return list(_shard_files(records))


def _shard_files(records: Iterator[bytes]) -> Iterator[ShardFile]:
    while (head := _next(records))[:32] != BOOKEND:
        flags, count = struct.unpack_from("<II", head, 32)
        segments = tuple(_segment(_next(records)) for _ in range(count))
        if flags & FLAG_VERIFICATION:
            for _ in range(count):
                _next(records)
        sha256 = hex_hash(_next(records)[:32]) if flags & FLAG_SHA256 else None
        yield ShardFile(hex_hash(head[:32]), sha256, segments)


def _next(records: Iterator[bytes]) -> bytes:
    record = next(records, None)
    if record is None:
        raise BadXet("the shard ends in the middle of a file")
    return record


def _segment(record: bytes) -> Segment:
    _, size, start, end = struct.unpack_from("<IIII", record, 32)
    return Segment(hex_hash(record[:32]), start, end, size)


def xorb_chunks(path: Path) -> list[Chunk]:
    """Where each chunk lies. The lengths must lead exactly to the end or to the footer."""
    chunks, offset, total = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while offset < total:
            file.seek(offset)
            header = file.read(CHUNK_HEADER)
            if header.startswith(XORB_FOOTER):
                break
            if len(header) < CHUNK_HEADER or header[0] != 0:
                raise BadXet(f"no chunk header at byte {offset}")
            stored = int.from_bytes(header[1:4], "little")
            chunk = Chunk(offset, stored, header[4], int.from_bytes(header[5:8], "little"))
            if chunk.end > total:
                raise BadXet(f"the chunk at byte {offset} is cut short")
            chunks.append(chunk)
            offset = chunk.end
    return chunks


def unpack(chunk: Chunk, stored: bytes) -> bytes:
    if chunk.scheme == 0:
        data = stored
    elif chunk.scheme == 1:
        data = lz4.frame.decompress(stored)
    elif chunk.scheme == 2:
        data = _ungroup(lz4.frame.decompress(stored))
    else:
        raise BadXet(f"unknown compression scheme {chunk.scheme}")
    if len(data) != chunk.size:
        raise BadXet(f"a chunk of {chunk.size} bytes unpacks to {len(data)}")
    return data


def _ungroup(grouped: bytes) -> bytes:
    """Undo the grouping of bytes by their position modulo 4."""
    data, position = bytearray(len(grouped)), 0
    for lane in range(4):
        length = len(range(lane, len(grouped), 4))
        data[lane::4] = grouped[position : position + length]
        position += length
    return bytes(data)


def read_chunks(path: Path, chunks: list[Chunk]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for chunk in chunks:
            file.seek(chunk.offset + CHUNK_HEADER)
            yield unpack(chunk, file.read(chunk.stored))


def xorb_hash(path: Path) -> str:
    """The name of a xorb: the root of the Merkle tree over its chunks."""
    return hex_hash(merkle_root([leaf(data) for data in read_chunks(path, xorb_chunks(path))]))


def file_hash(nodes: list[Node]) -> str:
    """The name of a file: the root over its chunks, salted with zeros."""
    return hex_hash(blake3.blake3(merkle_root(nodes), key=bytes(32)).digest())


def leaf(chunk: bytes) -> Node:
    return blake3.blake3(chunk, key=DATA_KEY).digest(), len(chunk)


def merkle_root(nodes: list[Node]) -> bytes:
    while len(nodes) > 1:
        parents, position = [], 0
        while position < len(nodes):
            cut = position + _children(nodes[position : position + MAX_CHILDREN])
            parents.append(_parent(nodes[position:cut]))
            position = cut
        nodes = parents
    return nodes[0][0]


def _children(nodes: list[Node]) -> int:
    """How many of the next nodes share a parent: up to a hash divisible by 4, at least three."""
    if len(nodes) <= 2:
        return len(nodes)
    for index in range(2, len(nodes)):
        if int.from_bytes(nodes[index][0][24:], "little") % MEAN_CHILDREN == 0:
            return index + 1
    return len(nodes)


def _parent(nodes: list[Node]) -> Node:
    text = "".join(f"{hex_hash(digest)} : {size}\n" for digest, size in nodes)
    return blake3.blake3(text.encode(), key=NODE_KEY).digest(), sum(size for _, size in nodes)
