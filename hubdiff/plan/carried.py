"""The side files that a delta carries, each checked by its hash."""

from __future__ import annotations

from typing import Any

from hubdiff.checkpoint import parse_json
from hubdiff.delta import Delta
from hubdiff.errors import BadManifest
from hubdiff.hashing import check_hash, hash_bytes


def require_file(delta: Delta, path: str) -> None:
    """Raise unless the delta holds the file its manifest lists."""
    if path not in delta.tree.files():
        raise BadManifest(
            f"{delta.tree.pin}/{path} is missing, the manifest lists it",
            next_step="The delta was not uploaded whole; ask its author to push it again.",
        )


def carried(delta: Delta, path: str) -> bytes | None:
    """A file that the delta carries; None for one that its side never had."""
    record = next((f for f in delta.manifest.side_files if f.path == path), None)
    if record is None:
        return None
    require_file(delta, path)
    data = delta.tree.read_bytes(path)
    check_hash(hash_bytes(data), record.sha256, f"{delta.tree.pin}/{path}")
    return data


def carried_json(delta: Delta, path: str) -> dict[str, Any]:
    """A config that the delta carries; ``{}`` for one that its side never had."""
    data = carried(delta, path)
    return {} if data is None else parse_json(data, f"{delta.tree.pin}/{path}")
