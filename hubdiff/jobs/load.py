"""load: a model already merged, in memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.configs import quantised
from hubdiff.errors import CheckpointError, HubdiffError
from hubdiff.files import FileTree
from hubdiff.jobs.apply import apply
from hubdiff.jobs.merging import (
    DeltaRef,
    choose_device,
    method_of,
    opened_models,
    run_plan,
    vocab_mode,
)
from hubdiff.pair import Filters
from hubdiff.plan import OWN_BASE, MergePlan, make_plan
from hubdiff.progress import Silent
from hubdiff.safetensors_io import Header, parse_header
from hubdiff.scales import Scales
from hubdiff.sidecars import Carried, classify
from hubdiff.writer import Memory, disk_errors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LARGEST = 64 << 20
_CONFIG, _GENERATION = "config.json", "generation_config.json"
# What makes from_pretrained want a folder with the weights in it.
_NEEDS_FOLDER = frozenset(
    {
        "device_mesh",
        "distributed_config",
        "gguf_file",
        "max_memory",
        "offload_folder",
        "quantization_config",
        "state_dict",
        "subfolder",
        "tp_plan",
        "tp_size",
        "variant",
    }
)


def load(
    delta: str | Path | Sequence[DeltaRef],
    target: str | Path,
    *,
    scale: float | Mapping[str, float] = 1.0,
    method: str = "linear",
    density: float | None = None,
    seed: int | None = None,
    vocab: str | None = None,
    device: str = "auto",
    cache: bool = False,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """``target`` with ``delta`` on it, as the transformers model its config names.

    Args:
        delta, target, scale, method, density, seed, vocab, cache: as ``hubdiff.apply``.
        device: where the merge is computed. ``auto``: where the model ends up.
        from_pretrained_kwargs: handed to ``from_pretrained`` (``dtype``, ``device_map``, …).
            ``device_map`` needs accelerate: ``pip install accelerate``.

    The weights are merged straight into the memory of the device that ``device_map`` names (the CPU
    where it names none), and no file of them is written. What was read is checked as ``apply``
    checks it. A rebuild on the own base has its files' sha256 compared as well, unless it is
    computed on the GPU where it stays.

    Weights spread over several devices or the disk (``device_map="auto"`` and its kin, a dict of
    several), quantised ones and other arguments that want a folder pass through a temporary one of
    the model's size instead (set ``TMPDIR`` to choose the disk). It is gone when this returns, or
    with the model where ``device_map`` left weights on the disk.

    Code that comes with a model is never run. Raises ``HubdiffError``; what ``from_pretrained``
    raises over its own arguments comes through as it is.
    """
    _check_arguments(from_pretrained_kwargs)
    scales, merging = Scales.of(scale), method_of(method, density, seed)
    home = _one_device(from_pretrained_kwargs)
    if home is not None:
        with opened_models(delta, target, cache) as (opened, onto):
            plan = make_plan(opened, onto, scale=scales, method=merging, vocab=vocab_mode(vocab))
            if not quantised(onto.config):
                engine = str(home) if device == "auto" else choose_device(device)
                loader = _Loader(home, engine, from_pretrained_kwargs)
                return run_plan(plan, Filters(), vocab, loader.run)
    merge = {"scale": scale, "method": method, "density": density, "seed": seed, "vocab": vocab}
    return _load_by_folder(
        delta, target, {**merge, "device": device, "cache": cache}, from_pretrained_kwargs
    )


def model_side_files(tree: FileTree, folder: Path, weights: Collection[str] = ()) -> None:
    """Config and tokenizer of a model, into ``folder``, for those who want a folder."""
    for path, info in tree.files().items():
        plain = "/" not in path and path not in weights and info.size <= _LARGEST
        if plain and isinstance(classify(path, info.size, weights), Carried):
            data = tree.read_bytes(path)
            with disk_errors(folder / path):
                (folder / path).write_bytes(data)


def result_side_files(
    delta: str | Path | Sequence[DeltaRef],
    target: str | Path,
    folder: Path,
    *,
    scale: float | Mapping[str, float] = 1.0,
) -> None:
    """What a result has beside its weights (config, tokenizer), into ``folder``. No weight is
    merged for it."""
    with opened_models(delta, target, False) as (opened, onto):
        plan = make_plan(opened, onto, scale=Scales.of(scale))
        headers = _headers(plan)
        plan = replace(plan, weights=(), files=_without(plan.files, headers))
        import torch

        from hubdiff import merge

        merge.run(plan, Memory(folder, headers, torch.device("cpu")), "cpu", Silent())


def _one_device(wanted: dict[str, Any]) -> torch.device | None:
    """The device that all of the model is to be on, or None: then it takes a folder."""
    if _NEEDS_FOLDER & {name for name, value in wanted.items() if value is not None}:
        return None
    import torch

    place = wanted.get("device_map")
    if isinstance(place, dict):
        if set(place) != {""}:
            return None
        place = place[""]
    if place is None:
        return torch.device("cpu")
    if place == "cuda":  # as transformers reads it: of several processes each has its own
        place = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    if place == "disk":
        return None
    try:
        home = torch.device(place)
    except (RuntimeError, TypeError):
        return None  # "auto" and its kin; of a name that is wrong transformers says so
    if home.type not in ("cpu", "cuda", "mps"):
        return None
    return torch.device(choose_device(str(home)))


class _Loader:
    """Runs a plan into the memory of ``home`` and makes a model of it."""

    def __init__(self, home: torch.device, engine: str, wanted: dict[str, Any]) -> None:
        self._home, self._engine, self._wanted = home, engine, wanted

    def run(self, plan: MergePlan) -> PreTrainedModel:
        from hubdiff import merge

        with tempfile.TemporaryDirectory(prefix="hubdiff-") as small:
            folder = Path(small)
            headers = _headers(plan)
            read = {*headers, _CONFIG, _GENERATION}
            files = tuple(file for file in plan.files if file.path in read)
            memory = Memory(folder, headers, self._home)
            small_first = replace(plan, weights=(), files=_without(files, headers))
            merge.run(small_first, memory, self._engine, Silent())
            found_class = model_class(folder)  # refused before the weights are read
            weights = replace(plan, files=tuple(f for f in files if f.path in headers))
            merge.run(weights, memory, self._engine, Silent())
            return self._model(found_class, folder, memory.tensors)

    def _model(
        self, model_class: Any, folder: Path, tensors: dict[str, torch.Tensor]
    ) -> PreTrainedModel:
        wanted = {**self._wanted, "trust_remote_code": False}
        if wanted.get("config") is None:
            wanted["config"] = folder
        if wanted.get("generation_config") is None and model_class.can_generate():
            wanted["generation_config"] = _generation_config(folder)
        with _no_reserve():
            model: PreTrainedModel = model_class.from_pretrained(None, state_dict=tensors, **wanted)
        return model


def _without(files: tuple[Any, ...], headers: dict[str, Header]) -> tuple[Any, ...]:
    return tuple(file for file in files if file.path not in headers)


def _headers(plan: MergePlan) -> dict[str, Header]:
    """The weights files of the result, also those that are taken whole."""
    if plan.case == OWN_BASE:
        return {
            file.path: parse_header(file.header or b"", file.size, file.path)
            for file in plan.deltas[0].delta.manifest.tuned_files
            if file.source == "weights"
        }
    made = {file.path: file.header for file in plan.weights}
    whole = {
        path: parse_header(header.raw, header.file_size, path) for path, header in made.items()
    }
    return {**plan.target.shards, **whole}


def _generation_config(folder: Path) -> Any:
    """As ``from_pretrained`` finds it in a folder."""
    from transformers import GenerationConfig

    if (folder / _GENERATION).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(
        folder, config_file_name=_CONFIG, _from_model_config=True
    )


@contextmanager
def _no_reserve() -> Iterator[None]:
    """Before it loads, transformers reserves the memory of the whole model on the device. Here the
    weights lie there already: it would be as much again."""
    from transformers import modeling_utils

    name = "caching_allocator_warmup"
    original = getattr(modeling_utils, name, None)
    if original is None:
        yield
        return
    setattr(modeling_utils, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(modeling_utils, name, original)


def _load_by_folder(
    delta: str | Path | Sequence[DeltaRef],
    target: str | Path,
    how: dict[str, Any],
    wanted: dict[str, Any],
) -> PreTrainedModel:
    """``how`` are arguments of ``apply``, ``wanted`` those of ``from_pretrained``."""
    folder = tempfile.TemporaryDirectory(prefix="hubdiff-")
    try:
        merged = Path(folder.name, "model")
        # Whether it is worth it nobody asks here either: a model in memory is for trying.
        apply(delta, target, output=merged, force=True, **how)
        model: PreTrainedModel = model_class(merged).from_pretrained(
            merged, **{**wanted, "trust_remote_code": False}
        )
    except BaseException:
        folder.cleanup()
        raise
    if "disk" in getattr(model, "hf_device_map", {}).values():
        weakref.finalize(model, folder.cleanup)  # its weights are still read from there
    else:
        folder.cleanup()
    return model


def _check_arguments(wanted: dict[str, Any]) -> None:
    """Refuse before the merge what would fail after it."""
    if wanted.get("trust_remote_code"):
        raise HubdiffError(
            "load never runs the code that comes with a model: trust_remote_code=True is refused",
            next_step="Use hubdiff apply --output DIR, and load that folder yourself once you "
            "have read its code.",
        )
    if wanted.get("device_map") is not None and find_spec("accelerate") is None:
        raise HubdiffError(
            "device_map needs accelerate, which is not installed",
            next_step="pip install accelerate, or leave device_map out and move the model.",
        )


def model_class(folder: Path) -> Any:
    """The class that ``config.json`` names, one of transformers' own; else ``CheckpointError``."""
    import transformers

    for name in _architectures(folder):
        found = getattr(transformers, name, None)
        # The name is a stranger's: transformers has functions and modules too.
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
        raise _unusable(f"names the architecture {name!r}, no model of this transformers")
    raise _unusable("names no architecture")


def _architectures(folder: Path) -> list[str]:
    from transformers import AutoConfig

    with usable_config():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise _unusable(f"has {named!r} for architectures, not a list of names")
    return named


@contextmanager
def usable(what: str, next_step: str) -> Iterator[None]:
    """Say in words what transformers raises for files that it can't use, which depends on the model
    type: ``CheckpointError``."""
    import torch

    from hubdiff.hub import BadConfigValue

    unusable = (ValueError, OSError, TypeError, AttributeError, LookupError, ImportError)
    numbers = (ArithmeticError, AssertionError, RuntimeError)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*unusable, *numbers, BadConfigValue) as error:
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{what} can't be used by this transformers: {said}", next_step=next_step
        ) from error


_CONFIG_OF_RESULT = "the config.json of the result"
_LOAD_YOURSELF = "Use hubdiff apply --output DIR and load the folder with the right class."


def usable_config() -> AbstractContextManager[None]:
    """``usable``, for the config of a result."""
    return usable(_CONFIG_OF_RESULT, _LOAD_YOURSELF)


def _unusable(what: str) -> CheckpointError:
    return CheckpointError(f"{_CONFIG_OF_RESULT} {what}", next_step=_LOAD_YOURSELF)
