"""The plan for the own base: the tuned repo again, file by file and byte for byte."""

from __future__ import annotations

from hubdiff.checkpoint import Checkpoint
from hubdiff.delta import Delta
from hubdiff.errors import BadManifest
from hubdiff.manifest import GROUPS, TensorRecord
from hubdiff.plan.carried import require_file
from hubdiff.plan.recognise import Verdict, cut_at_rows
from hubdiff.plan.types import (
    OWN_BASE,
    MergePlan,
    Step,
    Term,
    Weighted,
    WeightsFile,
    WholeFile,
)
from hubdiff.rows import cut_header
from hubdiff.safetensors_io import TensorEntry, parse_header
from hubdiff.scales import Scales
from hubdiff.sidecars import LeftOut


def own_base_plan(delta: Delta, target: Checkpoint, verdict: Verdict) -> MergePlan:
    """Every file of the tuned repo: rebuilt, or copied from delta or base."""
    base = cut_at_rows(delta, target)
    cuts = {
        delta.records[name].tuned_name: (cut.shared,) for name, cut in delta.manifest.rows.items()
    }
    by_tuned_name = {record.tuned_name: record for record in delta.manifest.tensors}
    same = {info.sha256: path for path, info in target.tree.files().items() if info.sha256}
    weights: list[WeightsFile] = []
    files: list[WholeFile] = []
    for file in delta.manifest.tuned_files:
        if file.source == "weights" and file.sha256 not in same:
            header = cut_header(parse_header(file.header or b"", file.size, file.path), cuts)
            steps = {e.name: _rebuild(delta, base, by_tuned_name, e) for e in header.tensors}
            weights.append(WeightsFile(file.path, header, steps, file.sha256))
        elif file.source == "delta":
            source = f"tuned/{file.path}"
            require_file(delta, source)
            files.append(WholeFile(file.path, file.size, "delta", source, file.sha256, delta=delta))
        else:
            source = same.get(file.sha256, file.path)
            files.append(WholeFile(file.path, file.size, "target", source, file.sha256))
    return MergePlan(
        OWN_BASE,
        f"the target is the delta's own base: {verdict.reason}",
        Scales(),
        (Weighted(delta),),
        target,
        tuple(weights),
        tuple(files),
        (),
        verdict.proved,
        tuple(LeftOut(item.path, item.reason) for item in delta.manifest.not_carried),
    )


def _rebuild(
    delta: Delta, base: Checkpoint, records: dict[str, TensorRecord], entry: TensorEntry
) -> Step:
    record = records.get(entry.name)
    if record is None or (record.dtype, record.shape) != (entry.dtype, entry.shape):
        raise BadManifest(
            f"{delta.tree.pin}/hubdiff.json: tensor {entry.name!r} stands in a header but not, or "
            "otherwise, among the tensors",
            next_step="The delta is damaged; ask its author to push it again.",
        )
    source = None if record.added else base.tensors[record.name]
    return Step(entry, source, (Term(delta, record, GROUPS),))
