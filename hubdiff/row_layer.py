"""Rows laid out anew: what a delta has for a vocabulary tensor, in the rows of the result.

Before files are merged, each tensor whose rows are not where they act is read once, from beginning
to end as it is stored, and its rows are written to where they belong, as dense layers of a delta of
its own in a temporary folder. The merge then reads those like any other delta's. Memory stays that
of a few blocks; the disk holds the tensor once or twice, until the merge is done.
"""

from __future__ import annotations

import math
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hubdiff.delta import Delta
from hubdiff.encodings import SEGMENT, tails
from hubdiff.encodings.tails import Tail
from hubdiff.errors import CorruptPayload
from hubdiff.files import open_tree
from hubdiff.floats import to_dtype
from hubdiff.hashing import tensor_hash
from hubdiff.layers import LayerWriter, header_room
from hubdiff.manifest import GROUPS, FileRecord, Part, TensorRecord
from hubdiff.payloads import DAMAGED, Arrays, PayloadHashes, SpanBytes, decode_segments
from hubdiff.plan import PORTABLE_GROUPS, Step, Term, WeightsFile, WholeFile
from hubdiff.progress import Progress
from hubdiff.refs import ModelRef
from hubdiff.rows import Run
from hubdiff.safetensors_io import TensorEntry, build_header, tensor_bytes
from hubdiff.stream import Block, Span, run_ordered, spans_of, unit_bytes, workers_for
from hubdiff.writer import disk_errors, write_all

_COPY = 8 << 20
_PENDING = "0" * 64


@dataclass(frozen=True)
class _Wanted:
    """One tensor to lay out: the rows of ``record`` as ``laid`` says, in a tensor of ``shape``,
    of the result's ``dtype`` where they are no difference but the rows themselves."""

    record: TensorRecord
    laid: tuple[Run, ...]
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, step: Step, term: Term) -> _Wanted:
        raw = term.parts[0].layers == ("raw",)
        dtype = step.entry.dtype if raw else term.parts[0].dtype
        return cls(term.record, term.laid, step.entry.shape, dtype)


@contextmanager
def laid_out(
    files: Sequence[WeightsFile | WholeFile], progress: Progress
) -> Iterator[list[WeightsFile | WholeFile]]:
    """The files with every term's rows where they act. Raises ``CorruptPayload`` or
    ``IntegrityError`` for a delta that is damaged."""
    wanted: dict[Delta, dict[_Wanted, None]] = {}
    for file in files:
        for step, term in _laid_terms(file):
            wanted.setdefault(term.delta, {})[_Wanted.of(step, term)] = None
    if not wanted:
        yield list(files)
        return
    with tempfile.TemporaryDirectory(prefix="hubdiff-rows-") as folder, ExitStack() as stack:
        made: dict[tuple[Delta, _Wanted], Delta] = {}
        for number, (delta, tensors) in enumerate(wanted.items()):
            place = Path(folder, str(number))
            place.mkdir()
            for one, laid in _lay(delta, list(tensors), place, progress).items():
                stack.callback(laid.close)
                made[delta, one] = laid
        yield [_with_laid(file, made) for file in files]


def _laid_terms(file: WeightsFile | WholeFile) -> Iterator[tuple[Step, Term]]:
    if isinstance(file, WeightsFile):
        for step in file.steps.values():
            for term in step.terms:
                if term.laid and term.parts:
                    yield step, term


def _with_laid(
    file: WeightsFile | WholeFile, made: dict[tuple[Delta, _Wanted], Delta]
) -> WeightsFile | WholeFile:
    if not isinstance(file, WeightsFile) or not any(_laid_terms(file)):
        return file
    steps = {}
    for name, step in file.steps.items():
        terms = []
        for term in step.terms:
            if term.laid and term.parts:
                delta = made[term.delta, _Wanted.of(step, term)]
                (record,) = delta.manifest.tensors
                term = replace(term, delta=delta, record=record, laid=(), rows=term.laid_rows)
            terms.append(term)
        steps[name] = replace(step, terms=tuple(terms))
    return replace(file, steps=steps)


def _lay(
    delta: Delta, wanted: list[_Wanted], folder: Path, progress: Progress
) -> dict[_Wanted, Delta]:
    """A delta for each tensor that is wanted, which has no other, with its files in ``folder``. So
    the tensor keeps its name, by which DARE draws."""
    tables = [_Table(one, folder, number) for number, one in enumerate(wanted)]
    by_record: dict[str, list[_Table]] = {}
    for table in tables:
        by_record.setdefault(table.wanted.record.name, []).append(table)
    with ExitStack() as stack:
        for table in tables:
            stack.callback(table.close)
        for same in by_record.values():
            _scatter(delta, same, progress)
        records = [table.finish() for table in tables]
    tree = open_tree(ModelRef.parse(folder))
    return {
        table.wanted: Delta(
            tree, replace(delta.manifest, tensors=(record,), layers=table.layers, rows={})
        )
        for table, record in zip(tables, records, strict=True)
    }


def _scatter(delta: Delta, tables: list[_Table], progress: Progress) -> None:
    """Read one tensor of a delta, and write its rows wherever they are wanted."""
    record, where = tables[0].wanted.record, str(delta.tree.pin)
    nbytes = tensor_bytes(record.dtype, record.shape)
    entry = TensorEntry(record.name, record.dtype, record.shape, 0, nbytes)
    hashes = PayloadHashes(where)
    remote = any(delta.tree.is_remote(f.path) for f in delta.manifest.layers["delta"])

    def read(block: Block) -> tuple[list[SpanBytes], list[_Decoded]]:
        (span,) = block.spans
        payloads = delta.read([(span, record, PORTABLE_GROUPS)])[span]
        return payloads, list(_decoded(span, payloads, where))

    def take(block: Block, found: tuple[list[SpanBytes], list[_Decoded]]) -> None:
        payloads, pieces = found
        hashes.take(block.spans[0], payloads)
        for piece in pieces:
            for table in tables:
                table.take(piece)
        progress.advance(block.nbytes)

    progress.start(f"laying out the rows of {record.name}", nbytes)
    run_ordered(
        (Block("", (span,)) for span in spans_of(entry)), read, take, workers_for(remote=remote)
    )
    progress.finish()


@dataclass(frozen=True)
class _Decoded:
    """A segment of a tensor from the element ``first`` on: bit patterns of Δ (or of the tensor
    itself) and, where there are any, of ``lo``. No ``bits``: nothing changes."""

    first: int
    bits: np.ndarray | None
    lo: np.ndarray | None


def _decoded(span: Span, payloads: list[SpanBytes], where: str) -> Iterator[_Decoded]:
    for units, layers in decode_segments(span, payloads, where, Arrays()):
        bits = layers.get("raw") if "raw" in layers else layers.get("hi")
        if bits is None and "raw" in layers:
            raise CorruptPayload(f"{where}: a segment has no bytes at all", next_step=DAMAGED)
        lo = layers.get("lo")
        if lo is not None:
            lo = Tail(lo[0], lo[1].astype(np.uint16)).full(units.stop - units.start)
        yield _Decoded(span.first + units.start, bits, lo)


class _Table:
    """One tensor of rows in the making: a safetensors file of its own, filled in any order, and a
    file beside it for ``lo``, of which a tail is made at the end."""

    def __init__(self, wanted: _Wanted, folder: Path, number: int) -> None:
        self.wanted = wanted
        self._name = wanted.record.name
        self._folder, self._number = folder, number
        self._width = math.prod(wanted.shape[1:])
        self._unit = unit_bytes(wanted.dtype)
        self._by_row = sorted(wanted.laid, key=lambda run: run.row)
        self._rows = [run.row for run in self._by_row]
        nbytes = tensor_bytes(wanted.dtype, wanted.shape)
        header = build_header([(self._name, wanted.dtype, wanted.shape, nbytes)], {})
        self._start = len(header)
        path = folder / f"delta-{number}.safetensors"
        dense = FileRecord(path.name, len(header) + nbytes, _PENDING)
        self.layers: dict[str, tuple[FileRecord, ...]] = {
            **dict.fromkeys(GROUPS, ()),
            "delta": (dense,),
        }
        self._file, self._lo = _open(path), -1
        with disk_errors(path):
            write_all(self._file, header, 0)
            self._fill(nbytes)

    @property
    def _is_raw(self) -> bool:
        return self.wanted.record.parts[0].layers == ("raw",)

    def _fill(self, nbytes: int) -> None:
        """−0.0 everywhere: no change."""
        nothing = b"\0" * (self._unit - 1) + b"\x80"
        for position in range(0, nbytes, _COPY):
            count = min(_COPY, nbytes - position) // self._unit
            write_all(self._file, nothing * count, self._start + position)

    def take(self, piece: _Decoded) -> None:
        """Put what belongs here of a segment in its place."""
        bits = piece.bits
        if bits is None:
            return
        if self._is_raw:
            bits = to_dtype(bits, self.wanted.record.dtype, self.wanted.dtype)
        with disk_errors(self._folder):
            for here, there in self._places(piece.first, len(bits)):
                data = np.ascontiguousarray(bits[here]).view(np.uint8).data
                write_all(self._file, data, self._start + there * self._unit)
                if piece.lo is not None and piece.lo[here].any():
                    write_all(self._lo_file(), piece.lo[here].view(np.uint8).data, there * 2)

    def _places(self, first: int, count: int) -> Iterator[tuple[slice, int]]:
        """Which elements, of ``count`` from ``first`` on, go where: counted from the first of them,
        and in elements of this tensor."""
        width = max(self._width, 1)
        start = max(0, bisect_right(self._rows, first // width) - 1)
        for run in self._by_row[start:]:
            begin = max(first, run.row * width)
            end = min(first + count, (run.row + run.count) * width)
            if run.row * width >= first + count:
                break
            if begin < end:
                yield slice(begin - first, end - first), run.at * width + begin - run.row * width

    def _lo_file(self) -> int:
        if self._lo < 0:
            path = self._folder / f"lo-{self._number}"
            self._lo = _open(path)
            os.ftruncate(self._lo, math.prod(self.wanted.shape) * 2)
        return self._lo

    def finish(self) -> TensorRecord:
        """All rows are there: the record of the tensor."""
        record, dtype = self.wanted.record, self.wanted.dtype
        digest, nbytes = tensor_hash(), tensor_bytes(dtype, self.wanted.shape)
        for position in range(0, nbytes, _COPY):
            digest.update(self._read(position, min(_COPY, nbytes - position)))
        layers = ("raw",) if self._is_raw else ("hi",)
        parts = [Part("delta", layers, "plain", dtype, nbytes, digest.hexdigest())]
        if self._lo >= 0:
            parts.append(self._write_tail())
        return replace(
            record,
            shape=self.wanted.shape,
            dtype=dtype if self._is_raw else record.dtype,
            parts=tuple(parts),
        )

    def _read(self, position: int, nbytes: int) -> bytes:
        return os.pread(self._file, nbytes, self._start + position)

    def _write_tail(self) -> Part:
        dtype, count = self.wanted.dtype, math.prod(self.wanted.shape)
        part = Part("tail", ("lo",), "packed", dtype, 0, _PENDING)
        room = header_room([(self._name, self.wanted.shape)])
        with LayerWriter(self._folder, "tail", self._number, room) as layer:
            payload = layer.payload(self._name, count, part)
            for segment, first in enumerate(range(0, count, SEGMENT)):
                size = min(SEGMENT, count - first)
                lo = np.frombuffer(os.pread(self._lo, 2 * size, 2 * first), np.uint16)
                hi = np.frombuffer(self._read(2 * first, 2 * size), np.uint16)
                tail = Tail.of(lo)
                if tail.elements.size:
                    payload.write(segment, (tails.encode(tail, hi, dtype, hi.nbytes),))
            part = payload.finish()
            (file,) = layer.finish()
        name = f"tail-{self._number}.safetensors"
        os.rename(self._folder / file.record.path, self._folder / name)
        self.layers["tail"] = (replace(file.record, path=name),)
        return part

    def close(self) -> None:
        for fd in (self._file, self._lo):
            if fd >= 0:
                os.close(fd)


def _open(path: Path) -> int:
    with disk_errors(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
