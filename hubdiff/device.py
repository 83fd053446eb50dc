"""Where the arithmetic is done: bytes become tensors on a device, payloads are decoded there, and
results come back as bytes.

``Cpu`` and ``Gpu`` offer the same. Work is done a block at a time, ``with engine.block() as work``;
``work`` belongs to one thread. On the CPU nothing is copied. On a GPU every worker thread has a
stream of its own, so that one block is copied in while another is computed and a third copied out;
the memory for it is pinned, and comes from torch's pool, which hands a buffer out again once nobody
holds it and the stream is done with it.

A GPU can't raise an error while it decodes. What only decoded bytes can tell is counted there and
looked at in ``settle``, before any result is used; a blob that is wrong is then decoded once more
on the CPU, which says what is wrong with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hubdiff import numerics, nvcomp
from hubdiff.encodings import ENCODINGS, Stream, packed, planes, tails
from hubdiff.encodings.dense import ESCAPE, Constant, Dense, Ranks, Signs, Symbols
from hubdiff.encodings.places import Places
from hubdiff.errors import CorruptPayload
from hubdiff.manifest import Part
from hubdiff.payloads import DAMAGED, blamed, decode_blob, decode_tail
from hubdiff.stream import new_buffer, unit_bytes

Layers = dict[str, "Tensor | None"]


class Work(Protocol):
    """One block's work on a device, for one thread."""

    @property
    def device(self) -> torch.device: ...

    def buffer(self, nbytes: int) -> memoryview:
        """Memory to read into that ``bring`` is fast from."""

    def bring(self, view: memoryview) -> Tensor:
        """Bytes as a uint8 tensor on the device. They must stay as they are until ``settle``."""

    def decode(self, part: Part, blob: memoryview, count: int, where: str) -> Tensor:
        """One layer of one segment as bit patterns (``numerics.UNITS``) of ``count`` units. Raises
        ``CorruptPayload``, here or in ``settle``."""

    def place(self, bits: np.ndarray) -> Tensor:
        """Bit patterns that were made on the CPU, as ``decode`` gives them."""

    def tail(self, part: Part, blob: memoryview, hi: Tensor, where: str) -> Tensor:
        """The ``lo`` that belongs to ``hi``, likewise."""

    def send(self, result: Tensor) -> memoryview:
        """The bytes of a uint8 tensor in memory. They are there after ``settle``."""

    def settle(self) -> None:
        """Wait until all is done. Raises ``CorruptPayload``."""


class Engine(Protocol):
    def block(self) -> AbstractContextManager[Work]:
        """The work of one block in the calling thread."""


def difference_of(part: Part, layers: Layers) -> numerics.Difference | None:
    """Δ of a segment out of its decoded ``hi`` and ``lo``; None when nothing changes."""
    hi, lo = layers.get("hi"), layers.get("lo")
    if hi is None:
        return None
    dtype = numerics.DTYPES[part.dtype]
    return numerics.Difference(hi.view(dtype), None if lo is None else lo.view(dtype))


class Cpu:
    """Tensors lie where the bytes are."""

    device = torch.device("cpu")

    @contextmanager
    def block(self) -> Iterator[Work]:
        yield self

    def buffer(self, nbytes: int) -> memoryview:
        return new_buffer(nbytes)

    def bring(self, view: memoryview) -> Tensor:
        return torch.from_numpy(np.frombuffer(view, np.uint8))

    def decode(self, part: Part, blob: memoryview, count: int, where: str) -> Tensor:
        return self.place(decode_blob(part, blob, count, where))

    def place(self, bits: np.ndarray) -> Tensor:
        return torch.from_numpy(bits if bits.itemsize == 1 else bits.view(f"<i{bits.itemsize}"))

    def tail(self, part: Part, blob: memoryview, hi: Tensor, where: str) -> Tensor:
        return self.place(_dense_tail(part, blob, hi, where))

    def send(self, result: Tensor) -> memoryview:
        return result.numpy().data

    def settle(self) -> None:
        pass


class Gpu:
    """A device that bytes are copied to. Its code runs on the CPU too, which is how it is tested
    where there is no GPU."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._frames = nvcomp.frame_decoder(self._device)
        self._local = threading.local()

    @contextmanager
    def block(self) -> Iterator[Work]:
        with self._stream():
            yield _GpuWork(self._device, self._frames)

    def _stream(self) -> AbstractContextManager[object]:
        """This thread's own, current; nothing in it waits for another thread's copies."""
        if self._device.type != "cuda":
            return nullcontext()
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._local.stream)


class _GpuWork:
    def __init__(
        self, device: torch.device, frames: Callable[[Stream, Tensor], Tensor] | None
    ) -> None:
        self.device = device
        self._frames = frames
        self._pinned = device.type == "cuda"
        self._doubts: list[tuple[Tensor, Callable[[], object], str]] = []

    def buffer(self, nbytes: int) -> memoryview:
        return self._host(nbytes).numpy().data

    def bring(self, view: memoryview) -> Tensor:
        # From pageable memory this is right as well, only slower: the driver copies it aside first.
        return self._up(torch.from_numpy(np.frombuffer(view, np.uint8)))

    def decode(self, part: Part, blob: memoryview, count: int, where: str) -> Tensor:
        width = unit_bytes(part.dtype)
        if 8 * width not in ENCODINGS[part.encoding].widths or part.encoding not in _RENDERED:
            return self.place(decode_blob(part, blob, count, where))
        made = _Blob(self._load, self.device, count, width)
        return self._checked(
            lambda: _RENDERED[part.encoding](made, blob),
            made,
            lambda: decode_blob(part, blob, count, where),
            where,
        )

    def tail(self, part: Part, blob: memoryview, hi: Tensor, where: str) -> Tensor:
        if part.dtype not in tails.EXPONENTS:
            return self.place(_dense_tail(part, blob, hi, where))
        made = _Blob(self._load, self.device, hi.numel(), unit_bytes(part.dtype))
        return self._checked(
            lambda: made.from_tails(blob, hi, tails.EXPONENTS[part.dtype]),
            made,
            lambda: _dense_tail(part, blob, hi, where),
            where,
        )

    def _checked(
        self,
        make: Callable[[], Tensor],
        made: _Blob,
        on_cpu: Callable[[], object],
        where: str,
    ) -> Tensor:
        """What ``make`` makes; ``on_cpu`` says what is wrong with it, now or in ``settle``."""
        try:
            with blamed(where):
                bits = make()
        except CorruptPayload:
            # Of several faults the CPU meets another one first: the same words on every device.
            self.settle()
            on_cpu()
            raise
        if made.wrong:
            self._doubts.append((torch.stack(made.wrong).any(), on_cpu, where))
        return bits

    def place(self, bits: np.ndarray) -> Tensor:
        return self._stage(bits.view(np.uint8)).view(numerics.UNITS[bits.itemsize])

    def send(self, result: Tensor) -> memoryview:
        return self._host(result.numel()).copy_(result, non_blocking=self._pinned).numpy().data

    def settle(self) -> None:
        if self._doubts:
            found = torch.stack([wrong for wrong, _, _ in self._doubts]).tolist()
            for wrong, (_, decode_again, where) in zip(found, self._doubts, strict=True):
                if wrong:
                    decode_again()
                    raise CorruptPayload(f"{where}: can't be decoded", next_step=DAMAGED)
        if self._pinned:
            torch.cuda.current_stream(self.device).synchronize()

    def _host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)

    def _up(self, here: Tensor) -> Tensor:
        return here.to(self.device, non_blocking=self._pinned)

    def _stage(self, content: np.ndarray) -> Tensor:
        """uint8 content of any memory, by way of a pinned buffer."""
        here = self._host(content.size)
        here.numpy()[:] = content
        return self._up(here)

    def _load(self, stream: Stream) -> Tensor:
        """The bytes of a stream on the device; what is repeated or packed travels as such."""
        if stream.repeated is not None:
            shape, byte = (stream.raw_size,), stream.repeated
            return torch.full(shape, byte, dtype=torch.uint8, device=self.device)
        if stream.framed and self._frames is not None and stream.raw_size <= nvcomp.LARGEST:
            return self._frames(stream, self._stage(np.frombuffer(stream.body, np.uint8)))
        return self._stage(stream.content())


class _Blob:
    """The symbols of one blob, made on the device without waiting for it: every index is kept in
    range, and what should not have been out of range is put into ``wrong``, as flags."""

    def __init__(
        self, load: Callable[[Stream], Tensor], device: torch.device, count: int, width: int
    ) -> None:
        self._load, self._device, self._count, self._width = load, device, count, width
        self.wrong: list[Tensor] = []

    def from_planes(self, blob: memoryview) -> Tensor:
        return self._joined(planes.parse(blob, self._count, self._width))

    def from_packed(self, blob: memoryview) -> Tensor:
        parsed = packed.parse(blob, self._count)
        if isinstance(parsed, packed.Gaps):
            return self._gaps(parsed)
        if isinstance(parsed, packed.Bitmap):
            return self._bitmap(parsed)
        return self._dense(parsed, self._count)

    def _joined(self, streams: list[Stream]) -> Tensor:
        columns = torch.stack([self._load(stream) for stream in streams], 1)
        return columns.view(-1).view(numerics.UNITS[len(streams)])

    def from_tails(self, blob: memoryview, hi: Tensor, exponent: int) -> Tensor:
        parsed = tails.parse(blob, self._count)
        among: list[int | Tensor] = [self._count]
        in_order = None
        if parsed.variant != tails.ANYWHERE:
            kinds, totals = _kinds(hi)
            in_order = kinds.argsort(stable=True)  # the elements kind by kind, unchanged ones last
            among = [*totals] if parsed.variant == tails.APART else [totals.sum()]
        out = torch.zeros_like(hi)
        start: int | Tensor = 0
        for one, size in zip(parsed.lists, among, strict=True):
            if one is not None:
                elements = (self._places(one, size) + start).clamp_(0, self._count - 1)
                if in_order is not None:
                    elements = in_order[elements]
                symbols, theirs = self._dense(one.symbols, one.count), hi[elements]
                lo = ((theirs - (symbols & exponent)) & exponent) | (symbols & ~exponent)
                self.wrong += [(theirs == -0x8000).any(), (lo == 0).any()]
                out[elements] = lo
            start = start + size
        return out

    def _dense(self, dense: Dense, count: int) -> Tensor:
        if isinstance(dense, Constant):
            return self._full(count, dense.symbol)
        if isinstance(dense, Signs):
            flips = self._bits(dense.flips, count).short() * -0x8000
            return self._dense(dense.rest, count) ^ flips
        return self._ranks(dense) if isinstance(dense, Ranks) else self._symbols(dense)

    def _full(self, count: int, symbol: int) -> Tensor:
        signed = symbol - (1 << 16) if symbol >> 15 else symbol
        return torch.full((count,), signed, dtype=torch.int16, device=self._device)

    def _bits(self, stream: Stream, count: int) -> Tensor:
        """The first bits of a stream as bool, the lowest of each byte first."""
        bits = self._load(stream)[:, None] >> torch.arange(8, device=self._device)
        return (bits.view(-1)[:count] & 1).bool()

    def _symbols(self, symbols: Symbols) -> Tensor:
        rotated = self._joined([symbols.low, symbols.high])
        return ((rotated >> 1) & 0x7FFF) | ((rotated & 1) * -0x8000)

    def _ranks(self, parsed: Ranks) -> Tensor:
        ranks, size = self._load(parsed.ranks), parsed.table.length
        is_escape = ranks == ESCAPE
        self.wrong.append(is_escape.sum() != parsed.escapes)
        self.wrong.append((ranks >= size).sum() != parsed.escapes)
        table = self._full(256, 0)
        table[:size] = self._symbols(parsed.table)
        found = table.index_select(0, ranks.int())
        if parsed.escaped is None:
            return found
        return self._filled(found, is_escape, parsed.escaped, parsed.escapes)

    def _bitmap(self, bitmap: packed.Bitmap) -> Tensor:
        marks = self._bits(bitmap.marks, self._count)
        self.wrong.append(marks.sum() != bitmap.count)
        common = self._full(self._count, bitmap.common)
        return self._filled(common, marks, bitmap.others, bitmap.count)

    def _filled(self, symbols: Tensor, marks: Tensor, dense: Dense, count: int) -> Tensor:
        """``symbols``, and where ``marks`` are set the ``count`` of a dense blob in order."""
        others = self._dense(dense, count)
        nth = (marks.cumsum(0, dtype=torch.int32) - 1).clamp_(0, count - 1)
        return torch.where(marks, others.index_select(0, nth), symbols)

    def _gaps(self, gaps: packed.Gaps) -> Tensor:
        out = self._full(self._count, gaps.common)
        found = self._places(gaps.others, self._count).clamp_(0, self._count - 1)
        out[found] = self._dense(gaps.others.symbols, gaps.others.count)
        return out

    def _places(self, places: Places, below: int | Tensor) -> Tensor:
        """The places as int64. Where they are wrong, which is noted, they may be any number."""
        coarse = self._load(places.coarse)
        is_end = coarse != ESCAPE
        ends = is_end.cumsum(0)
        # Bytes that end no gap, or one too many, write to one place more, which is then left out.
        nth = torch.where(is_end, ends - 1, places.count).clamp_(0, places.count)
        far = coarse.new_zeros(places.count + 1, dtype=torch.int64)
        far[nth] = coarse.cumsum(0, dtype=torch.int64)
        found = far[:-1] << places.fine_bits
        if places.fine_bits:
            found += self._fine(places).cumsum(0)
        found += torch.arange(places.count, device=self._device)
        self.wrong += [ends[-1] != places.count, ~is_end[-1], found[-1] >= below]
        return found

    def _fine(self, places: Places) -> Tensor:
        """The fine bits of each gap as a number; two bytes of nothing follow the last ones, so that
        each can be looked for in three bytes."""
        content = torch.nn.functional.pad(self._load(places.fine), (0, 2)).long()
        first = torch.arange(places.count, device=self._device) * places.fine_bits
        byte, bit = first >> 3, first & 7
        held = content[byte] | content[byte + 1] << 8 | content[byte + 2] << 16
        return (held >> bit) & ((1 << places.fine_bits) - 1)


def _kinds(hi: Tensor) -> tuple[Tensor, Tensor]:
    """The kind of each element by number, ``KINDS`` where it has none, and how many there are of
    each kind."""
    kinds = torch.full_like(hi, tails.KINDS - 1, dtype=torch.uint8)
    for zeros in reversed(range(tails.KINDS - 1)):
        kinds[(hi & ((2 << zeros) - 1)) == 1 << zeros] = zeros
    kinds[hi == -0x8000] = tails.KINDS
    all_kinds = torch.arange(tails.KINDS, device=hi.device)
    return kinds, (kinds[None] == all_kinds[:, None]).sum(1)


def _dense_tail(part: Part, blob: memoryview, hi: Tensor, where: str) -> np.ndarray:
    """``lo`` made on the CPU."""
    here = hi.cpu().numpy().view(np.uint16)
    return decode_tail(part, blob, here, where).full(here.size)


_RENDERED = {"packed": _Blob.from_packed, "planes": _Blob.from_planes}
