"""load: a model already merged, in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.errors import CheckpointError
from hubdiff.jobs.apply import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    delta: str | Path,
    target: str | Path,
    *,
    scale: float = 1.0,
    device: str = "auto",
    cache: bool = False,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """``target`` with ``delta`` on it, as the transformers model its config names.

    Args:
        delta, target, scale, device, cache: as ``hubdiff.apply``; ``device`` is where the merge is
            computed, not where the model ends up.
        from_pretrained_kwargs: handed to ``from_pretrained`` (``dtype``, ``device_map``, …).

    The merged weights pass through a temporary folder of the model's size (set ``TMPDIR`` to choose
    the disk), which is gone when this returns. Raises ``HubdiffError``.
    """
    with tempfile.TemporaryDirectory(prefix="hubdiff-") as folder:
        merged = Path(folder, "model")
        apply(delta, target, output=merged, scale=scale, device=device, cache=cache)
        return _model_class(merged).from_pretrained(merged, **from_pretrained_kwargs)


def _model_class(folder: Path) -> Any:
    """The class that ``config.json`` names; code that comes with a model is never run."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    named = (config.architectures or [None])[0]
    found = getattr(transformers, named or "", None)
    if found is None:
        raise CheckpointError(
            f"config.json names the architecture {named!r}, which this transformers does not have",
            next_step="Use hubdiff apply --output DIR and load the folder with the right class.",
        )
    return found
