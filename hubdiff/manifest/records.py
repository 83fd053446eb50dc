"""What a delta is made of, as typed values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hubdiff.names import Rename
from hubdiff.rows import Cut
from hubdiff.sample import Sample

if TYPE_CHECKING:
    from hubdiff.encodings.low_rank import Product

GROUPS = ("delta", "tail", "exact")
# Enough of a tensor's start to tell two models apart, little enough to ask for over a network.
PROBE_BYTES = 4096
LOW_RANK = "low-rank"  # the encoding of parts that are factors
# The dtypes that have a Δ of numbers.
FLOATS = ("BF16", "F16", "F32")
# Sources of a file that is put together from tensors, under a header of its own.
REBUILT = ("weights", "adapter")


@dataclass(frozen=True)
class FileRecord:
    """A file by content."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class MadeFile:
    """A file of a result by content. Nothing lists a hash of it that this one would have to be
    compared with, so it is blake3, which takes a fraction of the time of sha256."""

    path: str
    size: int
    blake3: str


WrittenFile = FileRecord | MadeFile


def written_file(document: dict[str, Any]) -> WrittenFile:
    """The file that ``dataclasses.asdict`` made the document of. Raises ``TypeError``."""
    return MadeFile(**document) if "blake3" in document else FileRecord(**document)


@dataclass(frozen=True)
class TunedFile(FileRecord):
    """A file of the tuned repo and where its bytes come from: ``weights`` (rebuilt tensor by
    tensor under ``header``), ``adapter`` (likewise, out of what ``Manifest.adapter`` says),
    ``delta`` (stored in the delta repo) or ``base`` (equal to the base's file of that path)."""

    source: str
    header: bytes | None = None


@dataclass(frozen=True)
class NotCarried:
    path: str
    size: int
    reason: str


@dataclass(frozen=True)
class Side:
    """One model a delta was made from. ``repo`` and ``commit`` are None for a local folder, whose
    files' hashes pin it; ``name`` is what people call it. ``files`` are its weights,
    ``side_files`` the rest of what a delta would carry (both for the base only: the tuned model's
    files are ``Manifest.tuned_files``)."""

    name: str
    repo: str | None
    revision: str | None
    commit: str | None
    licence: str | None
    gated: bool
    files: tuple[FileRecord, ...] = ()
    side_files: tuple[FileRecord, ...] = ()


@dataclass(frozen=True)
class LowRank:
    """What a part of the encoding ``low-rank`` holds: Δ = ``scale`` · L · R, factors of ``dtype``.

    ``alpha`` is an adapter's, None for a truncated Δ. That has ``error``, ‖Δ − scale·L·R‖/‖Δ‖ as
    measured, and ``energy``, the share of ‖Δ‖² in the singular values kept; of an adapter, whose Δ
    is the product, ``error`` is 0 and ``energy`` None."""

    rank: int
    alpha: float | None
    scale: float
    dtype: str
    error: float
    energy: float | None

    def product(self, shape: tuple[int, ...]) -> Product:
        from hubdiff.encodings.low_rank import Product  # numpy: not for who reads a manifest only

        return Product.of(shape, self.rank, self.dtype, self.scale)


@dataclass(frozen=True)
class Part:
    """Encoded bytes of one tensor in one group of files. ``layers`` are ``("hi", "lo")``,
    ``("hi",)``, ``("lo",)``, ``("raw",)`` or ``("ulp",)``; ``dtype`` is that of the decoded
    values. ``low_rank`` belongs to the encoding of that name, and no other part has it."""

    group: str
    layers: tuple[str, ...]
    encoding: str
    dtype: str
    bytes: int
    blake3: str
    low_rank: LowRank | None = None


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter's file, ``name``, and what it is to the record ``tensor``: the
    ``left`` or ``right`` factor, the ``whole`` tuned tensor, or the ``base``'s tensor again.
    ``transposed``: a factor that stands transposed in the file."""

    name: str
    tensor: str
    role: str
    transposed: bool


@dataclass(frozen=True)
class Lossy:
    """How a truncated Δ was asked for, by ``rank`` or by ``energy``, and the relative ``error`` of
    all of it: √(Σ‖Δ − what is stored‖²) / √(Σ‖Δ‖²)."""

    rank: int | None
    energy: float | None
    error: float


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the tuned model. ``name`` is the base's name where the base has it. No parts:
    unchanged. ``base_dtype`` None: added by the tune. ``probe`` is the blake3 of the base tensor's
    first bytes, for recognising the base cheaply. ``tuned`` is None where an adapter has factors
    for the tensor: it has no bytes of its own then."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    base_dtype: str | None
    tuned: str | None
    base: str | None
    probe: str | None
    parts: tuple[Part, ...]
    changed: int
    delta_norm: float
    base_norm: float
    tuned_name: str

    @property
    def added(self) -> bool:
        return self.base_dtype is None

    @property
    def unchanged(self) -> bool:
        return not self.parts

    @property
    def portable(self) -> bool:
        """Whether it carries anything that can be put on another base."""
        return any(part.group != "exact" for part in self.parts)

    def part(self, group: str) -> Part | None:
        return next((part for part in self.parts if part.group == group), None)


@dataclass(frozen=True)
class Manifest:
    """``rows`` says which tensors of the vocabulary are cut, by the names of their records: those
    hold the rows that the base has too, what the tuned model has beyond them is an added tensor.
    ``same_tokens``: the tuned model's tokens are known to be the base's. ``started_from`` is the
    delta that was on the base when training began, where its card says so."""

    hubdiff_version: str
    base: Side
    tuned: Side
    tuned_files: tuple[TunedFile, ...]
    not_carried: tuple[NotCarried, ...]
    tensors: tuple[TensorRecord, ...]
    removed: tuple[str, ...]
    layers: dict[str, tuple[FileRecord, ...]]
    side_files: tuple[FileRecord, ...]
    rename: Rename | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    not_portable_reason: str | None = None
    filters: dict[str, tuple[str, ...]] | None = None
    master: Side | None = None
    provenance: dict[str, Any] | None = None
    started_from: Side | None = None
    adapter: tuple[AdapterTensor, ...] | None = None
    lossy: Lossy | None = None
    sample: Sample | None = None
    rows: dict[str, Cut] = field(default_factory=dict)
    same_tokens: bool = False
    policy: dict[str, str] = field(
        default_factory=lambda: {"only_in_tuned": "add", "only_in_base": "keep"}
    )

    @property
    def partial(self) -> bool:
        """Made with --include or --exclude: portable, but no own-base rebuild."""
        return self.filters is not None

    @property
    def complete(self) -> bool:
        """Whether every tensor of the tuned model has a record."""
        return not self.partial and self.adapter is None

    @property
    def no_rebuild_reason(self) -> str | None:
        """Why there is no own base on which the tuned model comes back; None where there is."""
        if self.adapter is not None:
            return "the tuned model is an adapter, which is added to its base too"
        if self.lossy is not None:
            return f"the delta is lossy, a truncated Δ ({_truncation(self.lossy)})"
        return "the delta holds only some of the tensors" if self.partial else None


def _truncation(lossy: Lossy) -> str:
    asked = f"rank {lossy.rank}" if lossy.rank is not None else f"energy {lossy.energy}"
    return f"{asked}, error {100 * lossy.error:.3g} %"


def sampled_counts(tensors: Iterable[TensorRecord]) -> dict[str, int]:
    """The elements of every tensor that a sample may have blocks of: those that have a Δ of
    numbers."""
    return {
        record.name: math.prod(record.shape)
        for record in tensors
        if {record.dtype, record.base_dtype} <= set(FLOATS)
    }
