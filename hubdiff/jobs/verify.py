"""verify: every hash of a delta; with its base and its tuned model, every bit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubdiff.checkpoint import Checkpoint, open_checkpoint
from hubdiff.delta import Delta, open_delta_tree
from hubdiff.errors import IntegrityError, WrongBase
from hubdiff.files import FileTree, open_tree
from hubdiff.hashing import check_hash, hash_reader
from hubdiff.jobs.chain import Link, check_chain
from hubdiff.manifest import GROUPS, FileRecord, TensorRecord
from hubdiff.plan import OWN_BASE, Weighted, make_plan
from hubdiff.plan.recognise import cut_at_rows
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.safetensors_io import TensorEntry, tensor_bytes
from hubdiff.signing import Trust, check_signature
from hubdiff.stream import Block, run_ordered, spans_of, workers_for


@dataclass(frozen=True)
class Verified:
    """What was checked; anything wrong is raised instead. ``files`` of the delta by sha256,
    ``tensors`` decoded and by blake3; ``base_tensors`` of the base by blake3; ``rebuilt`` files of
    the tuned repo made again from base and delta, byte for byte; ``tuned_files`` found to be those
    the delta was made from; ``sampled`` values of the base's sample; ``chain`` every link that was
    followed; ``signed_by`` whom. None: not asked, or not possible (``why``)."""

    files: int
    tensors: int
    base_tensors: int | None = None
    rebuilt: int | None = None
    tuned_files: int | None = None
    sampled: int | None = None
    why: str | None = None
    chain: tuple[Link, ...] | None = None
    signed_by: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    delta: str | Path,
    *,
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    chain: bool = False,
    signature: Trust | None = None,
    cache: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Check a delta. Raises ``IntegrityError``, ``CorruptPayload``, ``WrongBase`` or another
    ``HubdiffError`` at the first thing that is wrong.

    Args:
        delta: a ref or a folder; its files' sha256, every payload's blake3, and that all decodes.
        base: also rebuild every file of the tuned repo, in memory, and compare the sha256.
        tuned: also compare the files of this model with those the delta was made from. With
            ``base`` that proves the rebuild equal to it in every bit.
        chain: also follow the pins: where the base is a result of hubdiff, its deltas and its
            target, and theirs, each compared with what was recorded.
        signature: also check who signed the delta (``hubdiff.signing.Trust``); goes first.
    """
    progress = progress or Silent()
    with ExitStack() as stack:
        opened = stack.enter_context(open_delta_tree(open_tree(ModelRef.parse(delta), cache=cache)))
        if signature is not None:
            check_signature(opened.tree, signature)
        files = _check_files(opened, progress)
        tensors = _check_payloads(opened, progress)
        base_tensors = rebuilt = tuned_files = why = sampled = links = None
        if tuned is not None:
            tuned_files = _check_tuned(opened, open_tree(ModelRef.parse(tuned), cache=cache))
        if base is not None:
            tree = open_tree(ModelRef.parse(base), cache=cache)
            target = stack.enter_context(open_checkpoint(tree))
            if opened.manifest.no_rebuild_reason:
                why = f"{opened.manifest.no_rebuild_reason}, so nothing can be rebuilt"
                base_tensors = _check_base(opened, target)
            else:
                base_tensors, rebuilt = _rebuild(opened, target, progress)
            sampled = _check_sample(opened, target)
        if chain:
            links = tuple(check_chain(opened, progress))
    by = str(signature) if signature else None
    return Verified(files, tensors, base_tensors, rebuilt, tuned_files, sampled, why, links, by)


def _check_files(delta: Delta, progress: Progress) -> int:
    """sha256 of every layer file and side file the manifest lists."""
    listed = [file for files in delta.manifest.layers.values() for file in files]
    listed += delta.manifest.side_files
    progress.start("hashing the delta's files", sum(file.size for file in listed))
    for file in listed:
        _check_file(delta.tree, file.path, file)
        progress.advance(file.size)
    progress.finish()
    return len(listed)


def _check_file(tree: FileTree, path: str, expected: FileRecord) -> None:
    where = f"{tree.pin}/{path}"
    if path not in tree.files():
        raise IntegrityError(f"{where} is missing", next_step="Fetch it again.")
    with tree.open(path) as reader:
        check_hash(hash_reader(reader), expected.sha256, where)


def _check_payloads(delta: Delta, progress: Progress) -> int:
    """Decode every segment of every part; blake3 of every payload."""
    from hubdiff.payloads import Arrays, PayloadHashes, SpanBytes, decode_segments

    where = str(delta.tree.pin)
    changed = [record for record in delta.manifest.tensors if record.parts]
    hashes = PayloadHashes(where)
    remote = any(map(delta.tree.is_remote, (f.path for f in delta.manifest.layers["delta"])))

    def decode(block: Block) -> list[SpanBytes]:
        (span,) = block.spans
        payloads = delta.read([(span, delta.records[span.entry.name], GROUPS)])[span]
        for _ in decode_segments(span, payloads, where, Arrays()):
            pass
        return payloads

    def take(block: Block, payloads: list[SpanBytes]) -> None:
        hashes.take(block.spans[0], payloads)
        progress.advance(sum(len(payload.view) for payload in payloads))

    progress.start("decoding", sum(part.bytes for record in changed for part in record.parts))
    jobs = (Block("", (span,)) for record in changed for span in spans_of(_entry(record)))
    run_ordered(jobs, decode, take, workers_for(remote=remote))
    progress.finish()
    return len(changed)


def _entry(record: TensorRecord) -> TensorEntry:
    nbytes = tensor_bytes(record.dtype, record.shape)
    return TensorEntry(record.name, record.dtype, record.shape, 0, nbytes)


def _check_tuned(delta: Delta, tree: FileTree) -> int:
    for file in delta.manifest.tuned_files:
        _check_file(tree, file.path, file)
    return len(delta.manifest.tuned_files)


def _check_base(delta: Delta, base: Checkpoint) -> int:
    """The fingerprint of every tensor of the base that the delta knows."""
    from hubdiff.hashing import tensor_hash
    from hubdiff.stream import read_ranges, span_range

    base = cut_at_rows(delta, base)
    records = [record for record in delta.manifest.tensors if not record.added]
    for record in records:
        placed = base.tensors.get(record.name)
        digest = tensor_hash()
        if placed is not None:
            for span in spans_of(placed.entry):
                place = span_range(span, placed)
                digest.update(read_ranges(base, [place])[place])
        if placed is None or digest.hexdigest() != record.base:
            raise WrongBase(
                f"{record.name} of {base.tree.pin} is not that of the delta's base "
                f"{delta.manifest.base.name}",
                next_step="Give the very base that the delta was made from.",
            )
    return len(records)


def _check_sample(delta: Delta, base: Checkpoint) -> int | None:
    """The base's values in the sample."""
    from hubdiff.forecast import Look, require_base

    base = cut_at_rows(delta, base)
    at = Look.of(delta, base, {name: name for name in delta.records if name in base.tensors})
    return None if at is None else require_base(at)


def _rebuild(delta: Delta, base: Checkpoint, progress: Progress) -> tuple[int, int]:
    from hubdiff import merge
    from hubdiff.writer import Nowhere

    plan = make_plan([Weighted(delta)], base)
    if plan.case != OWN_BASE:
        raise WrongBase(
            f"{base.tree.pin} is not the base {delta.manifest.base.name} of {delta.tree.pin}: "
            + plan.reason.partition(": ")[2],
            next_step="Give the very base that the delta was made from.",
        )
    files = merge.run(plan, Nowhere(), "cpu", progress)
    return sum(not record.added for record in delta.manifest.tensors), len(files)
