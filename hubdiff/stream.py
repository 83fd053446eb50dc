"""Streaming in bounded memory: cutting files into blocks, reading ranges, working in parallel while
results are taken in order.

A ``Span`` is a run of whole segments of one tensor, a ``Block`` the spans of about ``BLOCK_BYTES``
that are read, worked on and written together. Peak memory is the number of blocks in flight times
what one block needs; it does not depend on the model.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hubdiff.checkpoint import Checkpoint, Placed
from hubdiff.encodings import SEGMENT
from hubdiff.safetensors_io import DTYPE_BITS, Header, TensorEntry

# Large enough that a range request is worth its round trip, small enough that a handful in flight
# are nothing: 4 MiB = two segments of a 16-bit tensor.
BLOCK_BYTES = 4 << 20
MOST_WORKERS = 6
J = TypeVar("J")
R = TypeVar("R")


def unit_bytes(dtype: str) -> int:
    """Bytes of the unit a tensor is cut in: its element, or a byte for elements below one."""
    return max(1, DTYPE_BITS[dtype] // 8)


def unit_dtype(dtype: str) -> np.dtype:
    return np.dtype(f"<u{unit_bytes(dtype)}")


@dataclass(frozen=True)
class Span:
    """``units`` units of ``entry`` from unit ``first`` on, cut at segments. ``last``: the tensor
    ends here."""

    entry: TensorEntry
    first: int
    units: int

    @property
    def begin(self) -> int:
        """Where the span begins in its file, in bytes."""
        return self.entry.begin + self.first * unit_bytes(self.entry.dtype)

    @property
    def nbytes(self) -> int:
        return self.units * unit_bytes(self.entry.dtype)

    @property
    def last(self) -> bool:
        return self.begin + self.nbytes == self.entry.end

    def range_in(self, other: TensorEntry) -> tuple[int, int]:
        """The bytes (begin, end) of the same units in a tensor of the same count, in its file."""
        size = unit_bytes(other.dtype)
        begin = other.begin + self.first * size
        return begin, begin + self.units * size

    def segments(self) -> Iterator[tuple[int, slice]]:
        """(segment number in the tensor, its units as a slice of the span)."""
        for start in range(0, self.units, SEGMENT):
            yield (self.first + start) // SEGMENT, slice(start, min(start + SEGMENT, self.units))


@dataclass(frozen=True)
class Block:
    """Neighbouring spans of one file."""

    file: str
    spans: tuple[Span, ...]

    @property
    def begin(self) -> int:
        return self.spans[0].begin

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)


def blocks(file: str, header: Header) -> Iterator[Block]:
    """Every tensor of a file, in file order, without a gap."""
    spans: list[Span] = []
    room = BLOCK_BYTES
    for entry in header.tensors:
        for span in spans_of(entry):
            if spans and span.nbytes > room:
                yield Block(file, tuple(spans))
                spans, room = [], BLOCK_BYTES
            spans.append(span)
            room -= span.nbytes
    if spans:
        yield Block(file, tuple(spans))


def spans_of(entry: TensorEntry) -> Iterator[Span]:
    """A tensor, whole, as spans of at most a block; one of no units for an empty tensor."""
    size = unit_bytes(entry.dtype)
    total = entry.nbytes // size
    step = max(SEGMENT, BLOCK_BYTES // size // SEGMENT * SEGMENT)
    for first in range(0, max(total, 1), step):
        yield Span(entry, first, min(step, total - first))


@dataclass(frozen=True, order=True)
class Range:
    """Bytes [begin, end) of one file of a checkpoint."""

    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def span_range(span: Span, placed: Placed) -> Range:
    """Where the units of ``span`` lie in a tensor of the same count."""
    begin, end = span.range_in(placed.entry)
    return Range(placed.file, begin, end)


def new_buffer(nbytes: int) -> memoryview:
    """Memory to read into. np.empty, not bytearray: no time spent on zeros overwritten at once."""
    return np.empty(nbytes, dtype=np.uint8).data


def read_ranges(
    source: Checkpoint,
    ranges: Iterable[Range],
    buffer: Callable[[int], memoryview] = new_buffer,
) -> dict[Range, memoryview]:
    """Read ranges, neighbours in one request; nothing between them is read. ``buffer`` gives the
    memory they are read into."""
    views: dict[Range, memoryview] = {}
    for run in _runs(sorted(set(ranges))):
        begin, end = run[0].begin, run[-1].end
        whole = buffer(end - begin)
        if len(whole):
            source.read_into(run[0].file, begin, whole)
        for item in run:
            views[item] = whole[item.begin - begin : item.end - begin]
    return views


def _runs(ranges: list[Range]) -> Iterator[list[Range]]:
    run: list[Range] = []
    for item in ranges:
        if run and (item.file != run[-1].file or item.begin != run[-1].end):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def workers_for(*, remote: bool, gpu: bool = False) -> int:
    """Threads that read and compute. Each holds about 35 MB, so there are few of them however many
    cores there are: peak memory is a promise. Waiting for a network costs no core and gets more;
    so does waiting for a GPU, which copies in and out while it computes for another."""
    if remote:
        return MOST_WORKERS
    return MOST_WORKERS - 2 if gpu else min(os.cpu_count() or 1, MOST_WORKERS - 2)


def run_ordered(
    jobs: Iterable[J], work: Callable[[J], R], consume: Callable[[J, R], None], workers: int
) -> None:
    """Call ``work`` on every job in parallel, and ``consume`` on the results here and in order. At
    most ``workers + 2`` results exist at a time: one is consumed, and one waits for it, so that no
    worker has to. The first error stops everything and is raised."""
    waiting: deque[tuple[J, Future[R]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="hubdiff", initializer=_one_core_each)
    try:
        for job in jobs:
            waiting.append((job, pool.submit(work, job)))
            if len(waiting) > workers + 1:
                _take(waiting, consume)
        while waiting:
            _take(waiting, consume)
    finally:
        # Also on Ctrl-C: nothing that has not begun begins, what has begun is waited for.
        pool.shutdown(wait=True, cancel_futures=True)


def _take(waiting: deque[tuple[J, Future[R]]], consume: Callable[[J, R], None]) -> None:
    job, future = waiting.popleft()
    consume(job, future.result())


def _one_core_each() -> None:
    """The pool is the parallelism; torch's own threads would only fight over the same cores. Work
    that needs torch imports it before the pool begins; other work is not made to."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
