from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubdiff.configs import (
    CONFIG_RULES,
    GENERATION_RULES,
    MISSING,
    MergeRules,
    json_text,
    merge_json,
    quantised,
    tied,
)

# Positions have two spellings of one meaning and dtype follows the weights, so the plain laws are
# stated without them; they have tests of their own below.
NAMES = [
    "hidden_size",
    "vocab_size",
    "eos_token_id",
    "id2label",
    "architectures",
    "x",
    "num_labels",
]
ATOMS = st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["a", "b"])
VALUES = ATOMS | st.lists(ATOMS, max_size=2)
OBJECTS = st.recursive(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
    lambda inner: st.dictionaries(
        st.sampled_from([*NAMES, "text_config", "quantization_config"]), VALUES | inner, max_size=5
    ),
    max_leaves=12,
)
RULES = st.sampled_from([CONFIG_RULES, GENERATION_RULES])


@given(OBJECTS, OBJECTS, RULES)
def test_a_tune_that_changed_nothing_gives_the_target(
    base: dict[str, Any], target: dict[str, Any], rules: MergeRules
) -> None:
    merged = merge_json(base, base, target, rules)
    assert merged.value == target
    assert list(merged.value) == list(target)
    assert not merged.notes


@given(OBJECTS, OBJECTS, RULES)
def test_a_target_like_the_base_gives_the_tuned(
    base: dict[str, Any], tuned: dict[str, Any], rules: MergeRules
) -> None:
    merged = merge_json(base, tuned, base, rules)
    assert merged.value == tuned
    assert not merged.notes


@given(OBJECTS, OBJECTS, OBJECTS, RULES)
def test_merging_again_changes_nothing(
    base: dict[str, Any], tuned: dict[str, Any], target: dict[str, Any], rules: MergeRules
) -> None:
    once = merge_json(base, tuned, target, rules).value
    assert merge_json(base, tuned, once, rules).value == once


@given(OBJECTS, OBJECTS, OBJECTS, RULES)
def test_every_value_comes_from_one_of_the_sides(
    base: dict[str, Any], tuned: dict[str, Any], target: dict[str, Any], rules: MergeRules
) -> None:
    merged = merge_json(base, tuned, target, rules)
    for name, value in merged.value.items():
        if not isinstance(value, dict):
            assert value in (tuned.get(name, MISSING), target.get(name, MISSING))
    for note in merged.notes:
        assert note.tuned != note.base
        assert note.tuned != note.target
        assert note.target != note.base


OF_THE_WEIGHTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "num_key_value_heads",
    "vocab_size",
    "sliding_window",
    "model_type",
    "quantization_config",
    "attention_bias",
    "rms_norm_eps",
    "layer_norm_eps",
    "tie_word_embeddings",
    "n_embd",
    "d_model",
    "hidden_act",
    "num_experts_per_tok",
    "rope_theta",
    "max_position_embeddings",
    "dtype",
)
OF_THE_TUNE = (
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
    "num_labels",
    "num_beams",
    "temperature",
    "auto_map",
    "use_cache",
)


@pytest.mark.parametrize(
    ("field", "kept"),
    [*[(name, "target") for name in OF_THE_WEIGHTS], *[(name, "tuned") for name in OF_THE_TUNE]],
)
def test_who_wins_a_conflict(field: str, kept: str) -> None:
    merged = merge_json({field: 1}, {field: 2}, {field: 3})
    assert merged.value == {field: 2 if kept == "tuned" else 3}
    (note,) = merged.notes
    assert (note.field, note.base, note.tuned, note.target, note.kept) == (field, 1, 2, 3, kept)


def test_nothing_is_structural_in_a_generation_config() -> None:
    sides = [{"num_beams": n, "hidden_size": n, "max_position": n} for n in (1, 2, 3)]
    assert merge_json(*sides, GENERATION_RULES).value == sides[1]


def test_a_missing_key_is_a_value() -> None:
    assert merge_json({"pad_token_id": 0}, {}, {"pad_token_id": 0}).value == {}
    assert merge_json({"x": 0}, {"x": None}, {"x": 0}).value == {"x": None}
    merged = merge_json({"pad_token_id": 0}, {}, {"pad_token_id": 5})
    assert merged.value == {}
    assert merged.notes[0].tuned is MISSING
    assert "tuned absent" in str(merged.notes[0])


def test_objects_are_merged_inside() -> None:
    merged = merge_json(
        {"text_config": {"hidden_size": 1, "eos_token_id": 1, "a": 1}},
        {"text_config": {"hidden_size": 2, "eos_token_id": 2, "a": 2}},
        {"text_config": {"hidden_size": 3, "eos_token_id": 3, "a": 1}},
    )
    assert merged.value == {"text_config": {"hidden_size": 3, "eos_token_id": 2, "a": 2}}
    assert [note.field for note in merged.notes] == [
        "text_config.hidden_size",
        "text_config.eos_token_id",
    ]


def test_label_maps_are_not_mixed() -> None:
    """Three labels of the target with two of the tune would be a head that nobody trained."""
    merged = merge_json(
        {},
        {"id2label": {"0": "NEG", "1": "POS"}},
        {"id2label": {"0": "A", "1": "B", "2": "C"}},
    )
    assert merged.value == {"id2label": {"0": "NEG", "1": "POS"}}


def test_who_wrote_the_file_is_never_reported() -> None:
    names = ("transformers_version", "_name_or_path", "_commit_hash")
    merged = merge_json(*[dict.fromkeys(names, n) for n in (1, 2, 3)])
    assert not merged.notes
    assert merged.value == dict.fromkeys(names, 3)


def test_dtype_is_the_targets_even_without_a_conflict() -> None:
    """The result has the target's dtype; a config that says bfloat16 would round it at load."""
    merged = merge_json({"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float32"})
    assert merged.value == {"dtype": "float32"}
    nested = merge_json(*[{"text_config": {"dtype": dtype}} for dtype in ("a", "b", "a")])
    assert nested.value == {"text_config": {"dtype": "a"}}


def test_dtype_in_a_new_spelling_is_no_change() -> None:
    merged = merge_json(
        {"torch_dtype": "float16"}, {"dtype": "float16"}, {"torch_dtype": "float16"}
    )
    assert merged.value == {"torch_dtype": "float16"}
    assert not merged.notes


def test_rope_comes_from_the_target_when_both_changed_it() -> None:
    base = {"rope_theta": 1e4, "max_position_embeddings": 4096}
    tuned = {"rope_theta": 1e4, "max_position_embeddings": 8192, "rope_scaling": {"factor": 2}}
    target = {"rope_theta": 5e5, "max_position_embeddings": 4096}
    merged = merge_json(base, tuned, target)
    assert merged.value == target
    assert [note.field for note in merged.notes] == ["max_position_embeddings", "rope_scaling"]


def test_half_a_rope_scaling_is_never_taken() -> None:
    merged = merge_json(
        {"rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
    )
    assert merged.value == {"rope_scaling": {"rope_type": "llama3", "factor": 8}}


def test_rope_written_by_another_transformers_is_no_change() -> None:
    """transformers 5 writes rope_parameters; taking it beside a new rope_theta would undo that."""
    old = {"rope_theta": 10000.0, "rope_scaling": None}
    resaved = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    newer_base = {"rope_theta": 500000.0, "rope_scaling": None}
    merged = merge_json(old, resaved, newer_base)
    assert merged.value == newer_base
    assert not merged.notes


def test_a_tune_that_extended_the_context_keeps_it_on_an_unchanged_target() -> None:
    base = {"max_position_embeddings": 4096}
    tuned = {"max_position_embeddings": 8192, "rope_scaling": {"type": "yarn", "factor": 2}}
    assert merge_json(base, tuned, base).value == tuned


def test_keys_follow_the_target_then_the_new_ones() -> None:
    merged = merge_json({}, {"new": 1, "b": 2, "a": 3}, {"b": 2, "a": 3, "c": 4})
    assert list(merged.value) == ["b", "a", "c", "new"]


def test_text_is_as_transformers_writes_it() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.PretrainedConfig(eos_token_id=[1, 2], id2label={0: "é"})
    text = config.to_json_string(use_diff=False)
    assert json_text(json.loads(text)) == text


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "FP8"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
        ({"quantization_config": "gptq"}, "unknown"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ],
)
def test_quantised(config: dict[str, Any], method: str | None) -> None:
    assert quantised(config) == method


@pytest.mark.parametrize(
    ("config", "answer"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"tie_word_embeddings": "yes"}, None),
        ({"text_config": "broken"}, None),
    ],
)
def test_tied(config: dict[str, Any], answer: bool | None) -> None:
    assert tied(config) is answer
