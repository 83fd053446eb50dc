"""unpack: a delta as dense safetensors that any tool can read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubdiff.delta import Delta, open_delta_tree
from hubdiff.errors import NotPortable
from hubdiff.files import open_tree
from hubdiff.manifest import FileRecord, TensorRecord
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.safetensors_io import Header, build_header, parse_header, tensor_bytes
from hubdiff.stream import blocks, run_ordered, workers_for
from hubdiff.writer import DELTA, Sink, open_sink, output_folder

FILE = "delta.safetensors"


@dataclass(frozen=True)
class Unpacked:
    """``tensors`` of them changed or were added and are in the file; the ``unchanged`` are not. The
    file holds Δ rounded once to its dtype, the delta itself holds it exactly."""

    where: str
    files: tuple[FileRecord, ...]
    tensors: int
    unchanged: int

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "files": [asdict(file) for file in self.files]}


def unpack(
    delta: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    cache: bool = False,
    progress: Progress | None = None,
) -> Unpacked:
    """Write Δ of every changed tensor, and every added tensor, as ``delta.safetensors`` in the
    folder ``output``: dense, under the base's tensor names, in bf16, fp16 or fp32. Raises
    ``HubdiffError``."""
    destination = output_folder(output)
    with open_delta_tree(open_tree(ModelRef.parse(delta), cache=cache)) as opened:
        records = {r.name: r for r in opened.manifest.tensors if r.portable}
        if not records:
            reason = opened.manifest.not_portable_reason or "it has no portable layer"
            raise NotPortable(
                f"{opened.tree.pin} has no Δ to unpack: {reason}",
                next_step="Apply it to its own base instead.",
            )
        with open_sink(destination, DELTA, reads=(opened.tree,), force=force) as sink:
            record = _write(opened, records, sink, progress or Silent())
            where = sink.publish("unpacked").where
        total = len(opened.manifest.tensors)
    return Unpacked(where, (record,), len(records), total - len(records))


def _header(records: dict[str, TensorRecord]) -> Header:
    from hubdiff.dense import dense_dtype

    tensors = []
    for record in records.values():
        dtype = dense_dtype(record)
        tensors.append((record.name, dtype, record.shape, tensor_bytes(dtype, record.shape)))
    raw = build_header(tensors, {"format": "pt"})
    return parse_header(raw, len(raw) + sum(nbytes for *_, nbytes in tensors), FILE)


def _write(
    delta: Delta, records: dict[str, TensorRecord], sink: Sink, progress: Progress
) -> FileRecord:
    from hubdiff.dense import DenseFile

    header = _header(records)
    output = sink.open(FILE, header.file_size)
    progress.start("unpacking", header.file_size)
    try:
        writer = DenseFile(delta, records, header, output, progress)
        workers = workers_for(remote=any(map(delta.tree.is_remote, delta.tree.files())))
        run_ordered(blocks(FILE, header), writer.make, writer.take, workers)
    finally:
        output.close()
    progress.finish()
    record = FileRecord(FILE, header.file_size, writer.digest())
    sink.finish(record)
    return record
