"""A PEFT adapter given as the tuned model: LoRA factors, and which tensor of the base each belongs
to. Reads its config, headers and names; no weights.

The change that an adapter makes to a matrix is a product, ``Δ = s · B · A`` with s = α/r (α/√r for
rsLoRA); embeddings and GPT-2's ``Conv1D`` store their matrix transposed, so there Δ = s · Aᵀ · Bᵀ.
What else it has (``modules_to_save``, trained biases) are whole tensors with a plain difference.
Everything that would make Δ another thing than that is refused by name, unknown settings too: a
variant of LoRA that this module has not heard of must not be taken for LoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubdiff.checkpoint import INDEX, SINGLE, Checkpoint, Placed, read_json
from hubdiff.configs import quantised, tied
from hubdiff.errors import CannotDiff, CheckpointError, NoWeights
from hubdiff.files import FileTree
from hubdiff.manifest import AdapterTensor
from hubdiff.names import EMBEDDINGS, HEADS, Match, match_names
from hubdiff.pair import FLOATS, Filters, Pair, TensorPair, check_shapes
from hubdiff.safetensors_io import TensorEntry, read_header

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")

# Settings that change how an adapter is trained, found or loaded, and not what it adds.
_HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
})  # fmt: skip
# Ways to start a training that change the base, so that factors alone don't say what was added.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """Δ of one tensor of the base: ``left`` (rows × rank) times ``right`` (rank × columns) times
    ``scale``. ``transposed``: both stand transposed in the adapter's file."""

    base: Placed
    left: Placed
    right: Placed
    transposed: bool
    rank: int
    alpha: float
    scale: float

    @property
    def dtype(self) -> str:
        return self.left.entry.dtype


@dataclass(frozen=True)
class Adapter:
    """An adapter placed on its base. ``pair`` has its whole tensors; ``factors`` are keyed by the
    base's names; ``copies`` are tensors of the base that the adapter's file repeats, by their names
    there; ``tensors`` says what each tensor of the file is. ``notes`` are for people."""

    pair: Pair
    factors: dict[str, Factors]
    copies: dict[str, Placed]
    tensors: tuple[AdapterTensor, ...]
    notes: tuple[str, ...]


def is_adapter(tree: FileTree) -> bool:
    """Whether ``tree`` holds an adapter and no whole model."""
    files = tree.files()
    named = CONFIG in files or any(path.startswith("adapter_model.") for path in files)
    return named and SINGLE not in files and INDEX not in files


def open_adapter(tree: FileTree) -> Checkpoint:
    """The adapter's weights and config; close it. Raises ``NoWeights`` or ``CannotDiff``."""
    files = tree.files()
    if WEIGHTS not in files:
        pickle = next((path for path in files if path.startswith("adapter_model.")), None)
        raise NoWeights(
            f"{tree.pin} has its adapter only as {pickle}, which can run code when opened"
            if pickle
            else f"{tree.pin} has {CONFIG} and no {WEIGHTS}",
            next_step="Load it with peft and save it again: save_pretrained writes safetensors.",
        )
    if CONFIG not in files:
        raise NoWeights(
            f"{tree.pin} has the weights of an adapter and no {CONFIG}, which says what they mean",
            next_step="Save the adapter again: save_pretrained writes both.",
        )
    config = read_json(tree, CONFIG)
    _check_config(config, f"{tree.pin}/{CONFIG}")
    checkpoint = Checkpoint(tree, {}, {}, config, None)
    try:
        header = read_header(checkpoint.reader(WEIGHTS), checkpoint.where(WEIGHTS))
    except BaseException:
        checkpoint.close()
        raise
    checkpoint.shards[WEIGHTS] = header
    checkpoint.tensors.update({e.name: Placed(WEIGHTS, e) for e in header.tensors})
    return checkpoint


def _check_config(config: Mapping[str, Any], where: str) -> None:
    def refuse(what: str) -> CannotDiff:
        return CannotDiff(
            f"{where}: {what}",
            next_step="Merge the adapter into its base (peft: merge_and_unload, save_pretrained) "
            "and give the merged model.",
        )

    if config.get("peft_type") != "LORA":
        raise refuse(f"the peft_type is {config.get('peft_type')!r}; only LORA has a Δ of factors")
    for name, value in config.items():
        if value and name not in _HARMLESS:
            raise refuse(f"{name} is set, and what it adds is more than a product of factors")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise refuse(f"init_lora_weights is {start!r}, which changes the base as well")


def place_adapter(adapter: Checkpoint, base: Checkpoint) -> Adapter:
    """Find the base's tensor for everything in the adapter. Raises ``CannotDiff`` naming what has
    none, ``ShapeMismatch`` or ``VocabularyMismatch`` where shapes don't fit."""
    method = quantised(base.config)
    if method:
        raise CannotDiff(
            f"the weights of the base {base.tree.pin} are quantised ({method})",
            next_step="Give the unquantised version of that model as --base.",
        )
    return _Placing(adapter, base).place()


class _Placing:
    """One adapter, sorted out against one base."""

    def __init__(self, adapter: Checkpoint, base: Checkpoint) -> None:
        self._adapter, self._base = adapter, base
        self._where = str(adapter.tree.pin)
        self._config = adapter.config
        self._halves: dict[str, dict[str, Placed]] = {}  # tensor → {"A": …, "B": …}
        self._embeddings: set[str] = set()
        self._whole: dict[str, Placed] = {}
        self._notes: list[str] = []

    def place(self) -> Adapter:
        for name, placed in self._adapter.tensors.items():
            self._sort(name, placed)
        self._check_halves()
        names = dict.fromkeys([*self._halves, *self._whole])
        match = match_names(list(names), self._base.tensors)
        plain = self._orientation(match)
        factors = {}
        for name, halves in self._halves.items():
            target = match.pairs.get(name)
            if target is None:
                raise self._no_target(name)
            factors[target] = self._factors(name, self._base.tensors[target], halves, plain)
        self._note_ties(factors)
        copies = {p.entry.name: self._base.tensors[match.pairs[n]] for n, p in self._copied()}
        pair = Pair(
            self._adapter,
            self._base,
            None,
            {p.entry.name: self._pair(n, p, match) for n, p in self._full()},
            (),
            match.rename,
            Filters(),
            None,
        )
        return Adapter(
            pair, factors, copies, tuple(self._tensors(factors, pair, match)), tuple(self._notes)
        )

    def _sort(self, name: str, placed: Placed) -> None:
        """What one tensor of the file is."""
        if not name.startswith(_PREFIX):
            raise self._refuse(f"the tensor {name!r} is not one of PEFT's: it lacks {_PREFIX!r}")
        if placed.entry.dtype not in FLOATS:
            raise self._refuse(f"the tensor {name!r} is {placed.entry.dtype}")
        rest = name.removeprefix(_PREFIX)
        factor = _FACTOR.fullmatch(rest)
        if factor and bool(factor[2]) != bool(factor[4]):
            weight = f"{factor[1]}.weight"
            halves = self._halves.setdefault(weight, {})
            if halves.setdefault(factor[3], placed) is not placed:
                raise self._refuse(f"{weight} has two factors lora_{factor[3]}")
            if factor[2]:
                self._embeddings.add(weight)
        elif ".lora_" in rest:
            raise self._refuse(f"the tensor {name!r} is no factor of a plain LoRA")
        else:
            # A module that has factors keeps its own parameters one level down.
            base, layer, parameter = rest.rpartition(".base_layer.")
            whole = f"{base}.{parameter}" if layer else rest
            if self._whole.setdefault(whole, placed) is not placed:
                raise self._refuse(f"{whole} is in {WEIGHTS} twice")

    def _check_halves(self) -> None:
        for name, halves in self._halves.items():
            missing = {"A", "B"} - set(halves)
            if missing:
                raise self._refuse(
                    f"{name} has a factor lora_{min(halves)} and no lora_{missing.pop()}"
                )
        if not self._halves and not self._whole:
            raise self._refuse(f"{WEIGHTS} has no tensors")

    def _copied(self) -> list[tuple[str, Placed]]:
        """PEFT saves the matrix of an embedding along with its factors. The base must have the very
        same, which is checked as it is read."""
        return [(name, placed) for name, placed in self._whole.items() if name in self._halves]

    def _full(self) -> list[tuple[str, Placed]]:
        return [(name, placed) for name, placed in self._whole.items() if name not in self._halves]

    def _pair(self, name: str, placed: Placed, match: Match) -> TensorPair:
        target = match.pairs.get(name)
        base = self._base.tensors[target] if target else None
        check_shapes(name, placed, base, "adapter", "base")
        if base is None and name.endswith(HEADS) and tied(self._base.config) is not False:
            raise self._refuse(f"{name} is trained, and the base ties it to its embedding")
        if base is not None and base.entry.dtype not in FLOATS:
            raise self._refuse(f"{name} is {base.entry.dtype} in the base {self._base.tree.pin}")
        return TensorPair(target or name, placed.entry.name, placed, base, None)

    def _factors(
        self, name: str, base: Placed, halves: dict[str, Placed], plain: dict[str, bool]
    ) -> Factors:
        a, b = halves["A"], halves["B"]
        module = name.removesuffix(".weight")
        if a.entry.dtype != b.entry.dtype:
            raise self._refuse(f"the factors of {module} are {a.entry.dtype} and {b.entry.dtype}")
        if base.entry.dtype not in FLOATS:
            raise self._refuse(f"{module} is {base.entry.dtype} in the base {self._base.tree.pin}")
        rank = a.entry.shape[0] if a.entry.shape else 0
        transposed = not plain[name]
        if not _fits(base.entry, a.entry, b.entry, transposed):
            raise self._refuse(
                f"the factors of {module}, lora_A {list(a.entry.shape)} and lora_B "
                f"{list(b.entry.shape)}, make no matrix of the base's shape "
                f"{list(base.entry.shape)}"
            )
        declared = self._setting("rank_pattern", "r", module)
        if declared != rank:
            raise self._refuse(f"{module} has factors of rank {rank}, {CONFIG} says {declared:g}")
        alpha = self._setting("alpha_pattern", "lora_alpha", module)
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        left, right = (a, b) if transposed else (b, a)
        return Factors(base, left, right, transposed, rank, alpha, scale)

    def _orientation(self, match: Match) -> dict[str, bool]:
        """Whether Δ of each tensor is B · A as it stands. Shapes tell, but for square matrices, for
        which ``fan_in_fan_out`` is believed where no other module of the adapter contradicts it."""
        known: dict[str, bool] = {}
        square = []
        for name, halves in self._halves.items():
            if name not in match.pairs:
                continue
            entry = self._base.tensors[match.pairs[name]].entry
            ways = [
                straight
                for straight in (True, False)
                if _fits(entry, halves["A"].entry, halves["B"].entry, not straight)
            ]
            if name in self._embeddings:
                known[name] = False
            elif len(ways) == 2:
                square.append(name)
            else:
                known[name] = ways[0] if ways else True
        declared = not self._config.get("fan_in_fan_out")
        linear = {straight for name, straight in known.items() if name not in self._embeddings}
        if square and not linear <= {declared}:
            raise self._refuse(
                f"{square[0]} is square, and fan_in_fan_out is not true of every module: whether "
                "it is stored transposed can't be told"
            )
        return known | dict.fromkeys(square, declared)

    def _setting(self, pattern: str, default: str, module: str) -> float:
        """A rank or α, as PEFT looks it up."""
        where = f"{self._where}/{CONFIG}"
        value = self._config.get(default)
        patterns = self._config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(
                f"{where}: {pattern} is no object", next_step="Repair or replace that file."
            )
        for key, special in patterns.items():
            if _matches(key, module, f"{where}: {pattern}"):
                value = special
                break
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise CheckpointError(
                f"{where}: {default} of {module} is {value!r}, no number",
                next_step="Repair or replace that file.",
            )
        return float(value)

    def _note_ties(self, factors: dict[str, Factors]) -> None:
        if tied(self._base.config) is False or set(self._base.tensors) & set(HEADS):
            return
        for name in factors:
            if name.endswith(EMBEDDINGS):
                self._notes.append(
                    f"{name} is the output head of the base too: its Δ reaches both, as when PEFT "
                    "merges it"
                )

    def _tensors(
        self, factors: dict[str, Factors], pair: Pair, match: Match
    ) -> list[AdapterTensor]:
        """What every tensor of the file is, in the order of the file."""
        said = {}
        for name, one in factors.items():
            for role, placed in (("left", one.left), ("right", one.right)):
                said[placed.entry.name] = (name, role, one.transposed)
        for name, placed in self._copied():
            said[placed.entry.name] = (match.pairs[name], "base", False)
        for tuned_name, whole in pair.tensors.items():
            said[tuned_name] = (whole.name, "whole", False)
        return [AdapterTensor(name, *said[name]) for name in self._adapter.tensors]

    def _no_target(self, name: str) -> CannotDiff:
        if name.endswith(HEADS) and tied(self._base.config) is not False:
            return self._refuse(f"{name} has factors, and the base ties it to its embedding")
        return CannotDiff(
            f"{self._where} changes {name}, which the base {self._base.tree.pin} does not have",
            next_step="Check --base: it must be the model that the adapter was trained on.",
        )

    def _refuse(self, what: str) -> CannotDiff:
        return CannotDiff(
            f"{self._where}: {what}",
            next_step="Check --base; or merge the adapter into its base (peft: merge_and_unload, "
            "save_pretrained) and give the merged model.",
        )


def _fits(base: TensorEntry, a: TensorEntry, b: TensorEntry, transposed: bool) -> bool:
    """Whether the factors make a tensor of the base's shape. A convolution's lora_A has the shape
    of its weight, with the rank for the outputs; its lora_B is 1 × 1."""
    if not len(base.shape) == len(a.shape) == len(b.shape) >= 2 or a.shape[0] < 1:
        return False
    if transposed:
        return len(base.shape) == 2 and base.shape == (a.shape[1], b.shape[0]) and _chain(a, b)
    ones = (1,) * (len(b.shape) - 2)
    return base.shape == (b.shape[0], *a.shape[1:]) and b.shape[2:] == ones and _chain(a, b)


def _chain(a: TensorEntry, b: TensorEntry) -> bool:
    return a.shape[0] == b.shape[1]


def _matches(key: str, module: str, where: str) -> bool:
    """PEFT's patterns are regular expressions. A stranger wrote them: what could take forever to
    match is refused."""
    harmless = not re.search(r"\)[*+{?]|\\\d", key) and len(re.findall(r"[*+{]", key)) <= 4
    try:
        if harmless and len(key) <= 500:
            return re.match(rf"(.*\.)?({key})$", module) is not None
    except re.error:
        pass
    raise CannotDiff(
        f"{where} has the pattern {key[:80]!r}, which is no simple regular expression",
        next_step="Write module names there, with at most a few wildcards.",
    )
