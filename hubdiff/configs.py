"""What config.json and generation_config.json say, and their field-level three-way merge.

Pure functions on parsed JSON. ``merge_json`` replays what a tune did to a config (source base →
tuned) on the target's; ``quantised`` and ``tied`` read what a config says about the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal


class Missing(Enum):
    """A key that is not there, which is not the same as null."""

    MISSING = "missing"


MISSING = Missing.MISSING


@dataclass(frozen=True)
class Note:
    """A field that tune and target both changed: its path, the three values, and whose value the
    result has. ``str()`` is one line for people."""

    field: str
    base: Any
    tuned: Any
    target: Any
    kept: Literal["tuned", "target"]

    def __str__(self) -> str:
        values = f"base {_short(self.base)}, tuned {_short(self.tuned)}"
        return f"{self.field}: {self.kept} value kept ({values}, target {_short(self.target)})"


def _short(value: Any) -> str:
    text = "absent" if value is MISSING else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Merged:
    """A merged JSON object and the conflicts met on the way."""

    value: dict[str, Any]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class MergeRules:
    """What wins when tune and target both changed a field.

    ``structural``: fields the target's weights decide; the target's value wins. All others are the
    tune's intent (labels, eos ids, …); the tuned value wins. ``target_only``: spellings of the one
    field that describes the bytes of the weights, which are the target's even without a conflict.
    """

    structural: re.Pattern[str] | None = None
    target_only: tuple[str, ...] = ()

    def is_structural(self, name: str) -> bool:
        return self.structural is not None and self.structural.match(name) is not None


CONFIG_RULES = MergeRules(
    structural=re.compile(
        r"model_type$|vocab_size|type_vocab_size|tie_word_embeddings|quantization_config|"
        r"hidden_|intermediate_|head_dim|v_head_dim|qk_|kv_|q_lora|layer_types|layer_norm|"
        r"num_(?!labels$|beams$|beam_groups$|return_sequences$)|n_|d_(?:model|ff|kv|inner|state)|"
        r"rope|rotary|partial_rotary|max_position|original_max_position|max_window_layers|"
        r"sliding_window|use_sliding_window|attention|attn|rms_norm|norm_|mlp_|moe_|expert|"
        r"embedding|final_logit|logit_scale|query_pre_attn|first_k_dense|shared_expert|router_|"
        r"conv_|ssm_|mamba_|state_size|alibi|parallel_attn"
    ),
    # transformers 5 loads with the dtype config.json names: a tuned "bfloat16" on a float32 target
    # would round the result in silence.
    target_only=("dtype", "torch_dtype"),
)
GENERATION_RULES = MergeRules()
TOKENIZER_RULES = MergeRules(structural=re.compile(r"added_tokens_decoder|tokenizer_class"))
# Where a multimodal config keeps that of its language model.
SUB_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")

# Who wrote the file: merged like any field, never worth a note.
_SILENT = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})
# Positions are one statement spread over several keys, spelled differently by transformers 4
# (rope_theta, rope_scaling) and 5 (rope_parameters). Half of one rope scaling and half of another
# is a model that nobody trained, so these keys come from one side together.
_POSITIONS = re.compile(r"rope|rotary|partial_rotary|max_position|original_max_position")
# Dicts that mean something only as a whole.
_WHOLE = frozenset({"quantization_config", "id2label", "label2id", "auto_map"})


@dataclass
class _Merge:
    """One run of the merge; collects notes on the way down."""

    rules: MergeRules
    notes: list[Note] = field(default_factory=list)

    def objects(
        self, base: dict[str, Any], tuned: dict[str, Any], target: dict[str, Any], prefix: str
    ) -> dict[str, Any]:
        three = (base, tuned, target)
        names = list(dict.fromkeys([*target, *tuned]))
        positions = sorted({n for side in three for n in side if self._is_position(n)})
        whole = dict.fromkeys(self.rules.target_only, target)
        whole |= dict.fromkeys(positions, self._position_side(positions, three, prefix))
        merged: dict[str, Any] = {}
        for name in names:
            if name in whole:
                value = whole[name].get(name, MISSING)
            else:
                value = self._value(name, *_values(name, three), path=f"{prefix}{name}")
            if value is not MISSING:
                merged[name] = value
        self._note_target_only(three, prefix)
        return merged

    def _value(self, name: str, base: Any, tuned: Any, target: Any, *, path: str) -> Any:
        if tuned in (base, target):
            return target
        if name not in _WHOLE and all(isinstance(side, dict) for side in (base, tuned, target)):
            return self.objects(base, tuned, target, f"{path}.")
        if target == base:
            return tuned
        if name in _SILENT or any(self.rules.is_structural(part) for part in path.split(".")):
            self._note(path, base, tuned, target, "target")
            return target
        self._note(path, base, tuned, target, "tuned")
        return tuned

    def _is_position(self, name: str) -> bool:
        return self.rules.is_structural(name) and _POSITIONS.match(name) is not None

    def _position_side(self, names: list[str], three: _Three, prefix: str) -> dict[str, Any]:
        """The side all positions come from."""
        _, tuned, target = three
        was, became, now = (_said_of_positions(side, names) for side in three)
        if became in (was, now):
            return target
        if now == was:
            return tuned
        for name in names:
            values = _values(name, three)
            if values[1] not in (values[0], values[2]):
                self._note(f"{prefix}{name}", *values, "target")
        return target

    def _note_target_only(self, three: _Three, prefix: str) -> None:
        """One field in several spellings: compare what each side says, not how."""
        spellings = [[n for n in self.rules.target_only if n in side] for side in three]
        base, tuned, target = (
            side[found[0]] if found else MISSING
            for side, found in zip(three, spellings, strict=True)
        )
        if spellings[1] and tuned not in (base, target):
            self._note(f"{prefix}{spellings[1][0]}", base, tuned, target, "target")

    def _note(
        self, path: str, base: Any, tuned: Any, target: Any, kept: Literal["tuned", "target"]
    ) -> None:
        if path.rpartition(".")[2] not in _SILENT:
            self.notes.append(Note(path, base, tuned, target, kept))


_Three = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def _values(name: str, three: _Three) -> tuple[Any, Any, Any]:
    base, tuned, target = (side.get(name, MISSING) for side in three)
    return base, tuned, target


def _said_of_positions(config: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """What a config says about positions, in one spelling for transformers 4 and 5."""
    said = {name: config[name] for name in names if config.get(name) is not None}
    if isinstance(said.get("rope_scaling"), dict):
        said.setdefault("rope_parameters", said.pop("rope_scaling"))
    if not isinstance(said.get("rope_parameters"), dict):
        return said
    parameters = dict(said.pop("rope_parameters"))
    if "type" in parameters:
        parameters.setdefault("rope_type", parameters.pop("type"))
    if parameters.get("rope_type") == "default":
        del parameters["rope_type"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in parameters:
            said.setdefault(name, parameters.pop(name))
    return {**said, "rope_parameters": parameters} if parameters else said


def merge_json(
    base: dict[str, Any],
    tuned: dict[str, Any],
    target: dict[str, Any],
    rules: MergeRules = CONFIG_RULES,
) -> Merged:
    """Replay what the tune did to a JSON object (``base`` → ``tuned``) on ``target``.

    Per field: untouched by the tune → target's; untouched by the target → tuned's; both the same →
    that; both changed → by ``rules``, with a note. Objects are merged inside, lists are atoms, a
    missing key is a value. Keys come in the target's order, then the tune's new ones. Positions
    (rope, context length) come from one side as a whole.
    """
    merge = _Merge(rules)
    return Merged(merge.objects(base, tuned, target, ""), tuple(merge.notes))


def json_text(value: dict[str, Any]) -> str:
    """A config as transformers writes it: sorted keys, indent 2, a newline at the end."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def quantised(config: Mapping[str, Any]) -> str | None:
    """The quantisation method ``config.json`` declares (``"fp8"``, ``"gptq"``, …), or None."""
    for holder in (config, *_sub_configs(config)):
        for name in ("quantization_config", "compression_config"):
            declared = holder.get(name)
            if declared:
                return _method(declared)
    return None


def _method(declared: object) -> str:
    if not isinstance(declared, Mapping):
        return "unknown"
    for name in ("quant_method", "quant_algo"):
        if declared.get(name):
            return str(declared[name])
    if declared.get("load_in_4bit") or declared.get("load_in_8bit"):
        return "bitsandbytes"
    return "unknown"


def tied(config: Mapping[str, Any]) -> bool | None:
    """Whether ``config.json`` says that input and output embeddings are one tensor; None when it
    does not say. What the config says may be wrong: the tensors on disk decide."""
    for holder in (config, *_sub_configs(config)):
        said = holder.get("tie_word_embeddings")
        if isinstance(said, bool):
            return said
    return None


def layers_of(config: Mapping[str, Any]) -> int | None:
    """How many layers ``config.json`` says the model has."""
    for holder in (config, *_sub_configs(config)):
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if type(holder.get(name)) is int:
                return int(holder[name])
    return None


def _sub_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The text model first: in a multimodal config it is the one that has a vocabulary."""
    return [config[name] for name in SUB_CONFIGS if isinstance(config.get(name), Mapping)]
