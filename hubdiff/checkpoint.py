"""A checkpoint: the safetensors weights of one model, as tensors on disk.

Opening one reads headers only. Tensors are those of the files, never of a ``state_dict()``: model
classes fuse and rename at load. Which files are the weights follows ``from_pretrained``:
``model.safetensors``, else the shards of ``model.safetensors.index.json``, else the only
safetensors file of the repo's root.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from hubdiff.errors import BadIndex, CheckpointError, IsADelta, NoWeights
from hubdiff.files import ByteReader, FileTree, LocalReader
from hubdiff.safetensors_io import Header, TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "hubdiff.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Placed:
    """A tensor and the file it lies in."""

    file: str
    entry: TensorEntry


@dataclass
class Checkpoint:
    """The weights of a tree. ``shards`` maps file → header; ``tensors`` maps name → place, both in
    file order. Readers are opened at first use and closed by ``close`` or the ``with`` block."""

    tree: FileTree
    shards: dict[str, Header]
    tensors: dict[str, Placed]
    config: dict[str, Any]
    index: bytes | None
    # Nothing is read twice: the system need not cache it.
    once: bool = False
    _readers: dict[str, ByteReader] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reader(self, file: str) -> ByteReader:
        with self._lock:
            if file not in self._readers:
                self._readers[file] = self._stack.enter_context(self.tree.open(file))
            return self._readers[file]

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of a file from ``offset`` on."""
        reader = self.reader(file)
        reader.read_into(offset, buffer)
        if self.once and isinstance(reader, LocalReader):
            reader.forget(offset, len(buffer))

    def where(self, file: str) -> str:
        return f"{self.tree.pin}/{file}"

    def close(self) -> None:
        self._stack.close()


def require_model(tree: FileTree) -> None:
    """Raise ``IsADelta`` for a delta where a model is wanted."""
    if MANIFEST in tree.files():
        raise IsADelta(
            f"{tree.pin} is a delta, a model is expected here",
            next_step="Apply it to a base first: hubdiff apply DELTA --to BASE --output DIR.",
        )


@contextmanager
def open_checkpoint(tree: FileTree) -> Iterator[Checkpoint]:
    """Open the weights of ``tree``. Raises ``NoWeights``, ``BadIndex``, ``BadSafetensors``,
    ``IsADelta``."""
    require_model(tree)
    files, weight_map = _weight_files(tree)
    checkpoint = Checkpoint(tree, {}, {}, read_json(tree, "config.json"), None)
    if weight_map is not None:
        checkpoint.index = tree.read_bytes(INDEX)
    try:
        for file in files:
            header = read_header(checkpoint.reader(file), checkpoint.where(file))
            checkpoint.shards[file] = header
            _place(checkpoint, file, header)
        if weight_map is not None:
            _check_index(checkpoint, weight_map)
        yield checkpoint
    finally:
        checkpoint.close()


def read_json(tree: FileTree, path: str) -> dict[str, Any]:
    """A JSON object of the tree, ``{}`` where the file is absent."""
    return parse_json(tree.read_bytes(path), f"{tree.pin}/{path}") if path in tree.files() else {}


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object; ``where`` names the file in errors."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is not JSON ({error})", next_step="Repair or replace that file."
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{where} is not a JSON object", next_step="Repair or replace that file."
        )
    return document


def _weight_files(tree: FileTree) -> tuple[list[str], dict[str, str] | None]:
    files = tree.files()
    if SINGLE in files:
        return [SINGLE], None
    if INDEX in files:
        weight_map = _weight_map(tree)
        return sorted(set(weight_map.values())), weight_map
    root = [path for path in files if path.endswith(".safetensors") and "/" not in path]
    if "adapter_model.safetensors" in root:
        raise NoWeights(
            f"{tree.pin} holds a PEFT adapter, not a whole model",
            next_step="Give a whole model here. push-delta takes an adapter as TUNED; or merge it "
            "into its base (peft: merge_and_unload).",
        )
    if len(root) == 1:
        return root, None
    raise _no_weights(tree, root)


def _no_weights(tree: FileTree, root: list[str]) -> NoWeights:
    if root:
        return NoWeights(
            f"{tree.pin} has {len(root)} safetensors files at its root and neither {SINGLE} nor "
            f"{INDEX}: {', '.join(sorted(root)[:4])}",
            next_step=f"Write {INDEX} (save_pretrained does) or name the weights {SINGLE}.",
        )
    pickles = [path for path in tree.files() if path.endswith(_PICKLES)]
    if pickles:
        return NoWeights(
            f"{tree.pin} has its weights only as pickle ({pickles[0]}), which can run code when "
            "opened; hubdiff reads safetensors only",
            next_step="Convert it: load it with transformers, then save_pretrained(...); or use "
            "https://huggingface.co/spaces/safetensors/convert.",
        )
    return NoWeights(
        f"{tree.pin} has no safetensors weights",
        next_step="Check the ref; hubdiff needs model.safetensors or its shards and index.",
    )


def _weight_map(tree: FileTree) -> dict[str, str]:
    weight_map = read_json(tree, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad_index(tree, "has no weight_map")
    listed = tree.files()
    for name, file in weight_map.items():
        # A shard is a plain name beside the index: anything else could leave the folder.
        if not isinstance(file, str) or "/" in file or "\\" in file or file in ("", ".", ".."):
            raise _bad_index(tree, f"puts {name!r} in {file!r}, which is not a file name")
        if not file.endswith(".safetensors"):
            raise _bad_index(tree, f"puts {name!r} in {file}, which is no .safetensors file")
        if file not in listed:
            raise _bad_index(tree, f"puts {name!r} in {file}, which is not there")
    return weight_map


def _place(checkpoint: Checkpoint, file: str, header: Header) -> None:
    for entry in header.tensors:
        other = checkpoint.tensors.get(entry.name)
        if other is not None:
            raise CheckpointError(
                f"{checkpoint.tree.pin}: tensor {entry.name!r} is in both {other.file} and {file}",
                next_step="Remove the stale shard, or save the model again.",
            )
        checkpoint.tensors[entry.name] = Placed(file, entry)


def _check_index(checkpoint: Checkpoint, weight_map: dict[str, str]) -> None:
    for name, file in weight_map.items():
        placed = checkpoint.tensors.get(name)
        if placed is None or placed.file != file:
            raise _bad_index(checkpoint.tree, f"puts {name!r} in {file}, which does not hold it")
    for name, placed in checkpoint.tensors.items():
        if name not in weight_map:
            raise _bad_index(checkpoint.tree, f"does not list {name!r}, which {placed.file} holds")


def _bad_index(tree: FileTree, what: str) -> BadIndex:
    return BadIndex(
        f"{tree.pin}/{INDEX} {what}",
        next_step="The index is stale; save the model again so that index and shards agree.",
    )
