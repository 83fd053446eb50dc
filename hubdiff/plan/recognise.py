"""Is the target the delta's own base? Decided by content, never by name.

First by its pin, a commit that the Hub gives to one content only; then by the sha256 that the Hub
lists for the base's weight files. Where nothing is listed, or the weights were saved anew, by the
first bytes of the tensors: one that differs settles it. When all agree the rebuild goes ahead and
every tensor's whole fingerprint is checked as it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from hubdiff.checkpoint import Checkpoint
from hubdiff.delta import Delta
from hubdiff.hashing import hash_bytes, tensor_hash
from hubdiff.manifest import PROBE_BYTES, Side, TensorRecord
from hubdiff.refs import PinnedRef
from hubdiff.rows import cut_checkpoint, rest_hash

# A tensor costs one request on the Hub; sixteen spread over the model tell any two models apart.
REMOTE_PROBES = 16


@dataclass(frozen=True)
class Verdict:
    """``reason`` says, for people, how it was decided; ``proved`` that no tensor needs a look."""

    own_base: bool
    proved: bool
    reason: str


def recognise(delta: Delta, target: Checkpoint) -> Verdict:
    """Compare target and base. Reads a few KB at the most."""
    whole = target
    for name, cut in delta.manifest.rows.items():
        placed = target.tensors.get(name)
        if cut.base is not None and placed and placed.entry.shape[:1] != (cut.base,):
            return Verdict(False, True, f"{name} has another number of rows")
    target = cut_at_rows(delta, target)
    missing = _missing_side_file(delta, target)
    if missing:
        return Verdict(False, True, missing)
    records = [record for record in delta.manifest.tensors if not record.added]
    known = {record.name for record in records} | set(delta.manifest.removed)
    foreign = next((name for name in target.tensors if name not in known), None)
    if foreign is not None:  # a rebuild would drop it without a word
        return Verdict(False, True, f"it has a tensor {foreign}, which the base has not")
    for record in records:
        placed = target.tensors.get(record.name)
        if placed is None:
            return Verdict(False, True, f"it has no tensor {record.name}")
        if (placed.entry.dtype, placed.entry.shape) != (record.base_dtype, record.shape):
            return Verdict(False, True, f"{record.name} has another dtype or shape")
    if same_pin(delta.manifest.base, target.tree.pin):
        return Verdict(True, True, "it is the very commit that the delta was made from")
    if _same_files(delta, target):
        return Verdict(True, True, "its weight files have the base's sha256")
    for record in _probes(records, target):
        if not _probe_matches(record, target):
            return Verdict(False, True, f"{record.name} differs from the base's")
    for name, cut in delta.manifest.rows.items():
        if cut.rest is not None and rest_hash(whole, name, cut.shared) != cut.rest:
            return Verdict(False, True, f"{name} has other rows behind those that were compared")
    return Verdict(True, False, "its tensors have the base's fingerprints")


def cut_at_rows(delta: Delta, base: Checkpoint) -> Checkpoint:
    """The delta's base as its records have it: with the rows of each tensor that were compared."""
    rows = delta.manifest.rows
    shared = {name: cut.shared for name, cut in rows.items() if cut.base is not None}
    return cut_checkpoint(base, shared, rest=False)


def same_pin(base: Side, pin: PinnedRef) -> bool:
    """Whether ``pin`` is the commit that a manifest names."""
    return base.repo is not None and (base.repo, base.commit) == (pin.repo, pin.commit)


def _missing_side_file(delta: Delta, target: Checkpoint) -> str | None:
    """Why a file that the rebuild would take from the base can't come from the target."""
    listed = target.tree.files()
    for file in delta.manifest.tuned_files:
        if file.source != "base":
            continue
        info = listed.get(file.path)
        if info is None:
            return f"it lacks {file.path}, which the own base has"
        # A small file has no listed sha256, and one of equal size may still be another.
        same = info.size == file.size and file.sha256 == (
            info.sha256 or hash_bytes(target.tree.read_bytes(file.path))
        )
        if not same:
            return f"its {file.path} is not the own base's"
    return None


def _same_files(delta: Delta, target: Checkpoint) -> bool:
    listed = {target.tree.files()[file].sha256 for file in target.shards}
    files = delta.manifest.base.files
    return bool(files) and all(file.sha256 in listed for file in files)


def _probes(records: list[TensorRecord], target: Checkpoint) -> list[TensorRecord]:
    if not any(target.tree.is_remote(file) for file in target.shards):
        return records
    step = max(1, len(records) // REMOTE_PROBES)
    return records[::step]


def _probe_matches(record: TensorRecord, target: Checkpoint) -> bool:
    placed = target.tensors[record.name]
    start = bytearray(min(PROBE_BYTES, placed.entry.nbytes))
    if start:
        target.reader(placed.file).read_into(placed.entry.begin, memoryview(start))
    digest = tensor_hash()
    digest.update(start)
    return digest.hexdigest() == record.probe
