"""The manifest, ``hubdiff.json``: what a delta is made of, as typed values ⇄ JSON.

Parsing checks every field before anything else trusts it: types, hashes, paths, dtypes, shapes, and
that the parts fit together. Unknown fields are ignored, so that a minor addition stays readable; a
higher ``format_version`` is refused. FORMAT.md specifies the fields.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import zstandard

from hubdiff import fields
from hubdiff import sample as sampling
from hubdiff.checkpoint import MANIFEST
from hubdiff.errors import NewerFormat, NotADelta
from hubdiff.files import FileTree
from hubdiff.names import Rename
from hubdiff.rows import Cut, rest_name, whole_name
from hubdiff.safetensors_io import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    first_repeated,
    tensor_bytes,
)

if TYPE_CHECKING:
    from hubdiff.encodings.low_rank import Product

FORMAT_VERSION = 1
GROUPS = ("delta", "tail", "exact")
# Enough of a tensor's start to tell two models apart, little enough to ask for over a network.
PROBE_BYTES = 4096
# What a part of each group may hold, layer by layer.
LAYERS = {
    "delta": (("hi", "lo"), ("hi",), ("raw",)),
    "tail": (("lo",),),
    "exact": (("raw",), ("ulp",)),
}
LOW_RANK = "low-rank"  # the encoding of parts that are factors
_FLOATS = ("BF16", "F16", "F32")
# Sources of a file that is put together from tensors, under a header of its own.
_REBUILT = ("weights", "adapter")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    sample: sampling.Sample | None = None
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

    def to_json(self) -> str:
        document = {
            "format_version": FORMAT_VERSION,
            "hubdiff_version": self.hubdiff_version,
            "base": {
                **_side_json(self.base),
                "files": [asdict(f) for f in self.base.files],
                "side_files": [asdict(f) for f in self.base.side_files],
            },
            "tuned": {
                **_side_json(self.tuned),
                "files": [_tuned_file_json(f) for f in self.tuned_files],
                "not_carried": [asdict(f) for f in self.not_carried],
            },
            "master": self.master and _side_json(self.master),
            "portable": self.not_portable_reason is None,
            "not_portable_reason": self.not_portable_reason,
            "filters": self.filters,
            "rename": self.rename
            and {"tuned_prefix": self.rename.left, "base_prefix": self.rename.right},
            "policy": self.policy,
            "removed": self.removed,
            "aliases": self.aliases,
            "layers": {group: [asdict(f) for f in files] for group, files in self.layers.items()},
            "side_files": [asdict(f) for f in self.side_files],
            "provenance": self.provenance,
            "tensors": [_tensor_json(record) for record in self.tensors],
        }
        if self.started_from is not None:
            document["started_from"] = _side_json(self.started_from)
        if self.adapter is not None:
            document["adapter"] = {"tensors": [asdict(tensor) for tensor in self.adapter]}
        if self.lossy is not None:
            document["lossy"] = asdict(self.lossy)
        if self.sample is not None:
            document["sample"] = sampling.to_json(self.sample)
        if self.same_tokens:
            document["same_tokens"] = True
        if self.rows:
            document["rows"] = {name: asdict(cut) for name, cut in self.rows.items()}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def read_manifest(tree: FileTree) -> Manifest:
    """The manifest of the delta in ``tree``. Raises ``NotADelta``, ``NewerFormat`` or
    ``BadManifest``."""
    if MANIFEST not in tree.files():
        raise NotADelta(
            f"{tree.pin} has no {MANIFEST}: it is not a delta",
            next_step="A delta is made with: hubdiff push-delta TUNED REPO --base BASE.",
        )
    return parse_manifest(tree.read_bytes(MANIFEST), f"{tree.pin}/{MANIFEST}")


def parse_manifest(text: bytes, where: str) -> Manifest:
    """The manifest in ``text``; ``where`` names the file in errors. Raises ``BadManifest`` or
    ``NewerFormat``."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise fields.bad_manifest(where, f"is not JSON ({error})") from error
    root = fields.Fields(document, where, "")
    version = root.get("format_version", fields.positive)
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"{where} has format version {version}, this hubdiff reads up to {FORMAT_VERSION}",
            next_step="Upgrade: pip install --upgrade hubdiff.",
        )
    return _manifest(root)


def _manifest(root: fields.Fields) -> Manifest:
    tuned = root.child("tuned")
    rename = root.optional_child("rename")
    layers = root.child("layers")
    filters = root.optional_child("filters")
    adapter = root.optional_child("adapter") if "adapter" in root else None
    lossy = root.optional_child("lossy") if "lossy" in root else None
    _check_header_sizes(tuned)
    tensors = tuple(_tensor(item, adapter is not None) for item in root.children("tensors"))
    manifest = Manifest(
        hubdiff_version=root.get("hubdiff_version", fields.string),
        base=_base(root.child("base")),
        tuned=_side(tuned),
        tuned_files=tuple(_tuned_file(item) for item in tuned.children("files")),
        not_carried=tuple(
            NotCarried(
                i.get("path", fields.string),
                i.get("size", fields.natural),
                i.get("reason", fields.string),
            )
            for i in tuned.children("not_carried")
        ),
        tensors=tensors,
        removed=tuple(root.get("removed", fields.strings)),
        layers={g: tuple(_file(item) for item in layers.children(g)) for g in GROUPS},
        side_files=tuple(_file(item) for item in root.children("side_files")),
        rename=Rename(
            rename.get("tuned_prefix", fields.string), rename.get("base_prefix", fields.string)
        )
        if rename
        else None,
        aliases=root.get("aliases", fields.string_map),
        not_portable_reason=root.get("not_portable_reason", fields.optional(fields.string)),
        filters={k: tuple(filters.get(k, fields.strings)) for k in ("include", "exclude")}
        if filters
        else None,
        master=_side(master) if (master := root.optional_child("master")) else None,
        provenance=root.get("provenance", fields.optional(fields.mapping)),
        started_from=_side(root.child("started_from")) if "started_from" in root else None,
        adapter=tuple(_adapter_tensor(item) for item in adapter.children("tensors"))
        if adapter
        else None,
        lossy=_lossy(lossy) if lossy else None,
        sample=sampling.from_json(root.child("sample"), sampled_counts(tensors))
        if "sample" in root
        else None,
        rows=_rows(root, tensors) if "rows" in root else {},
        same_tokens=root.get("same_tokens", fields.boolean) if "same_tokens" in root else False,
        policy=root.get("policy", fields.string_map),
    )
    _check_names(manifest, root)
    _check_cut(manifest, root)
    return manifest


def _rows(root: fields.Fields, tensors: Iterable[TensorRecord]) -> dict[str, Cut]:
    """Where vocabulary tensors are cut: behind the rows of their records."""
    shapes = {record.name: record.shape for record in tensors}
    cuts, reader = {}, root.child("rows")
    for name in root.get("rows", fields.mapping):
        one = reader.child(name)
        cut = Cut(
            one.get("shared", fields.natural),
            one.get("base", fields.optional(fields.natural)),
            one.get("rest", fields.optional(fields.digest)),
        )
        shape, rest = shapes.get(name, ()), shapes.get(rest_name(name, cut.shared))
        if shape[:1] != (cut.shared,):
            raise reader.bad(name, f"is cut behind {cut.shared:,} rows, which no record has")
        if rest is not None and (rest[1:] != shape[1:] or len(rest) != len(shape)):
            raise reader.bad(name, f"has rows of {list(rest)} behind those of {list(shape)}")
        if cut.base is not None and cut.base < cut.shared:
            raise reader.bad(name, f"shares {cut.shared:,} rows of {cut.base:,}")
        cuts[name] = cut
    return cuts


def _check_cut(manifest: Manifest, root: fields.Fields) -> None:
    """Rows that no cut explains are no tensor that a model could have."""
    for record in manifest.tensors:
        whole = whole_name(record.name)
        if whole == record.name:
            continue
        cut = manifest.rows.get(whole)
        if cut is None or record.name != rest_name(whole, cut.shared) or not record.added:
            raise root.bad("tensors", f"rows called {record.name!r} that no cut explains")
    rests = {
        math.prod(record.shape[:1])
        for record in manifest.tensors
        if whole_name(record.name) != record.name
    }
    if len({cut.shared for cut in manifest.rows.values()}) > 1 or len(rests) > 1:
        raise root.bad("rows", "cuts tensors of one vocabulary in more than one place")


def sampled_counts(tensors: Iterable[TensorRecord]) -> dict[str, int]:
    """The elements of every tensor that a sample may have blocks of: those that have a Δ of
    numbers."""
    return {
        record.name: math.prod(record.shape)
        for record in tensors
        if {record.dtype, record.base_dtype} <= set(_FLOATS)
    }


def _check_header_sizes(tuned: fields.Fields) -> None:
    """Headers of all shards together are no larger than one header may be: each alone could be, and
    a small manifest would unpack to gigabytes."""
    headers = [i.get("header", _frame) for i in tuned.children("files") if "header" in i]
    if sum(map(zstandard.frame_content_size, headers)) > MAX_HEADER_BYTES:
        raise tuned.bad("files", f"has headers of more than {MAX_HEADER_BYTES:,} bytes in all")


def _check_names(manifest: Manifest, root: fields.Fields) -> None:
    for kind, names in (
        ("name", [record.name for record in manifest.tensors]),
        ("tuned_name", [record.tuned_name for record in manifest.tensors]),
    ):
        twice = first_repeated(names)
        if twice is not None:
            raise root.bad("tensors", f"two tensors have the {kind} {twice!r}")
    for file in manifest.tuned_files:
        if file.source in _REBUILT and "/" in file.path:
            raise root.bad("tuned.files", f"the weights file {file.path!r} is not at the root")
        # With another ending one could take the place of the result's card or config.
        if file.source in _REBUILT and not file.path.endswith(".safetensors"):
            raise root.bad("tuned.files", f"the weights file {file.path!r} is no .safetensors")
    if len({file.path for file in manifest.tuned_files}) != len(manifest.tuned_files):
        raise root.bad("tuned.files", "names a path twice")


# --- one function per record, both directions ---


def _side_json(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "repo": side.repo,
        "revision": side.revision,
        "commit": side.commit,
        "licence": side.licence,
        "gated": side.gated,
    }


def _side(reader: fields.Fields) -> Side:
    return Side(
        name=reader.get("name", fields.string),
        repo=reader.get("repo", fields.optional(fields.string)),
        revision=reader.get("revision", fields.optional(fields.string)),
        commit=reader.get(
            "commit", fields.optional(fields.matching(_COMMIT, "a commit of 40 hex digits"))
        ),
        licence=reader.get("licence", fields.optional(fields.string)),
        gated=reader.get("gated", fields.boolean),
    )


def _base(reader: fields.Fields) -> Side:
    return replace(
        _side(reader),
        files=tuple(_file(item) for item in reader.children("files")),
        side_files=tuple(_file(item) for item in reader.children("side_files")),
    )


def _file(reader: fields.Fields) -> FileRecord:
    return FileRecord(
        reader.get("path", fields.path),
        reader.get("size", fields.natural),
        reader.get("sha256", fields.digest),
    )


def _tuned_file_json(file: TunedFile) -> dict[str, Any]:
    document = asdict(file)
    document["header"] = (
        file.header
        and base64.b64encode(zstandard.ZstdCompressor(level=9).compress(file.header)).decode()
    )
    return {key: value for key, value in document.items() if value is not None}


def _tuned_file(reader: fields.Fields) -> TunedFile:
    source = reader.get("source", fields.one_of(*_REBUILT, "delta", "base"))
    record = _file(reader)
    header = reader.get("header", _header) if source in _REBUILT else None
    return TunedFile(record.path, record.size, record.sha256, source, header)


def _tensor_json(record: TensorRecord) -> dict[str, Any]:
    document = asdict(record)
    if record.tuned_name == record.name:
        del document["tuned_name"]
    for part in document["parts"]:
        if part["low_rank"] is None:
            del part["low_rank"]
    return document


def _tensor(reader: fields.Fields, of_adapter: bool) -> TensorRecord:
    name = reader.get("name", fields.string)
    dtype = reader.get("dtype", fields.one_of(*DTYPE_BITS))
    shape = tuple(reader.get("shape", fields.naturals))
    base_dtype = reader.get("base_dtype", fields.optional(fields.one_of(*DTYPE_BITS)))
    try:
        tensor_bytes(dtype, shape)
    except ValueError as error:
        raise reader.bad("shape", str(error)) from error
    parts = tuple(_part(item) for item in reader.children("parts"))
    _check_parts(parts, dtype, base_dtype, reader)
    _check_low_rank(parts, shape, reader)
    return TensorRecord(
        name=name,
        shape=shape,
        dtype=dtype,
        base_dtype=base_dtype,
        tuned=reader.get("tuned", fields.optional(fields.digest) if of_adapter else fields.digest),
        base=reader.get("base", fields.digest if base_dtype else fields.nothing),
        probe=reader.get("probe", fields.digest if base_dtype else fields.nothing),
        parts=parts,
        changed=reader.get("changed", fields.natural),
        delta_norm=reader.get("delta_norm", fields.number),
        base_norm=reader.get("base_norm", fields.number),
        tuned_name=reader.get("tuned_name", fields.string) if "tuned_name" in reader else name,
    )


def _check_parts(
    parts: tuple[Part, ...], dtype: str, base_dtype: str | None, reader: fields.Fields
) -> None:
    """What the arithmetic takes for granted about the parts of one tensor."""
    if len({part.group for part in parts}) != len(parts):
        raise reader.bad("parts", "holds two of one group")
    if base_dtype is None and [(p.group, p.layers) for p in parts] != [("delta", ("raw",))]:
        raise reader.bad("parts", "must be the raw tensor alone: it has no base")
    floats = {part.dtype for part in parts if {"hi", "lo"} & set(part.layers)}
    if len(floats) > 1:
        raise reader.bad("parts", f"gives Δ two dtypes, {' and '.join(sorted(floats))}")
    for part in parts:
        if part.layers in (("raw",), ("ulp",)) and part.dtype != dtype:
            raise reader.bad("parts", f"holds {part.dtype} bits of a {dtype} tensor")
        if part.layers == ("raw",):
            if base_dtype is not None and part.group != "exact":
                raise reader.bad("parts", "holds the raw tensor instead of a difference")
        elif not {dtype, base_dtype, part.dtype} <= set(_FLOATS):
            raise reader.bad("parts", f"holds a difference of {dtype} and {base_dtype} tensors")
    plain = [part.layers for part in parts if part.encoding == "plain"]
    for part in parts:
        if "lo" in part.layers and (
            part.dtype not in ("BF16", "F16") or part.encoding in ("plain", LOW_RANK)
        ):
            raise reader.bad("parts", f"holds a tail as {part.encoding} of {part.dtype}")
        if part.layers == ("lo",) and ("hi",) not in plain:
            raise reader.bad("parts", "holds a tail without the dense Δ that it belongs to")


def _check_low_rank(parts: tuple[Part, ...], shape: tuple[int, ...], reader: fields.Fields) -> None:
    """The factors must have the very size that shape and rank give: nothing is read before."""
    for part in parts:
        if part.low_rank is None:
            continue
        if (part.group, part.layers, part.dtype) != ("delta", ("hi",), "F32"):
            raise reader.bad("parts", "holds a low-rank Δ that is no hi of dtype F32")
        if len(shape) < 2:
            raise reader.bad("parts", f"holds a low-rank Δ of a tensor of {len(shape)} dimensions")
        expected = part.low_rank.product(shape).nbytes
        if part.bytes != expected:
            raise reader.bad(
                "parts",
                f"holds {part.bytes:,} bytes of factors; shape {list(shape)} and rank "
                f"{part.low_rank.rank:,} make {expected:,}",
            )


def _adapter_tensor(reader: fields.Fields) -> AdapterTensor:
    return AdapterTensor(
        name=reader.get("name", fields.string),
        tensor=reader.get("tensor", fields.string),
        role=reader.get("role", fields.one_of("left", "right", "whole", "base")),
        transposed=reader.get("transposed", fields.boolean),
    )


def _lossy(reader: fields.Fields) -> Lossy:
    return Lossy(
        rank=reader.get("rank", fields.optional(fields.positive)),
        energy=reader.get("energy", fields.optional(fields.number)),
        error=reader.get("error", fields.number),
    )


def _truncation(lossy: Lossy) -> str:
    asked = f"rank {lossy.rank}" if lossy.rank is not None else f"energy {lossy.energy}"
    return f"{asked}, error {100 * lossy.error:.3g} %"


def _low_rank(reader: fields.Fields) -> LowRank:
    return LowRank(
        rank=reader.get("rank", fields.positive),
        alpha=reader.get("alpha", fields.optional(fields.finite)),
        scale=reader.get("scale", fields.finite),
        dtype=reader.get("dtype", fields.one_of(*_FLOATS)),
        error=reader.get("error", fields.number),
        energy=reader.get("energy", fields.optional(fields.number)),
    )


def _part(reader: fields.Fields) -> Part:
    group = reader.get("group", fields.one_of(*GROUPS))
    layers = tuple(reader.get("layers", fields.strings))
    if layers not in LAYERS[group]:
        known = [list(layers) for layers in LAYERS[group]]
        raise reader.bad("layers", f"is {list(layers)!r}; known are {known}")
    encoding = reader.get("encoding", fields.string)
    factors = reader.child("low_rank") if encoding == LOW_RANK else None
    return Part(
        group=group,
        layers=layers,
        encoding=encoding,
        dtype=reader.get("dtype", fields.one_of(*DTYPE_BITS)),
        bytes=reader.get("bytes", fields.natural),
        blake3=reader.get("blake3", fields.digest),
        low_rank=_low_rank(factors) if factors else None,
    )


def _frame(value: Any) -> bytes:
    try:
        frame = base64.b64decode(fields.string(value), validate=True)
        zstandard.frame_content_size(frame)
    except (binascii.Error, zstandard.ZstdError) as error:
        raise fields.WrongField(f"base64 of a zstd frame ({error})") from error
    return frame


def _header(value: Any) -> bytes:
    """A safetensors header, base64 of a zstd frame; its size is checked before it is unpacked."""
    frame = _frame(value)
    size = zstandard.frame_content_size(frame)
    if not 0 <= size <= MAX_HEADER_BYTES + 8:
        raise fields.WrongField(f"a header of at most {MAX_HEADER_BYTES:,} bytes")
    try:
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size)
    except zstandard.ZstdError as error:
        raise fields.WrongField(f"a zstd frame ({error})") from error
