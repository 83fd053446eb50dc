"""What the jobs of several ranks share: trees that all pin alike, and results that all know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubdiff.checkpoint import Checkpoint
from hubdiff.files import FileTree, open_tree
from hubdiff.hashing import hash_bytes
from hubdiff.ranks import PUBLISHED, UNKNOWN, Ranks
from hubdiff.refs import ModelRef
from hubdiff.safetensors_io import Header
from hubdiff.writer import Published, Sink

_GLIMPSE = 4096


def open_alike(
    ranks: Ranks, refs: Sequence[ModelRef | None], *, cache: bool
) -> list[FileTree | None]:
    """The trees of ``refs``. Rank 0 pins them and the others open the same commits: a branch that
    moves just now can't lead two ranks to two models. All ranks call it; only rank 0's ``refs``
    count."""
    trees: list[FileTree | None] = []
    if ranks.first:
        trees = [open_tree(ref, cache=cache) if ref else None for ref in refs]
    pins = ranks.broadcast([_as_json(tree) for tree in trees], "pinning the models")
    if not ranks.first:
        trees = [open_tree(_pinned(pin), cache=cache) if pin else None for pin in pins]
    return trees


def _as_json(tree: FileTree | None) -> dict[str, Any] | None:
    if tree is None:
        return None
    pin = tree.pin
    return {"repo": pin.repo, "commit": pin.commit, "path": str(pin.path) if pin.path else None}


def _pinned(pin: dict[str, Any]) -> ModelRef:
    return ModelRef(pin["repo"], pin["commit"], Path(pin["path"]) if pin["path"] else None)


def glimpse(checkpoint: Checkpoint) -> list[list[str]]:
    """The header of each shard, and of a folder's, which nothing pins, the first weights: machines
    with copies of their own may have two versions."""
    found = []
    for file, header in checkpoint.shards.items():
        start = bytearray(0 if checkpoint.tree.pin.repo else min(_GLIMPSE, _weights(header)))
        if start:
            checkpoint.reader(file).read_into(len(header.raw), memoryview(start))
        found.append([file, hash_bytes(header.raw + start)])
    return found


def _weights(header: Header) -> int:
    return header.file_size - len(header.raw)


def hand_in(ranks: Ranks, sink: Sink, found: Any, what: str) -> list[Any]:
    """Rank 0's sink holds what every rank stored, and each rank has what all ``found``. All ranks
    call it; from here on only rank 0 writes."""
    deposit = None if ranks.first else sink.deposit()
    given = ranks.gather({"found": found, "deposit": deposit}, what)
    if ranks.first:
        for other in given[1:]:
            sink.accept(other["deposit"])
    return [rank["found"] for rank in given]


def conclude(ranks: Ranks, value: Any, what: str) -> Any:
    """What rank 0 made of it, in the end. All ranks call it."""
    if not ranks.first:
        ranks.outcome = UNKNOWN
    return ranks.broadcast(value, what)


def publish(ranks: Ranks, sink: Sink, message: str) -> Published:
    """Rank 0 publishes."""
    ranks.outcome = UNKNOWN
    published = sink.publish(message)
    ranks.outcome = PUBLISHED
    return published
