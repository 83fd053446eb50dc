"""load: a model already merged, in memory."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.errors import CheckpointError, HubdiffError
from hubdiff.jobs.apply import DeltaRef, apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    delta: str | Path | Sequence[DeltaRef],
    target: str | Path,
    *,
    scale: float | Mapping[str, float] = 1.0,
    method: str = "linear",
    density: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    cache: bool = False,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """``target`` with ``delta`` on it, as the transformers model its config names.

    Args:
        delta, target, scale, method, density, seed, device, cache: as ``hubdiff.apply``; ``device``
            is where the merge is computed, not where the model ends up.
        from_pretrained_kwargs: handed to ``from_pretrained`` (``dtype``, ``device_map``, …).
            ``device_map`` needs accelerate: ``pip install accelerate``.

    The merged weights pass through a temporary folder of the model's size (set ``TMPDIR`` to choose
    the disk), which is gone when this returns, or with the model where ``device_map`` left weights
    on the disk. Code that comes with a model is never run. Raises ``HubdiffError``; what
    ``from_pretrained`` raises over its own arguments comes through as it is.
    """
    _check_arguments(from_pretrained_kwargs)
    folder = tempfile.TemporaryDirectory(prefix="hubdiff-")
    try:
        merged = Path(folder.name, "model")
        apply(
            delta,
            target,
            output=merged,
            scale=scale,
            method=method,
            density=density,
            seed=seed,
            device=device,
            cache=cache,
        )
        model: PreTrainedModel = model_class(merged).from_pretrained(
            merged, **{**from_pretrained_kwargs, "trust_remote_code": False}
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

    from hubdiff.hub import BadConfigValue

    # What transformers raises for values it can't use depends on the model type.
    unusable = (ValueError, OSError, TypeError, AttributeError, LookupError, ImportError)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*unusable, BadConfigValue) as error:
        raise _unusable(f"can't be used by this transformers: {error}") from error
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise _unusable(f"has {named!r} for architectures, not a list of names")
    return named


def _unusable(what: str) -> CheckpointError:
    return CheckpointError(
        f"the config.json of the result {what}",
        next_step="Use hubdiff apply --output DIR and load the folder with the right class.",
    )
