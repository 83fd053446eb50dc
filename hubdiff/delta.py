"""A delta, opened: its manifest, its layer files, and the bytes of any part of any tensor.

Opening reads the manifest; the headers of a group of layer files are read when it is first used.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.encodings import ENCODINGS, SEGMENT
from hubdiff.encodings.payload import index_bytes
from hubdiff.errors import BadManifest, CorruptPayload, DeltaError
from hubdiff.files import FileTree, open_tree
from hubdiff.manifest import GROUPS, Manifest, TensorRecord, read_manifest
from hubdiff.payloads import DAMAGED, Index, PlacedPart, SpanBytes, SpanPayload
from hubdiff.refs import ModelRef
from hubdiff.safetensors_io import read_header, tensor_bytes
from hubdiff.stream import MOST_WORKERS, Range, Span, read_ranges, unit_bytes

if TYPE_CHECKING:
    import torch

# A span, the record of its tensor, and the groups of parts that are wanted.
DeltaSpan = tuple[Span, "TensorRecord | None", tuple[str, ...]]


@dataclass(eq=False)
class Delta:
    """An open delta. ``layer(group)`` gives a group's files as a checkpoint of payloads."""

    tree: FileTree
    manifest: Manifest
    _layers: dict[str, Checkpoint] = field(default_factory=dict)
    _indices: dict[tuple[str, str], Index] = field(default_factory=dict)
    _factors: OrderedDict[str, Index] = field(default_factory=OrderedDict)
    _once: bool = False
    _stack: ExitStack = field(default_factory=ExitStack)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @cached_property
    def records(self) -> dict[str, TensorRecord]:
        return {record.name: record for record in self.manifest.tensors}

    def layer(self, group: str) -> Checkpoint:
        """The files of a group; headers are read at first use."""
        with self._lock:
            if group not in self._layers:
                self._layers[group] = self._open_layer(group)
            return self._layers[group]

    def read_once(self) -> None:
        """Nothing of it is read twice: the system need not cache it."""
        self._once = True
        for layer in self._layers.values():
            layer.once = True

    def _open_layer(self, group: str) -> Checkpoint:
        checkpoint = Checkpoint(self.tree, {}, {}, {}, None, self._once)
        self._stack.callback(checkpoint.close)
        for file in self.manifest.layers[group]:
            where = f"{self.tree.pin}/{file.path}"
            info = self.tree.files().get(file.path)
            if info is None:
                raise BadManifest(
                    f"{where} is missing, the manifest lists it",
                    next_step=DAMAGED,
                )
            if info.size != file.size:
                raise CorruptPayload(
                    f"{where} has {info.size:,} bytes, the manifest says {file.size:,}",
                    next_step=DAMAGED,
                )
            header = read_header(checkpoint.reader(file.path), where)
            checkpoint.shards[file.path] = header
            checkpoint.tensors.update({e.name: Placed(file.path, e) for e in header.tensors})
        return checkpoint

    def placed(self, record: TensorRecord, group: str) -> PlacedPart | None:
        """Where the part of a tensor lies; None when it has none in this group."""
        part = record.part(group)
        if part is None:
            return None
        count = tensor_bytes(record.dtype, record.shape) // unit_bytes(record.dtype)
        placed = self.layer(group).tensors.get(record.name)
        if placed is None or placed.entry.nbytes != part.bytes:
            raise CorruptPayload(
                f"{self.tree.pin}: the {group} layer of tensor {record.name!r} is "
                + ("missing" if placed is None else f"not the {part.bytes:,} bytes declared"),
                next_step=DAMAGED,
            )
        if part.low_rank:  # the manifest has it, and its size was checked with it
            return PlacedPart(part, placed, record.shape, count)
        if part.encoding not in ENCODINGS:
            raise CorruptPayload(
                f"{self.tree.pin}: tensor {record.name!r} has the unknown encoding "
                f"{part.encoding!r}",
                next_step="Upgrade hubdiff: pip install --upgrade hubdiff.",
            )
        if index_bytes(count, len(part.layers)) > part.bytes and part.encoding != "plain":
            raise CorruptPayload(
                f"{self.tree.pin}: the {group} layer of tensor {record.name!r} has {part.bytes:,} "
                "bytes, too few for its index",
                next_step=DAMAGED,
            )
        if part.encoding == "plain" and tensor_bytes(part.dtype, record.shape) != part.bytes:
            raise CorruptPayload(
                f"{self.tree.pin}: tensor {record.name!r} is not the dense tensor declared",
                next_step=DAMAGED,
            )
        return PlacedPart(part, placed, record.shape, count)

    def payload(
        self, part: PlacedPart, span: Span, read: Callable[[Range], memoryview]
    ) -> SpanPayload:
        """What to read for a span of the tensor. The index of a tensor that has several spans is
        read here, once, through ``read``; that of any other comes with its payload."""
        entry = part.placed.entry
        if part.dense:
            size = unit_bytes(part.part.dtype)
            begin = entry.begin + span.first * size
            return SpanPayload(
                part, Range(part.placed.file, begin, begin + span.units * size), None
            )
        if span.units == part.count:
            return SpanPayload(part, Range(part.placed.file, entry.begin, entry.end), None)
        if part.part.low_rank:
            nothing = Range(part.placed.file, entry.begin, entry.begin)
            return SpanPayload(part, nothing, self._factors_of(part, read))
        index = self._index(part, read)
        blobs, layers = index.blobs, len(part.part.layers)
        head = blobs[span.first // SEGMENT * layers]
        tail = blobs[-(-(span.first + span.units) // SEGMENT) * layers - 1]
        begin, end = entry.begin + head.offset, entry.begin + tail.offset + tail.size
        return SpanPayload(part, Range(part.placed.file, begin, end), index)

    def _index(self, part: PlacedPart, read: Callable[[Range], memoryview]) -> Index:
        key = (part.part.group, part.placed.entry.name)
        with self._lock:  # also while reading: no index is fetched twice
            if key not in self._indices:
                self._indices[key] = part.parse_index(read(part.index_range))
            return self._indices[key]

    def _factors_of(self, part: PlacedPart, read: Callable[[Range], memoryview]) -> Index:
        """The factors of a tensor that has several spans: read once, kept while they are in work,
        which no more tensors are at a time than there are blocks."""
        entry = part.placed.entry
        with self._lock:
            if entry.name not in self._factors:
                raw = read(Range(part.placed.file, entry.begin, entry.end))
                self._factors[entry.name] = Index(bytes(raw), [])
            self._factors.move_to_end(entry.name)
            if len(self._factors) > MOST_WORKERS + 2:
                self._factors.popitem(last=False)
            return self._factors[entry.name]

    def read(self, steps: Iterable[DeltaSpan]) -> dict[Span, list[SpanBytes]]:
        """The encoded bytes of spans, given with the record and the groups wanted (no record:
        none). Neighbours in a layer file are read together."""
        steps = list(steps)
        found: dict[Span, list[SpanBytes]] = {span: [] for span, _, _ in steps}
        for group in GROUPS:
            wanted = [
                (span, self.payload(part, span, self._read_from(group)))
                for span, record, groups in steps
                if record and group in groups
                if (part := self.placed(record, group))
            ]
            if wanted:
                views = read_ranges(self.layer(group), (where.range for _, where in wanted))
                for span, where in wanted:
                    found[span].append(SpanBytes(where, views[where.range]))
        return found

    def _read_from(self, group: str) -> Callable[[Range], memoryview]:
        return lambda place: read_ranges(self.layer(group), [place])[place]

    def keys(self) -> list[str]:
        """The names of the tensors that changed or were added."""
        return [record.name for record in self.manifest.tensors if record.portable]

    def get_tensor(self, name: str) -> torch.Tensor:
        """Δ of one tensor in float32 (the sum of ``hi`` and ``lo``, rounded once), in the tensor's
        shape; an added tensor as it is, in its own dtype. One that did not change is all -0.0,
        which leaves the bits of any number it is added to. The whole tensor is held in memory.
        Raises ``DeltaError`` for a name the delta does not have, ``NotPortable`` for one without a
        Δ."""
        from hubdiff.dense import dense_tensor

        record = self.records.get(name)
        if record is None:
            raise DeltaError(
                f"{self.tree.pin} has no tensor {name!r}",
                next_step="keys() lists the tensors that changed or were added.",
            )
        return dense_tensor(self, record)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def open_delta_tree(tree: FileTree) -> Iterator[Delta]:
    """Open the delta in ``tree``. Raises ``NotADelta``, ``NewerFormat``, ``BadManifest``."""
    delta = Delta(tree, read_manifest(tree))
    try:
        yield delta
    finally:
        delta.close()


@contextmanager
def open_delta(ref: str | Path, *, cache: bool = False) -> Iterator[Delta]:
    """Open a delta by ref or folder, as ``with hubdiff.open_delta(ref) as delta``. Raises
    ``HubError``, ``NotADelta``, ``NewerFormat`` or ``BadManifest``."""
    with open_delta_tree(open_tree(ModelRef.parse(ref), cache=cache)) as delta:
        yield delta
