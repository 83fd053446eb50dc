"""The manifest as JSON, in both directions: one function per record and direction."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import zstandard

from hubdiff import fields
from hubdiff import sample as sampling
from hubdiff.checkpoint import MANIFEST
from hubdiff.errors import NewerFormat, NotADelta
from hubdiff.files import FileTree
from hubdiff.manifest.checks import check_cut, check_low_rank, check_names, check_parts
from hubdiff.manifest.records import (
    FLOATS,
    GROUPS,
    LOW_RANK,
    REBUILT,
    AdapterTensor,
    FileRecord,
    Lossy,
    LowRank,
    Manifest,
    NotCarried,
    Part,
    Side,
    TensorRecord,
    TunedFile,
    sampled_counts,
)
from hubdiff.names import Rename
from hubdiff.rows import Cut, rest_name
from hubdiff.safetensors_io import DTYPE_BITS, MAX_HEADER_BYTES, tensor_bytes

FORMAT_VERSION = 1
# What a part of each group may hold, layer by layer.
LAYERS = {
    "delta": (("hi", "lo"), ("hi",), ("raw",)),
    "tail": (("lo",),),
    "exact": (("raw",), ("ulp",)),
}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def manifest_json(manifest: Manifest) -> str:
    """The text of the file."""
    document = {
        "format_version": FORMAT_VERSION,
        "hubdiff_version": manifest.hubdiff_version,
        "base": {
            **side_json(manifest.base),
            "files": [asdict(f) for f in manifest.base.files],
            "side_files": [asdict(f) for f in manifest.base.side_files],
        },
        "tuned": {
            **side_json(manifest.tuned),
            "files": [_tuned_file_json(f) for f in manifest.tuned_files],
            "not_carried": [asdict(f) for f in manifest.not_carried],
        },
        "master": manifest.master and side_json(manifest.master),
        "portable": manifest.not_portable_reason is None,
        "not_portable_reason": manifest.not_portable_reason,
        "filters": manifest.filters,
        "rename": manifest.rename
        and {"tuned_prefix": manifest.rename.left, "base_prefix": manifest.rename.right},
        "policy": manifest.policy,
        "removed": manifest.removed,
        "aliases": manifest.aliases,
        "layers": {group: [asdict(f) for f in files] for group, files in manifest.layers.items()},
        "side_files": [asdict(f) for f in manifest.side_files],
        "provenance": manifest.provenance,
        "tensors": [_tensor_json(record) for record in manifest.tensors],
    }
    if manifest.started_from is not None:
        document["started_from"] = side_json(manifest.started_from)
    if manifest.adapter is not None:
        document["adapter"] = {"tensors": [asdict(tensor) for tensor in manifest.adapter]}
    if manifest.lossy is not None:
        document["lossy"] = asdict(manifest.lossy)
    if manifest.sample is not None:
        document["sample"] = sampling.to_json(manifest.sample)
    if manifest.same_tokens:
        document["same_tokens"] = True
    if manifest.rows:
        document["rows"] = {name: asdict(cut) for name, cut in manifest.rows.items()}
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
    check_names(manifest, root)
    check_cut(manifest, root)
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


def side_json(side: Side) -> dict[str, Any]:
    """One model by its name and pin, without its files."""
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
    source = reader.get("source", fields.one_of(*REBUILT, "delta", "base"))
    record = _file(reader)
    header = reader.get("header", _header) if source in REBUILT else None
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
    check_parts(parts, dtype, base_dtype, reader)
    check_low_rank(parts, shape, reader)
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


def _low_rank(reader: fields.Fields) -> LowRank:
    return LowRank(
        rank=reader.get("rank", fields.positive),
        alpha=reader.get("alpha", fields.optional(fields.finite)),
        scale=reader.get("scale", fields.finite),
        dtype=reader.get("dtype", fields.one_of(*FLOATS)),
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


def _check_header_sizes(tuned: fields.Fields) -> None:
    """Headers of all shards together are no larger than one header may be: each alone could be, and
    a small manifest would unpack to gigabytes."""
    headers = [i.get("header", _frame) for i in tuned.children("files") if "header" in i]
    if sum(map(zstandard.frame_content_size, headers)) > MAX_HEADER_BYTES:
        raise tuned.bad("files", f"has headers of more than {MAX_HEADER_BYTES:,} bytes in all")


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
