"""Xorbs as they were uploaded, and the files that shards make of them.

A shard is believed only after its files were rebuilt: every xorb it names is here, every chunk
range exists, and the rebuilt bytes have the sha256 it announces. The rebuilt file joins the other
large objects, so downloads never need the xorbs unless a client asks for xet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from .objects import Objects
from .refusal import Refusal, bad_request
from .xet_format import (
    BadXet,
    Chunk,
    Segment,
    ShardFile,
    file_hash,
    leaf,
    parse_shard,
    read_chunks,
    xorb_chunks,
    xorb_hash,
)

HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class XetFile:
    hash: str
    sha256: str
    size: int
    segments: tuple[Segment, ...]


class XetStore:
    def __init__(self, folder: Path, objects: Objects) -> None:
        self._objects = objects
        self._xorbs = folder / "xet" / "xorbs"
        self._files = folder / "xet" / "files"
        self._by_sha256 = folder / "xet" / "by-sha256"
        for place in (self._xorbs, self._files, self._by_sha256):
            place.mkdir(parents=True, exist_ok=True)
        self.chunks = lru_cache(maxsize=256)(self._read_chunks)

    def xorb_path(self, name: str) -> Path:
        if HASH.fullmatch(name) is None:
            raise bad_request(f"Not a xorb hash: {name}")
        return self._xorbs / name

    def _read_chunks(self, xorb: str) -> list[Chunk]:
        return xorb_chunks(self.xorb_path(xorb))

    def add_xorb(self, name: str, upload: Path) -> bool:
        """Keep an uploaded xorb under its name; says whether it was new."""
        place = self.xorb_path(name)
        if place.exists():
            return False
        try:
            found = xorb_hash(upload)
        except (BadXet, RuntimeError) as error:
            raise bad_request(f"Bad xorb {name}: {error}") from None
        if found != name:
            raise bad_request(f"The xorb sent as {name} hashes to {found}")
        upload.replace(place)
        return True

    def add_shard(self, data: bytes) -> list[XetFile]:
        try:
            files = parse_shard(data)
        except BadXet as error:
            raise bad_request(f"Bad shard: {error}") from None
        for segment in (segment for file in files for segment in file.segments):
            self._check(segment)
        return [self._add_file(file) for file in files]

    def _check(self, segment: Segment) -> None:
        if not self.xorb_path(segment.xorb).exists():
            raise bad_request(f"The shard names an unknown xorb: {segment.xorb}")
        chunks = self.chunks(segment.xorb)[segment.start : segment.end]
        if len(chunks) != segment.end - segment.start or not chunks:
            raise bad_request(f"The shard names chunks that xorb {segment.xorb} does not have")
        if sum(chunk.size for chunk in chunks) != segment.size:
            raise bad_request(f"The shard misstates the size of chunks of xorb {segment.xorb}")

    def _add_file(self, file: ShardFile) -> XetFile:
        size = sum(segment.size for segment in file.segments)
        sha256, _ = self._objects.write(self._rebuild(file), file.sha256)
        known = XetFile(file.hash, sha256, size, file.segments)
        (self._files / file.hash).write_text(json.dumps(asdict(known)))
        (self._by_sha256 / sha256).write_text(file.hash)
        return known

    def _rebuild(self, file: ShardFile) -> Iterator[bytes]:
        nodes = []
        for segment in file.segments:
            chunks = self.chunks(segment.xorb)[segment.start : segment.end]
            for data in read_chunks(self.xorb_path(segment.xorb), chunks):
                nodes.append(leaf(data))
                yield data
        if file_hash(nodes) != file.hash:
            raise bad_request(f"The shard misnames a file: {file.hash}, not {file_hash(nodes)}")

    def file(self, name: str) -> XetFile:
        place = self._files / name
        if HASH.fullmatch(name) is None or not place.exists():
            raise Refusal(404, f"Unknown xet file {name}")
        value = json.loads(place.read_text())
        segments = tuple(Segment(**segment) for segment in value.pop("segments"))
        return XetFile(segments=segments, **value)

    def hash_of(self, sha256: str) -> str | None:
        """The xet hash of a large object, if it ever came by xet."""
        place = self._by_sha256 / sha256
        return place.read_text() if place.exists() else None
