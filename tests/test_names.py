from __future__ import annotations

import pytest

from hubdiff.names import Rename, differs_in_rows_only, match_names

ENCODER = [f"encoder.layer.{i}.attention.self.{k}.weight" for i in range(4) for k in "qkv"]


def test_equal_names_need_no_rename():
    match = match_names(ENCODER, list(reversed(ENCODER)))
    assert match.pairs == {name: name for name in ENCODER}
    assert match.rename is None


def test_a_prefix_on_one_side_is_found():
    base = [f"bert.{name}" for name in ENCODER] + ["cls.predictions.bias"]
    tuned = [*ENCODER, "classifier.weight"]
    match = match_names(tuned, base)
    assert match.pairs == {name: f"bert.{name}" for name in ENCODER}
    assert match.rename == Rename("", "bert.")
    assert match_names(base, tuned).rename == Rename("bert.", "")


def test_a_prefix_may_change_while_other_names_stay():
    base = ["lm_head.weight", *(f"model.layers.{i}.mlp.up.weight" for i in range(4))]
    tuned = [
        "lm_head.weight",
        *(f"model.language_model.layers.{i}.mlp.up.weight" for i in range(4)),
        "model.vision.proj.weight",
    ]
    match = match_names(tuned, base)
    assert match.rename == Rename("model.language_model.", "model.")
    assert len(match.pairs) == 5
    assert match.pairs["lm_head.weight"] == "lm_head.weight"
    assert "model.vision.proj.weight" not in match.pairs


def test_strangers_are_not_matched():
    assert match_names(["a.weight", "b.weight"], ["c.weight", "d.weight"]).pairs == {}


def test_an_ambiguous_rename_is_refused():
    match = match_names(["x.mlp.weight"], ["a.x.mlp.weight", "b.x.mlp.weight"])
    assert match.rename is None
    assert match.pairs == {}


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("model.embed_tokens.weight", (32000, 64), (32001, 64), True),
        ("lm_head.weight", (32000, 64), (32001, 64), True),
        ("model.layers.0.mlp.up_proj.weight", (128, 64), (256, 64), False),
        ("model.embed_tokens.weight", (32000, 64), (32000, 128), False),
    ],
)
def test_vocabularies_are_told_from_other_shapes(name, a, b, expected):
    assert differs_in_rows_only(name, a, b) is expected
