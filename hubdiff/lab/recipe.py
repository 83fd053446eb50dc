"""A recipe: everything that training depends on but the model and the data.

The default is that of Lin et al. 2025, section 3.1 (``paper``). What they don't say (weight decay
apart from embeddings, clipping, AdamW's betas) is what transformers does by default.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from hubdiff.errors import HubdiffError

PAPER = "paper"
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Lora:
    """An adapter instead of all weights. ``targets``: names of modules, with commas between, or
    ``all-linear``."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all-linear"


@dataclass(frozen=True)
class Recipe:
    """``batch`` are the examples of one step over all devices, ``micro_batch`` those that a device
    has in memory at a time. ``length`` is in tokens; what is longer is cut, with ``packing`` short
    ones share a row. ``warmup`` is a share of the ``steps``. ``weight_decay`` spares embeddings,
    norms and biases. ``dropout`` is that of the model, wherever it has any."""

    steps: int = 30_000
    batch: int = 8
    micro_batch: int = 1
    length: int = 2048
    learning_rate: float = 5e-6
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    dropout: float = 0.0
    max_grad_norm: float = 1.0
    packing: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 500
    log_every: int = 10
    lora: Lora | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_recipe(source: str | Path = PAPER, settings: Sequence[str] = ()) -> Recipe:
    """The recipe called ``paper``, or that of a YAML file, with ``key=value`` settings on top.
    Raises ``HubdiffError`` for what is no recipe."""
    import yaml

    recipe = Recipe()
    if str(source) != PAPER:
        path = Path(source)
        if not path.is_file():
            raise HubdiffError(
                f"there is no recipe {source}",
                next_step=f"Give --recipe {PAPER}, or a YAML file.",
            )
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise _wrong(str(path), f"is not YAML ({error})") from error
        recipe = _with(recipe, {} if document is None else document, str(path))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise _wrong(setting, "is no setting")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise _wrong(setting, f"is not YAML ({error})") from error
        for name in reversed(key.split(".")):
            value = {name: value}
        recipe = _with(recipe, value, setting)
    return _checked(recipe)


def _with(recipe: Any, document: Any, where: str) -> Any:
    """A recipe, or a part of it, with what a document says."""
    if not isinstance(document, Mapping):
        raise _wrong(where, "is no mapping of names to values")
    hints = get_type_hints(type(recipe))
    known = {field.name for field in fields(recipe)}
    for name, value in document.items():
        if name not in known:
            raise _wrong(where, f"has {name!r}; known are {', '.join(sorted(known))}")
        if name == "lora" and isinstance(value, Mapping):
            value = _with(recipe.lora or Lora(), value, where)
        else:
            value = _typed(value, hints[name], f"{where}: {name}")
        recipe = replace(recipe, **{name: value})
    return recipe


def _typed(value: Any, hint: Any, where: str) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and not isinstance(value, bool):
        # YAML reads 5e-6 as text: it wants 5.0e-6.
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    for kind in kinds:
        if type(value) is kind:
            return value
    raise _wrong(where, f"is {value!r}, not {' or '.join(kind.__name__ for kind in kinds)}")


def _checked(recipe: Recipe) -> Recipe:
    whole = ("steps", "batch", "micro_batch", "length", "save_every", "log_every")
    wrong = [name for name in whole if getattr(recipe, name) < 1]
    wrong += [name for name in ("warmup", "dropout") if not 0 <= getattr(recipe, name) < 1]
    wrong += [
        name for name in ("learning_rate", "max_grad_norm") if not 0 < getattr(recipe, name) < 1e6
    ]
    if not 0 <= recipe.weight_decay < 1e6:
        wrong.append("weight_decay")
    if not 0 <= recipe.seed < 1 << 32:
        wrong.append("seed")
    if recipe.schedule not in SCHEDULES:
        raise _wrong("schedule", f"is {recipe.schedule!r}, not one of {', '.join(SCHEDULES)}")
    lora = recipe.lora
    if lora is not None and (lora.rank < 1 or lora.alpha < 1 or not 0 <= lora.dropout < 1):
        wrong.append("lora")
    if wrong:
        raise _wrong(wrong[0], f"is {getattr(recipe, wrong[0])!r}, which makes no sense")
    return recipe


def _wrong(where: str, what: str) -> HubdiffError:
    return HubdiffError(
        f"the recipe: {where} {what}",
        next_step="Write key=value, such as --set steps=500 or --set lora.rank=16, or a YAML file "
        "of such keys.",
    )
