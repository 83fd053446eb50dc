"""Computing a delta: Δ of every tensor, encoded and written as layer files, hashes on the way.

Both models are read once, block by block in the tuned model's file order; memory does not grow with
them. Each file of the tuned model is compared alone, by the rank in whose share it is. Nothing is
published here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from hubdiff.extract.collect import Collector
from hubdiff.extract.found import Compared, Extracted, Layers, Sampled
from hubdiff.extract.pieces import Worker, base_patterns
from hubdiff.hashing import FileHashes
from hubdiff.layers import number
from hubdiff.manifest import GROUPS, FileRecord, TensorRecord
from hubdiff.memory import fits_in_cache
from hubdiff.pair import Pair, TensorPair
from hubdiff.progress import Progress
from hubdiff.ranks import ALONE, Ranks
from hubdiff.sample import Sample
from hubdiff.stream import blocks, run_ordered, workers_for
from hubdiff.writer import disk_errors

__all__ = ["Extracted", "Sampled", "base_patterns", "extract"]


def extract(
    pair: Pair,
    folder: Path,
    *,
    plain: bool,
    sample: Sample,
    progress: Progress,
    hash_base: bool = True,
    ranks: Ranks = ALONE,
    meanwhile: Callable[[Sequence[TensorRecord]], None] | None = None,
) -> Extracted:
    """Write the layer files of ``pair`` into ``folder``, of several ranks each its share. ``plain``
    stores Δ as dense tensors. Without ``hash_base`` no more of the base is read than the pair
    needs, and no file of it is known by content. ``meanwhile`` is called with what this rank
    compared while its last layers are hashed, which leaves a core idle."""
    shards = pair.tuned.shards
    mine = ranks.share(list(shards), lambda file: shards[file].file_size)
    if any(_needs_torch(item) for item in pair.tensors.values()):
        import torch  # noqa: F401 - before the threads that use it begin
    sides = [side for side in (pair.tuned, pair.base, pair.master) if side]
    if not fits_in_cache(sum(h.file_size for side in sides for h in side.shards.values())):
        for side in sides:
            side.once = True
    progress.start("comparing tuned and base", sum(shards[file].file_size for file in mine))
    base_hashes = FileHashes(pair.base)
    worker = Worker(pair, plain, sample)
    done = _compare(pair, folder, mine, worker, base_hashes, progress, meanwhile)
    progress.finish()
    given = ranks.gather({file: asdict(one) for file, one in done.items()}, "comparing")
    everyone = {file: one for rank in given for file, one in rank.items()}
    compared = [Compared.from_json(everyone[file]) for file in shards]
    base_files = _base_files(pair, compared, base_hashes, ranks) if hash_base else ()
    return _number(folder, compared, mine, base_files)


def _compare(
    pair: Pair,
    folder: Path,
    mine: list[str],
    worker: Worker,
    base_hashes: FileHashes,
    progress: Progress,
    meanwhile: Callable[[Sequence[TensorRecord]], None] | None,
) -> dict[str, Compared]:
    """The files of the tuned model that are ``mine``. While one is compared, the layers of the one
    before are hashed and get to the disk."""
    shards = pair.tuned.shards
    remote = any(
        side.tree.is_remote(file) for side in (pair.tuned, pair.base) for file in side.shards
    )
    workers = workers_for(remote=remote)
    found: dict[str, Compared] = {}
    layers: dict[str, Future[Layers]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="hubdiff-finish") as finishing:
        for source, (file, header) in enumerate(shards.items()):
            if file not in mine:
                continue
            with ExitStack() as opened:
                collector = opened.enter_context(
                    Collector(pair, source, header, folder, worker.parts, base_hashes, progress)
                )
                progress.advance(len(header.raw))
                run_ordered(blocks(file, header), worker.work, collector.take, workers)
                found[file] = collector.compared(file)
                for earlier in layers.values():
                    earlier.result()  # an error isn't held back, and no more than one file waits
                opened.pop_all()  # `finish` closes it, and nobody may twice
                layers[file] = finishing.submit(collector.finish)
        if meanwhile is not None:
            meanwhile([record for one in found.values() for record in one.tensors])
        return {file: replace(one, layers=layers[file].result()) for file, one in found.items()}


def _number(
    folder: Path, compared: list[Compared], mine: list[str], base_files: tuple[FileRecord, ...]
) -> Extracted:
    """Give the layer files their names; those that are here get them on the disk too."""
    layers: dict[str, tuple[FileRecord, ...]] = {}
    weight_map: dict[str, str] = {}
    here = set()
    for group in GROUPS:
        files = [(one, file) for one in compared for file in one.layers[group]]
        names = number(group, [file for _, file in files])
        for name, (one, file) in zip(names, files, strict=True):
            if one.weights.path in mine:
                with disk_errors(folder / name):
                    os.rename(folder / file.record.path, folder / name)
                here.add(name)
            if group == "delta":
                weight_map.update(dict.fromkeys(file.tensors, name))
        layers[group] = tuple(
            replace(file.record, path=name) for name, (_, file) in zip(names, files, strict=True)
        )
    return Extracted(
        tuple(record for one in compared for record in one.tensors),
        layers,
        weight_map,
        tuple(one.weights for one in compared),
        base_files,
        frozenset(here),
        sum(one.compressed for one in compared),
        {name: values for one in compared for name, values in one.sampled.items()},
    )


def _base_files(
    pair: Pair, compared: list[Compared], hashes: FileHashes, ranks: Ranks
) -> tuple[FileRecord, ...]:
    """The base's shards by content. What no rank read whole and in order is read once more, by the
    rank in whose share it is then."""
    known = _united(ranks.gather(hashes.whole(), "hashing the base"))
    shards = pair.base.shards
    unread = [file for file in shards if file not in known]
    tensors = {r.name: r.base for one in compared for r in one.tensors if r.base}
    mine = ranks.share(unread, lambda file: shards[file].file_size)
    again = {file: hashes.read(file, tensors) for file in mine}
    known |= _united(ranks.gather(again, "hashing the base"))
    return tuple(hashes.record(file, known[file]) for file in shards)


def _united(given: list[dict[str, str]]) -> dict[str, str]:
    return {file: digest for rank in given for file, digest in rank.items()}


def _needs_torch(pair: TensorPair) -> bool:
    """Whether Δ of this tensor is not left to the kernels for bf16."""
    sides = {side.entry.dtype for side in (pair.tuned, pair.base, pair.master) if side}
    return pair.is_float and sides != {"BF16"}
