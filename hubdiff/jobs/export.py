"""export: a delta in the form of another tool, for now an adapter that PEFT loads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.adapter import CONFIG
from hubdiff.checkpoint import Checkpoint, open_checkpoint
from hubdiff.delta import Delta, open_delta_tree
from hubdiff.errors import CannotApply, CannotExport, CheckpointError, RefError
from hubdiff.files import open_tree
from hubdiff.hashing import check_hash, hash_bytes
from hubdiff.manifest import FileRecord
from hubdiff.plan.carried import require_file
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.writer import DELTA, Sink, open_sink, output_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hubdiff.peft_file import LeftOut

FORMATS = ("peft",)


@dataclass(frozen=True)
class Exported:
    """``same_files``: the adapter that the delta was made from, every file byte for byte.
    ``modules`` of the base have factors; ``left_out`` are tensors that changed and are not in the
    adapter, each with its share of ‖Δ‖². ``notes`` are for people."""

    where: str
    same_files: bool
    files: tuple[FileRecord, ...]
    modules: int
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    delta: str | Path,
    output: str | Path,
    *,
    format: str = "peft",
    base: str | Path | None = None,
    force: bool = False,
    cache: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write ``delta`` into the folder ``output`` as an adapter that PEFT loads.

    A delta made from an adapter gives that adapter's own files back, byte for byte. One made with
    ``rank`` or ``energy`` gives a new adapter: the factors of its matrices; what it stores exactly
    (norms, biases, matrices that are no smaller as factors) can't be in one and is listed.

    Args:
        format: ``"peft"``.
        base: the base of an adapter that has whole tensors, of which the delta has the difference
            only. Default: the repo and commit that the delta names.
        force: replace a folder that exists.
        cache: keep what is downloaded in the local Hub cache.

    Raises ``CannotExport`` for a delta without factors, and other ``HubdiffError``.
    """
    if format not in FORMATS:
        raise RefError(f"{format!r} is no format of export", next_step="Known is: peft.")
    destination, progress = output_folder(output), progress or Silent()
    with open_delta_tree(open_tree(ModelRef.parse(delta), cache=cache)) as opened:
        if opened.manifest.adapter is not None:
            with _base(opened, base, cache) as checkpoint:
                trees = [opened.tree, *([checkpoint.tree] if checkpoint else [])]
                with open_sink(destination, DELTA, reads=trees, force=force) as sink:
                    return _again(opened, checkpoint, sink, progress)
        if not any(part.low_rank for r in opened.manifest.tensors for part in r.parts):
            raise CannotExport(
                f"{opened.tree.pin} has no factors, and an adapter is made of nothing else",
                next_step="Make the delta again with --rank R or --energy E: hubdiff push-delta "
                "TUNED REPO --base BASE --rank 64.",
            )
        model = _empty_model(opened)
        with open_sink(destination, DELTA, reads=[opened.tree], force=force) as sink:
            return _lora(opened, model, sink, progress)


@contextmanager
def _base(delta: Delta, named: str | Path | None, cache: bool) -> Iterator[Checkpoint | None]:
    """The base, where the adapter's file can't be made without it."""
    from hubdiff.peft_file import needs_base

    if not needs_base(delta):
        yield None
        return
    side = delta.manifest.base
    if named is None and side.repo is None:
        raise CannotApply(
            f"{delta.tree.pin} has differences to the base {side.name}, a local folder, where the "
            "adapter has whole tensors",
            next_step="Say where that base is with --base.",
        )
    pin = f"@{side.commit}" if side.commit else ""
    ref = named if named is not None else f"hf://{side.repo}{pin}"
    with open_checkpoint(open_tree(ModelRef.parse(ref), cache=cache)) as checkpoint:
        yield checkpoint


def _again(delta: Delta, base: Checkpoint | None, sink: Sink, progress: Progress) -> Exported:
    from hubdiff.peft_file import write_again

    files = []
    for file in delta.manifest.tuned_files:
        if file.source == "adapter":
            files.append(write_again(delta, file, base, sink, progress))
            continue
        source = f"tuned/{file.path}"
        require_file(delta, source)
        data = delta.tree.read_bytes(source)
        check_hash(hash_bytes(data), file.sha256, f"{delta.tree.pin}/{source}")
        files.append(sink.put(file.path, data))
    where = sink.publish("exported").where
    modules = sum(tensor.role == "left" for tensor in delta.manifest.adapter or ())
    return Exported(where, True, tuple(files), modules)


def _lora(delta: Delta, model: PreTrainedModel, sink: Sink, progress: Progress) -> Exported:
    from hubdiff.peft_file import Lora

    lora = Lora(delta, model)
    if not lora.modules:
        raise CannotExport(
            f"none of {delta.tree.pin} can be in an adapter: "
            + "; ".join(sorted({left.reason for left in lora.left_out})),
            next_step="Use the delta itself: hubdiff apply DELTA --to BASE --output DIR.",
        )
    files = [lora.write(sink, progress)]
    text = json.dumps(lora.config(), indent=2) + "\n"
    files.append(sink.put(CONFIG, text.encode()))
    where = sink.publish("exported").where
    return Exported(
        where, False, tuple(files), len(lora.modules), tuple(lora.left_out), tuple(lora.notes)
    )


def _empty_model(delta: Delta) -> PreTrainedModel:
    """The base as transformers builds it, without weights: what its modules are decides how PEFT
    names and turns their factors."""
    import torch
    from transformers import AutoConfig

    from hubdiff.jobs.load import model_class, usable_config

    path = "base/config.json"
    try:
        require_file(delta, path)
        with tempfile.TemporaryDirectory(prefix="hubdiff-") as folder:
            Path(folder, "config.json").write_bytes(delta.tree.read_bytes(path))
            kind = model_class(Path(folder))
            with usable_config(), torch.device("meta"):
                model: PreTrainedModel = kind(
                    AutoConfig.from_pretrained(folder, trust_remote_code=False)
                )
    except CheckpointError as error:
        raise CannotExport(
            f"{delta.tree.pin}/{path}: what modules the base has can't be told ({error})",
            next_step="Export needs a base that this transformers knows; upgrade transformers if "
            "it is newer.",
        ) from error
    return model
