"""Running a plan: stream the target's tensors, add Δ, write, and check every hash on the way.

Blocks of the result are made in parallel and taken in order. Nothing is finished before it is
verified: payloads against the manifest's blake3, the target's files against the sha256 the Hub
lists, and on the own base every tensor of the base and every file of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hubdiff.delta import Delta
from hubdiff.errors import IntegrityError, WrongBase
from hubdiff.files import ByteReader
from hubdiff.hashing import FileHashes, Lane, ResultHash, check_hash, hash_bytes, tensor_hash
from hubdiff.manifest import FileRecord, TensorRecord, WrittenFile
from hubdiff.memory import fits_in_cache
from hubdiff.payloads import PayloadHashes, SpanBytes
from hubdiff.plan import OWN_BASE, MergePlan, Step, WeightsFile, WholeFile
from hubdiff.progress import Progress
from hubdiff.quick import combine_quick, needs_torch
from hubdiff.row_layer import laid_out
from hubdiff.stream import (
    Block,
    Span,
    blocks,
    new_buffer,
    read_ranges,
    run_ordered,
    span_range,
    workers_for,
)
from hubdiff.trimming import Trims
from hubdiff.writer import OutputFile, Sink, TensorFile

if TYPE_CHECKING:
    from blake3 import blake3

    from hubdiff.device import Engine, Work

_COPY = 8 << 20


def run(
    plan: MergePlan,
    sink: Sink,
    device: str,
    progress: Progress,
    files: Sequence[WeightsFile | WholeFile] | None = None,
) -> list[WrittenFile]:
    """Make every file of the plan in ``sink``, or those of its ``files`` that are given; the caller
    publishes it. ``device`` is a torch device by name. Returns the files written here (not those
    the Hub copies). Raises ``IntegrityError``, ``CorruptPayload`` or ``WrongBase`` when bytes are
    not what they should be; then nothing may be published."""
    if any(needs_torch(step, device) for file in plan.weights for step in file.steps.values()):
        import torch  # noqa: F401 - before the threads that use it begin
    files = in_order(plan) if files is None else files
    if not fits_in_cache(sum(plan.reads.values()) + plan.writes):
        _read_once(plan)
    with laid_out(files, progress) as files:
        return _make_all(plan, sink, device, progress, files)


def _make_all(
    plan: MergePlan,
    sink: Sink,
    device: str,
    progress: Progress,
    files: Sequence[WeightsFile | WholeFile],
) -> list[WrittenFile]:
    progress.start("merging", sum(map(written, files)))
    records: list[WrittenFile] = []
    trims = Trims()
    for file in files:
        if isinstance(file, WeightsFile):
            record = _weights(plan, file, sink, device, trims, progress)
        else:
            record = _whole(plan, file, sink)
            progress.advance(file.size)
        if record is not None:
            records.append(record)
    progress.finish()
    return records


def _read_once(plan: MergePlan) -> None:
    plan.target.once = True
    if plan.method is None or not plan.method.trims:  # which reads a Δ for its threshold first
        for item in plan.deltas:
            item.delta.read_once()


def in_order(plan: MergePlan) -> list[WeightsFile | WholeFile]:
    """The files of the plan as they are made: last the index, which makes them a model."""
    index_last = sorted(plan.files, key=lambda file: file.path.endswith(".index.json"))
    return [*plan.weights, *index_last]


def written(file: WeightsFile | WholeFile) -> int:
    """The size of a file of the plan."""
    return file.header.file_size if isinstance(file, WeightsFile) else file.size


# --- whole files ---


def _whole(plan: MergePlan, file: WholeFile, sink: Sink) -> WrittenFile | None:
    if file.data is not None:
        made = FileRecord(file.path, len(file.data), hash_bytes(file.data))
        return made if sink.done(file.path) == made else sink.put(file.path, file.data)
    assert file.source is not None
    tree = file.delta.tree if file.delta else plan.target.tree
    listed = tree.files()[file.source].sha256
    # Small files are not copied by the Hub itself: they come this way and are checked.
    if listed:
        check_hash(listed, file.sha256, f"{tree.pin}/{file.source}")
        if sink.copy(file.path, tree.pin, file.source):
            return None
    finished = _finished(sink, file, file.size)
    if finished is not None:
        return finished
    with tree.open(file.source) as reader:
        record = _copy(reader, file, sink, f"{tree.pin}/{file.source}")
    sink.finish(record)
    return record


def _finished(sink: Sink, file: WeightsFile | WholeFile, size: int) -> WrittenFile | None:
    """What an earlier run finished of it, unless its content is known and another."""
    found = sink.done(file.path)
    known = file.sha256 is None or found == FileRecord(file.path, size, file.sha256)
    return found if known else None


def _copy(reader: ByteReader, file: WholeFile, sink: Sink, where: str) -> WrittenFile:
    if reader.size != file.size:
        raise IntegrityError(
            f"{where} has {reader.size:,} bytes, expected {file.size:,}",
            next_step="The file changed or was cut short; fetch it again.",
        )
    output = sink.open(file.path, file.size)
    content = ResultHash(file.path, file.size, file.sha256)
    try:
        for offset in range(0, file.size, _COPY):
            buffer = np.empty(min(_COPY, file.size - offset), np.uint8).data
            reader.read_into(offset, buffer)
            output.write_at(offset, buffer)
            content.update(offset, buffer)
    finally:
        output.close()
    return content.record(where)


# --- weights ---


def _weights(
    plan: MergePlan,
    file: WeightsFile,
    sink: Sink,
    device: str,
    trims: Trims,
    progress: Progress,
) -> WrittenFile | None:
    finished = _finished(sink, file, file.header.file_size)
    if finished is not None:
        progress.advance(finished.size)
        return finished
    output = sink.open(file.path, file.header.file_size)
    try:
        output.write_at(0, file.header.raw)
        progress.advance(len(file.header.raw))
        maker = _Maker(plan, file, output, device, trims)
        with Lane() as ours, Lane() as theirs:
            # In memory there is no file to name by its hash: only one that is known is compared.
            hashed = not isinstance(output, TensorFile) or bool(file.sha256 and not maker.stays)
            checker = _Checker(plan, file, ours, theirs, progress, hashed=hashed)
            run_ordered(
                blocks(file.path, file.header),
                maker.make,
                checker.take,
                workers_for(remote=plan.remote, gpu=device != "cpu"),
            )
            record = checker.finish()
    finally:
        output.close()
    if record is not None:
        sink.finish(record)
    return record


@dataclass(frozen=True)
class _Made:
    """One span of the result with all that went into it, for the checks. ``payloads`` stand in the
    order of the step's terms. No ``result``: it stayed on the device."""

    span: Span
    step: Step
    result: memoryview | None
    source: memoryview | None
    payloads: list[list[SpanBytes]]


class _Maker:
    """Makes blocks of one file of the result and writes them. Threads share it."""

    def __init__(
        self,
        plan: MergePlan,
        file: WeightsFile,
        output: OutputFile,
        device: str,
        trims: Trims,
    ) -> None:
        self._plan, self._file, self._output, self._trims = plan, file, output, trims
        self._engine = engine_for(device)
        # Tensors on this very device take what is made there without its bytes passing here.
        self.stays = (
            self._engine is not None and isinstance(output, TensorFile) and output.is_on(device)
        )

    def make(self, block: Block) -> list[_Made]:
        steps = [(span, self._file.steps[span.entry.name]) for span in block.spans]
        wanted = {span: span_range(span, s.source) for span, s in steps if s.source}
        made = []
        with self._engine.block() if self._engine else nullcontext() as work:
            sources = read_ranges(
                self._plan.target, wanted.values(), work.buffer if work else new_buffer
            )
            payloads = _read_terms(steps)
            for span, step in steps:
                source = sources[wanted[span]] if step.source else None
                result = self._make(span, step, source, payloads[span], work)
                made.append(_Made(span, step, result, source, payloads[span]))
            if work:
                work.settle()
        for item in made:
            if item.result is not None:
                self._output.write_at(item.span.begin, item.result)
        return made

    def _make(
        self,
        span: Span,
        step: Step,
        source: memoryview | None,
        payloads: list[list[SpanBytes]],
        work: Work | None,
    ) -> memoryview | None:
        if work is None:
            return make_span(span, step, source, payloads, self._trims)
        from hubdiff.combine import combine

        given = None if source is None else work.bring(source)
        there = combine(span, step, given, payloads, work, self._trims)
        if self.stays:
            assert isinstance(self._output, TensorFile)
            self._output.place(span.begin, there)
            return None
        return work.send(there)


def engine_for(device: str) -> Engine | None:
    """The engine of a GPU; on the CPU there is none between the bytes and the arithmetic."""
    if device == "cpu":
        return None
    from hubdiff.device import Gpu

    return Gpu(device)


def make_span(
    span: Span,
    step: Step,
    source: memoryview | None,
    payloads: list[list[SpanBytes]],
    trims: Trims,
) -> memoryview:
    """The bytes of ``span`` in the result, made on the CPU. ``source`` are the target's bytes for
    it, ``payloads`` what each term of ``step`` has for it. Raises ``CorruptPayload``."""
    if not needs_torch(step, "cpu"):
        result = combine_quick(span, step, source, payloads)
        if result is not None:
            return result
    from hubdiff.combine import combine
    from hubdiff.device import Cpu

    work = Cpu()
    given = None if source is None else work.bring(source)
    return work.send(combine(span, step, given, payloads, work, trims))


def _read_terms(steps: list[tuple[Span, Step]]) -> dict[Span, list[list[SpanBytes]]]:
    """What each term of each span has, in the order of its terms; every delta is asked once, for
    all of its spans."""
    found: dict[Delta, dict[Span, list[SpanBytes]]] = {}
    for delta in dict.fromkeys(term.delta for _, step in steps for term in step.terms):
        found[delta] = delta.read(
            (span, term.record, term.groups)
            for span, step in steps
            for term in step.terms
            if term.delta is delta
        )
    return {span: [found[term.delta][span] for term in step.terms] for span, step in steps}


class _Checker:
    """Takes spans in order and checks all that went in and came out (not ``hashed``: went in)."""

    def __init__(
        self,
        plan: MergePlan,
        file: WeightsFile,
        ours: Lane,
        theirs: Lane,
        progress: Progress,
        *,
        hashed: bool,
    ) -> None:
        self._hashed = hashed
        self._plan, self._file, self._progress = plan, file, progress
        self._lanes = (ours, theirs)
        self._result = ResultHash(file.path, file.header.file_size, file.sha256)
        self._result.update(0, file.header.raw)
        self._sources = FileHashes(plan.target)
        self._own_base = plan.case == OWN_BASE
        self._tensor: blake3 = tensor_hash()
        self._tensors: dict[str, str] = {}
        self._payloads: dict[Delta, PayloadHashes] = {}
        self._listed = {path for path, info in plan.target.tree.files().items() if info.sha256}

    def take(self, block: Block, made: list[_Made]) -> None:
        for lane in self._lanes:
            lane.catch_up()
        for item in made:
            if self._hashed and item.result is not None:
                self._lanes[0].feed(self._result, item.span.begin, item.result)
            self._take_source(item)
            self._take_payloads(item)
        self._progress.advance(block.nbytes)

    def _take_payloads(self, item: _Made) -> None:
        for term, payloads in zip(item.step.terms, item.payloads, strict=True):
            if term.delta not in self._payloads:
                self._payloads[term.delta] = PayloadHashes(str(term.delta.tree.pin))
            self._payloads[term.delta].take(item.span, payloads)

    def _take_source(self, item: _Made) -> None:
        if item.source is None or item.step.source is None:
            return
        place = span_range(item.span, item.step.source)
        if not self._own_base:
            if place.file not in self._listed:
                return  # a folder's file: nothing is known that it could be compared with
            self._lanes[1].feed(self._sources.stream(place.file), place.begin, item.source)
        self._tensor.update(item.source)
        if item.span.last:
            source, digest = item.step.source, self._tensor.hexdigest()
            if self._plan.target.tensors.get(source.entry.name) == source:  # not only some rows
                self._tensors[source.entry.name] = digest
            self._tensor = tensor_hash()
            if self._own_base:
                self._check_base(item.step.terms[0].record, digest)

    def _check_base(self, record: TensorRecord, digest: str) -> None:
        if digest == record.base:
            return
        if self._plan.proved:
            check_hash(digest, record.base, f"{self._plan.target.tree.pin}, tensor {record.name}")
        raise WrongBase(
            f"{record.name} of {self._plan.target.tree.pin} is not that of the delta's base "
            f"{self._plan.deltas[0].delta.manifest.base.name}",
            next_step="Give the very base that the delta was made from.",
        )

    def finish(self) -> WrittenFile | None:
        """The file by content; None where its bytes were not seen."""
        for lane in self._lanes:
            lane.catch_up()
        if not self._own_base:
            self._check_sources()
        return self._result.record(f"the rebuilt {self._file.path}") if self._hashed else None

    def _check_sources(self) -> None:
        """The target's file, against the sha256 the Hub lists for it."""
        used = {step.source.file for step in self._file.steps.values() if step.source}
        for file in sorted(used & self._listed):
            self._sources.check(file, self._tensors)
