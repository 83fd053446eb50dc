"""The sample: which blocks it is made of, how it stands in the manifest, and its file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubdiff import fields, sample
from hubdiff.anatomy import place
from hubdiff.errors import BadManifest, BadSafetensors, CorruptPayload
from hubdiff.sample import BLOCK, GROUPS, MOST, Sample, choose

LLAMA = {"hidden": 4096, "inner": 14336, "keys": 1024, "rows": 128_256}


def llama(layers: int, hidden: int, inner: int, keys: int, rows: int) -> dict[str, int]:
    """Elements of the tensors of a Llama."""
    counts = {"model.embed_tokens.weight": rows * hidden, "model.norm.weight": hidden}
    for i in range(layers):
        sizes = {
            "self_attn.q_proj": hidden * hidden,
            "self_attn.k_proj": hidden * keys,
            "self_attn.v_proj": hidden * keys,
            "self_attn.o_proj": hidden * hidden,
            "mlp.gate_proj": hidden * inner,
            "mlp.up_proj": hidden * inner,
            "mlp.down_proj": hidden * inner,
            "input_layernorm": hidden,
            "post_attention_layernorm": hidden,
        }
        counts |= {f"model.layers.{i}.{name}.weight": size for name, size in sizes.items()}
    return counts | {"lm_head.weight": rows * hidden}


COUNTS = st.dictionaries(
    st.builds(
        "model.layers.{}.{}.weight".format,
        st.integers(0, 40),
        st.sampled_from(["mlp.up_proj", "self_attn.q_proj", "input_layernorm", "x"]),
    ),
    st.integers(0, 1 << 22),
    max_size=60,
)


@given(COUNTS)
def test_blocks_lie_in_their_tensors_and_none_is_there_twice(counts: dict[str, int]) -> None:
    chosen = choose(counts, "BF16")
    assert chosen.elements <= MOST
    for name, blocks in chosen.blocks.items():
        assert list(blocks) == sorted(set(blocks))
        assert blocks[0] >= 0
        assert blocks[-1] * BLOCK < counts[name]
    # Every tensor that has elements is in it: there are fewer of them than groups.
    assert set(chosen.blocks) == {name for name, count in counts.items() if count}
    assert choose(dict(reversed(counts.items())), "BF16").blocks == chosen.blocks


@given(COUNTS)
def test_the_weights_add_up_to_the_model(counts: dict[str, int]) -> None:
    chosen = choose(counts, "BF16")
    weights = chosen.weights()
    stands_for = sum(weights[piece.name] * piece.count for piece in chosen.pieces())
    assert stands_for == pytest.approx(sum(counts.values()))


@pytest.mark.parametrize("layers", [32, 126], ids=["8B", "30B"])
def test_the_sample_of_a_large_model_is_small_and_everywhere(layers: int) -> None:
    counts = llama(layers, **LLAMA)
    chosen = choose(counts, "BF16")
    assert MOST / 2 < chosen.elements <= MOST
    places = {place(name) for name in counts}
    assert {place(name) for name in chosen.blocks} == places
    assert len(chosen.blocks) <= GROUPS


def test_of_more_tensors_than_groups_some_are_taken_from_every_layer() -> None:
    counts = {
        f"model.layers.{i}.mlp.experts.{j}.up_proj.weight": 1 << 20
        for i in range(40)
        for j in range(64)
    }
    chosen = choose(counts, "BF16")
    assert len(chosen.blocks) == GROUPS
    per_layer = [sum(place(name)[1] == i for name in chosen.blocks) for i in range(40)]
    assert max(per_layer) - min(per_layer) <= 1
    weights = chosen.weights()
    stands_for = sum(weights[piece.name] * piece.count for piece in chosen.pieces())
    assert stands_for == pytest.approx(sum(counts.values()))


def test_a_toy_is_sampled_more_densely() -> None:
    counts = llama(4, hidden=128, inner=512, keys=128, rows=128)
    chosen = choose(counts, "BF16")
    assert 0.01 < chosen.elements / sum(counts.values()) < 0.03


@given(COUNTS, st.sampled_from(["BF16", "F32"]), st.integers(0, 9))
def test_file_and_manifest_entry_read_back(counts: dict[str, int], dtype: str, seed: int) -> None:
    chosen = choose(counts, dtype)
    entry = fields.Fields(json.loads(json.dumps(sample.to_json(chosen))), "m", "")
    again = sample.from_json(entry, counts)
    assert (again.dtype, dict(again.blocks)) == (chosen.dtype, dict(chosen.blocks))
    drawn = np.random.default_rng(seed).standard_normal(chosen.elements).astype(np.float32) / 50
    exact = (drawn.view(np.uint32) >> 16 << 16).view(np.float32)
    delta = (exact.view(np.uint32) >> 16).astype(np.uint16)
    base = delta if dtype == "BF16" else drawn.view(np.uint32)
    data = sample.encode(chosen, base, delta)
    values = sample.decode(again, data, "a file")
    assert np.array_equal(values.base, exact if dtype == "BF16" else drawn)
    assert np.array_equal(values.delta, exact)


def chosen_small() -> Sample:
    return choose({"a.weight": 3000, "b.weight": 10}, "BF16")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F64"},
        {"block": 128},
        {"blocks": {"c.weight": [0]}},
        {"blocks": {"a.weight": [12]}},
        {"blocks": {"a.weight": [1, 1]}},
        {"blocks": {"a.weight": [2, 1]}},
        {"blocks": {"a.weight": [-1]}},
        {"blocks": {"a.weight": "0"}},
        {"blocks": [0]},
    ],
    ids=str,
)
def test_a_manifest_entry_that_lies_is_refused(change: dict[str, object]) -> None:
    document = sample.to_json(chosen_small()) | change
    with pytest.raises(BadManifest):
        sample.from_json(fields.Fields(document, "m", ""), chosen_small().counts)


def test_a_sample_without_end_is_refused() -> None:
    counts = {f"{i}.weight": BLOCK for i in range(MOST // BLOCK + 1)}
    document = {"dtype": "BF16", "block": BLOCK, "blocks": {name: [0] for name in counts}}
    with pytest.raises(BadManifest, match="elements"):
        sample.from_json(fields.Fields(document, "m", ""), counts)


@pytest.mark.parametrize("cut", [0, 7, 40, -1])
def test_a_damaged_file_is_refused(cut: int) -> None:
    chosen = chosen_small()
    patterns = np.arange(chosen.elements, dtype=np.uint16)
    data = sample.encode(chosen, patterns, patterns)
    with pytest.raises((BadSafetensors, CorruptPayload)):
        sample.decode(chosen, data[:cut], "a file")
    other = choose({"a.weight": 3000}, "BF16")
    with pytest.raises(CorruptPayload):
        sample.decode(other, data, "a file")
