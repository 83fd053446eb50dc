"""The sample: a few blocks of every tensor, of which a delta keeps the base's values and Δ's.

With it another target is compared with the base by reading the same blocks of the target: the base
itself is not needed, nor the delta's weights. ``choose`` decides which blocks; a reader takes them
from the manifest. FORMAT.md, "The sample", specifies the file.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice, pairwise, zip_longest
from typing import TYPE_CHECKING, NamedTuple

from hubdiff import fields
from hubdiff.anatomy import place
from hubdiff.errors import CorruptPayload

if TYPE_CHECKING:
    import numpy as np

FILE = "sample.safetensors"
BLOCK = 256  # elements: half a kilobyte of a 16-bit tensor
# So many elements at most, about 2 MB compressed and one segment of a payload; of a model of less
# than half a billion one in 512; of a toy up to one in 50.
MOST, ONE_IN, ONE_IN_OF_A_TOY, TOY = 1 << 20, 512, 50, 1 << 16
# Blocks stand in groups that are read in one request: so many groups, and in a group a block in
# every ``_STRIDE``, so that they are of different rows.
GROUPS, _STRIDE = 512, 16
_SEED = b"hubdiff sample 1"
_DAMAGED = "The delta is damaged; ask its author to push it again."


@dataclass(frozen=True)
class _Tensor:
    """What the choice depends on: the number of elements."""

    name: str
    count: int

    @property
    def blocks(self) -> int:
        return -(-self.count // BLOCK)


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: its elements from ``first`` on."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Sample:
    """``blocks`` are the numbers of each tensor's blocks, ascending; ``counts`` the elements of
    those tensors; ``dtype`` is that of the base's values in the file, BF16, F16 or F32."""

    dtype: str
    blocks: Mapping[str, tuple[int, ...]]
    counts: Mapping[str, int]

    def pieces(self) -> Iterator[Piece]:
        """Every block, in the order of the file."""
        for name in self.blocks:
            yield from self.pieces_of(name)

    def pieces_of(self, name: str) -> Iterator[Piece]:
        for block in self.blocks[name]:
            first = block * BLOCK
            yield Piece(name, first, min(BLOCK, self.counts[name] - first))

    def within(self, name: str, first: int, count: int) -> tuple[int, ...]:
        """The blocks of a tensor among its elements from ``first`` on, which is where one
        begins."""
        numbers = self.blocks.get(name, ())
        begin, end = first // BLOCK, -(-(first + count) // BLOCK)
        return numbers[bisect_left(numbers, begin) : bisect_left(numbers, end)]

    @property
    def elements(self) -> int:
        return sum(piece.count for piece in self.pieces())

    def weights(self) -> dict[str, float]:
        """How many elements of the model each element of a tensor's blocks stands for. Tensors that
        have none are stood for by those of their layer and kind."""
        taken = {name: sum(p.count for p in self.pieces_of(name)) for name in self.blocks}
        whole: dict[object, int] = {}
        seen: dict[object, int] = {}
        for name, count in self.counts.items():
            whole[place(name)] = whole.get(place(name), 0) + count
            if taken.get(name):
                seen[place(name)] = seen.get(place(name), 0) + count
        return {
            name: self.counts[name] / number * whole[place(name)] / seen[place(name)]
            for name, number in taken.items()
            if number
        }


# --- which blocks ---


def choose(counts: Mapping[str, int], dtype: str) -> Sample:
    """The sample of tensors with so many elements each. The same ones give the same blocks."""
    tensors = [_Tensor(name, count) for name, count in counts.items() if count]
    total = sum(tensor.count for tensor in tensors)
    room = min(MOST, max(total // ONE_IN, min(total // ONE_IN_OF_A_TOY, TOY))) // BLOCK
    chosen = _stratified(tensors)
    groups = _share_out(chosen, max(len(chosen), min(GROUPS, room)))
    size = max(1, room // max(1, sum(groups.values())))
    stride = min(_STRIDE, max(1, total // BLOCK // ONE_IN_OF_A_TOY // max(1, room)))
    blocks = {t.name: _blocks(t, groups[t.name], size, stride) for t in chosen}
    return Sample(dtype, blocks, counts)


def _stratified(tensors: list[_Tensor]) -> list[_Tensor]:
    """At most ``GROUPS`` of the tensors, in the order given: one of every layer and kind, then a
    second, and so on. Of more layers and kinds than that, some from beginning to end."""
    if len(tensors) <= GROUPS:
        return tensors
    places: dict[tuple[str, int, str], list[_Tensor]] = {}
    for tensor in sorted(tensors, key=lambda tensor: _random(tensor.name, 0)):
        places.setdefault(_sortable(tensor.name), []).append(tensor)
    ordered = [members for _, members in sorted(places.items())]
    if len(ordered) > GROUPS:
        step = len(ordered) / GROUPS
        ordered = [ordered[int((number + 0.5) * step)] for number in range(GROUPS)]
    rounds = zip_longest(*ordered)
    kept = set(islice(filter(None, chain(*rounds)), GROUPS))
    return [tensor for tensor in tensors if tensor in kept]


def _sortable(name: str) -> tuple[str, int, str]:
    stack, layer, kind = place(name)
    return stack, -1 if layer is None else layer, kind


def _share_out(tensors: list[_Tensor], groups: int) -> dict[str, int]:
    """One group for every tensor, the others by size."""
    total = sum(tensor.count for tensor in tensors)
    spare = groups - len(tensors)
    return {t.name: min(t.blocks, 1 + spare * t.count // total) for t in tensors}


def _blocks(tensor: _Tensor, groups: int, size: int, stride: int) -> tuple[int, ...]:
    """``groups`` groups of ``size`` blocks, each somewhere in a section of its own."""
    found: list[int] = []
    for group in range(groups):
        begin = tensor.blocks * group // groups
        end = tensor.blocks * (group + 1) // groups
        step = max(1, min(stride, (end - begin) // size))
        number = min(size, end - begin)
        width = (number - 1) * step + 1
        start = begin + _random(tensor.name, group) % (end - begin - width + 1)
        found += range(start, start + width, step)
    return tuple(found)


def _random(name: str, number: int) -> int:
    digest = blake2b(b"%d\0%s" % (number, name.encode()), digest_size=8, key=_SEED)
    return int.from_bytes(digest.digest(), "little")


# --- in the manifest ---


def to_json(sample: Sample) -> dict[str, object]:
    return {
        "dtype": sample.dtype,
        "block": BLOCK,
        "blocks": {name: list(numbers) for name, numbers in sample.blocks.items()},
    }


def from_json(reader: fields.Fields, counts: Mapping[str, int]) -> Sample:
    """The sample of a manifest, of tensors that have so many elements. Raises ``BadManifest``."""
    dtype = reader.get("dtype", fields.one_of("BF16", "F16", "F32"))
    if reader.get("block", fields.positive) != BLOCK:
        raise reader.bad("block", f"is not {BLOCK}")
    blocks: dict[str, tuple[int, ...]] = {}
    numbers = reader.child("blocks")
    for name in reader.get("blocks", fields.mapping):
        found = tuple(numbers.get(name, fields.naturals))
        ascending = all(a < b for a, b in pairwise(found))
        if name not in counts or not ascending or (found and found[-1] * BLOCK >= counts[name]):
            raise numbers.bad(name, "lists blocks that its tensor does not have")
        blocks[name] = found
    sample = Sample(dtype, blocks, counts)
    if sample.elements > MOST:
        raise reader.bad("blocks", f"makes a sample of {sample.elements:,} elements")
    return sample


# --- the file ---


class Values(NamedTuple):
    """The values of all blocks, one after the other: the base's as float32, Δ's as BF16 or wider
    numbers, as float32."""

    base: np.ndarray
    delta: np.ndarray


def encode(sample: Sample, base: np.ndarray, delta: np.ndarray) -> bytes:
    """The file: ``base``, patterns of the sample's dtype, and ``delta``, patterns of BF16."""
    from hubdiff.encodings import ENCODINGS
    from hubdiff.safetensors_io import build_header

    parts = [
        ("base", ENCODINGS[_encoding(sample)].encode(base) if len(base) else b""),
        ("delta", ENCODINGS["packed"].encode(delta) if len(delta) else b""),
    ]
    header = build_header([(name, "U8", (len(data),), len(data)) for name, data in parts], {})
    return header + b"".join(data for _, data in parts)


def decode(sample: Sample, data: bytes, where: str) -> Values:
    """What ``encode`` wrote. Raises ``BadSafetensors`` or ``CorruptPayload``."""
    import numpy as np

    from hubdiff.encodings import ENCODINGS
    from hubdiff.floats import BYTES, floats
    from hubdiff.safetensors_io import parse_header

    length = int.from_bytes(data[:8], "little")
    header = parse_header(data[: 8 + length], len(data), where)
    found = {entry.name: data[entry.begin : entry.end] for entry in header.tensors}
    values = []
    for name, dtype, encoding in (
        ("base", sample.dtype, _encoding(sample)),
        ("delta", "BF16", "packed"),
    ):
        if name not in found:
            raise CorruptPayload(
                f"{where} has no tensor {name!r}",
                next_step=_DAMAGED,
            )
        patterns = np.empty(sample.elements, f"<u{BYTES[dtype]}")
        if len(patterns):
            try:
                ENCODINGS[encoding].decode(found[name], patterns)
            except CorruptPayload as error:
                raise CorruptPayload(f"{where}: {error}", next_step=_DAMAGED) from error
        values.append(floats(patterns, dtype))
    return Values(*values)


def _encoding(sample: Sample) -> str:
    return "planes" if sample.dtype == "F32" else "packed"
