"""What must hold between the fields of a manifest, each of which may be right alone."""

from __future__ import annotations

import math

from hubdiff import fields
from hubdiff.manifest.records import FLOATS, LOW_RANK, REBUILT, Manifest, Part
from hubdiff.rows import rest_name, whole_name
from hubdiff.safetensors_io import first_repeated


def check_parts(
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
        elif not {dtype, base_dtype, part.dtype} <= set(FLOATS):
            raise reader.bad("parts", f"holds a difference of {dtype} and {base_dtype} tensors")
    plain = [part.layers for part in parts if part.encoding == "plain"]
    for part in parts:
        if "lo" in part.layers and (
            part.dtype not in ("BF16", "F16") or part.encoding in ("plain", LOW_RANK)
        ):
            raise reader.bad("parts", f"holds a tail as {part.encoding} of {part.dtype}")
        if part.layers == ("lo",) and ("hi",) not in plain:
            raise reader.bad("parts", "holds a tail without the dense Δ that it belongs to")


def check_low_rank(parts: tuple[Part, ...], shape: tuple[int, ...], reader: fields.Fields) -> None:
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


def check_cut(manifest: Manifest, root: fields.Fields) -> None:
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


def check_names(manifest: Manifest, root: fields.Fields) -> None:
    for kind, names in (
        ("name", [record.name for record in manifest.tensors]),
        ("tuned_name", [record.tuned_name for record in manifest.tensors]),
    ):
        twice = first_repeated(names)
        if twice is not None:
            raise root.bad("tensors", f"two tensors have the {kind} {twice!r}")
    for file in manifest.tuned_files:
        if file.source in REBUILT and "/" in file.path:
            raise root.bad("tuned.files", f"the weights file {file.path!r} is not at the root")
        # With another ending one could take the place of the result's card or config.
        if file.source in REBUILT and not file.path.endswith(".safetensors"):
            raise root.bad("tuned.files", f"the weights file {file.path!r} is no .safetensors")
    if len({file.path for file in manifest.tuned_files}) != len(manifest.tuned_files):
        raise root.bad("tuned.files", "names a path twice")
