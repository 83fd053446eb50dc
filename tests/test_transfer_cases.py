"""Onto another base: the cases that peers get wrong, one test each.

Vocabularies, tied embeddings, mixed dtypes, renames, heads, shards, side files, quantised weights.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from models import HIDDEN, ROWS, config, hashes, moved, save, weights
from safetensors.torch import load_file

import hubdiff
from hubdiff.errors import (
    CannotDiff,
    NamesMismatch,
    NotPortable,
    ShapeMismatch,
    VocabularyMismatch,
)
from hubdiff.manifest import Manifest, parse_manifest

Tensors = dict[str, torch.Tensor]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing would take most of the time here; test_picture.py does it."""
    monkeypatch.setattr("hubdiff.jobs.making.layer_picture", lambda *_: None)


def sibling(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Tensors:
    """A newer base of the family: every tensor has moved."""
    new = moved(tensors, step=4e-3, seed=9, frozen="nothing is")
    return {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in new.items()}


def exact(target: torch.Tensor, tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """round(target + (tuned − base)). The numbers here are near 0.02 and float64 holds the sum."""
    wide = target.double() + (tuned.double() - base.double())
    if target.dtype in (torch.float32, torch.float64):
        return wide.to(target.dtype)
    # By hand: float64 → 16 bit by way of float32 would round twice.
    digits, smallest = {torch.bfloat16: (8, 2.0**-126), torch.float16: (11, 2.0**-14)}[target.dtype]
    quantum = 2 ** (wide.abs().clamp(min=smallest).log2().floor() - digits + 1)
    return ((wide / quantum).round() * quantum).to(target.dtype)


def push(folder: Path, tuned: Path, base: Path, **options: object) -> Path:
    hubdiff.push_delta(tuned, folder / "delta", base=base, **options)  # type: ignore[arg-type]
    return folder / "delta"


def read(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def manifest(delta: Path) -> Manifest:
    return parse_manifest((delta / "hubdiff.json").read_bytes(), "m")


def transfer(folder: Path, delta: Path, target: Path, **options: object) -> tuple[Tensors, dict]:  # type: ignore[type-arg]
    applied = hubdiff.apply(delta, target, output=folder / "result", **options)  # type: ignore[arg-type]
    assert applied.plan["case"] == "transfer"
    return read(folder / "result"), applied.plan


def rebuild(folder: Path, delta: Path, base: Path, tuned: Path) -> None:
    applied = hubdiff.apply(delta, base, output=folder / "rebuilt")
    assert applied.plan["case"] == "own base"
    result = hashes(folder / "rebuilt")
    del result["hubdiff-result.json"]
    assert result == hashes(tuned)


# --- the plain case ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_target_gets_the_exact_difference_rounded_once(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    old = weights(dtype=dtype)
    new, other = moved(old), sibling(old)
    delta = push(tmp_path, save(tmp_path / "tuned", new), save(tmp_path / "base", old))
    result, plan = transfer(tmp_path, delta, save(tmp_path / "target", other))
    assert list(result) == sorted(other)
    for name, tensor in result.items():
        assert torch.equal(tensor, exact(other[name], new[name], old[name])), name
    assert "own base" in plan["reason"]


def test_scale_halves_and_takes_away(tmp_path: Path) -> None:
    old = weights(dtype=torch.float16)
    new, other = moved(old, step=1e-2), sibling(old)
    base = save(tmp_path / "base", old)
    delta, target = push(tmp_path, save(tmp_path / "tuned", new), base), save(tmp_path / "t", other)
    for scale in (0.5, -1.0, 2.0):
        result, plan = transfer(tmp_path, delta, target, scale=scale, force=True)
        assert plan["scale"] == scale
        for name, tensor in result.items():
            step = (new[name].double() - old[name].double()) * scale
            assert torch.equal(tensor, exact(other[name], step, torch.zeros(()))), name
    # On the own base a scale is a transfer, too; what comes out is between base and tuned.
    result, _ = transfer(tmp_path, delta, base, scale=0.5, force=True)
    assert not torch.equal(result[UP], new[UP])
    assert not torch.equal(result[UP], old[UP])


def test_only_what_include_and_exclude_let_through_is_applied(tmp_path: Path) -> None:
    old = weights()
    new, other = moved(old), sibling(old)
    delta = push(tmp_path, save(tmp_path / "tuned", new), save(tmp_path / "base", old))
    result, _ = transfer(
        tmp_path, delta, save(tmp_path / "t", other), include=["*.mlp.*"], exclude=["*.down_*"]
    )
    for name, tensor in result.items():
        takes = ".mlp." in name and ".down_" not in name
        expected = exact(other[name], new[name], old[name]) if takes else other[name]
        assert torch.equal(tensor, expected), name


def test_a_partial_delta_transfers_and_rebuilds_nothing(tmp_path: Path) -> None:
    old = weights()
    new, other = moved(old), sibling(old)
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", new)
    delta = push(tmp_path, tuned, base, exclude=["*embed*", "lm_head*"])
    assert {t.name for t in manifest(delta).tensors} == set(old) - {EMBED, HEAD}
    result, _ = transfer(tmp_path, delta, save(tmp_path / "t", other))
    assert torch.equal(result[EMBED], other[EMBED])
    assert torch.equal(result[UP], exact(other[UP], new[UP], old[UP]))
    verified = hubdiff.verify(delta, base=base)
    assert verified.rebuilt is None
    assert "only some of the tensors" in str(verified.why)
    on_base, _ = transfer(tmp_path, delta, base, force=True)
    assert torch.equal(on_base[UP], new[UP])
    assert torch.equal(on_base[EMBED], old[EMBED])


def test_a_sibling_that_begins_like_the_base_is_not_taken_for_it(tmp_path: Path) -> None:
    """The first bytes of every tensor agree; the difference shows while merging."""
    old = weights()
    new, other = moved(old), {name: tensor.clone() for name, tensor in old.items()}
    other[UP].view(-1)[-1] += 1
    delta = push(tmp_path, save(tmp_path / "tuned", new), save(tmp_path / "base", old))
    result, plan = transfer(tmp_path, delta, save(tmp_path / "target", other))
    for name, tensor in result.items():
        assert torch.equal(tensor, exact(other[name], new[name], old[name])), name
    assert "differs from the base's" in plan["reason"]


def test_the_own_base_is_known_by_content(tmp_path: Path) -> None:
    """Another name, another shard layout: the same tensors."""
    old = weights()
    tuned = save(tmp_path / "tuned", moved(old))
    delta = push(tmp_path, tuned, save(tmp_path / "base", old))
    rebuild(tmp_path, delta, save(tmp_path / "elsewhere", old, shards=3), tuned)


# --- 1. vocabulary ---


def with_rows(tensors: Tensors, rows: int) -> Tensors:
    taller = dict(tensors)
    for name in (EMBED, HEAD):
        taller[name] = torch.zeros(rows, HIDDEN, dtype=tensors[name].dtype)
    return taller


def test_a_vocabulary_mismatch_names_both_sizes_when_pushing(tmp_path: Path) -> None:
    base = save(tmp_path / "base", weights())
    tuned = save(tmp_path / "tuned", with_rows(weights(), ROWS + 1))
    with pytest.raises(VocabularyMismatch, match="97 rows in the tuned model and 96") as caught:
        push(tmp_path, tuned, base)
    assert "resize_token_embeddings" in str(caught.value.next_step)
    assert not (tmp_path / "delta").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}
    push(tmp_path, tuned, base, exclude=[EMBED, HEAD])  # the way out that the message names


def test_a_vocabulary_mismatch_names_both_sizes_when_applying(tmp_path: Path) -> None:
    old = weights()
    delta = push(tmp_path, save(tmp_path / "tuned", moved(old)), save(tmp_path / "base", old))
    target = save(tmp_path / "target", with_rows(sibling(old), ROWS + 32))
    with pytest.raises(VocabularyMismatch, match="96 rows in the delta and 128 in the target"):
        hubdiff.apply(delta, target, output=tmp_path / "result")
    assert not (tmp_path / "result").exists()
    result, _ = transfer(tmp_path, delta, target, exclude=[EMBED, HEAD])
    assert result[EMBED].shape == (ROWS + 32, HIDDEN)


def test_embeddings_that_the_tune_left_alone_may_have_any_size(tmp_path: Path) -> None:
    old = weights()
    new = {**moved(old), EMBED: old[EMBED], HEAD: old[HEAD]}
    delta = push(tmp_path, save(tmp_path / "tuned", new), save(tmp_path / "base", old))
    target = save(tmp_path / "target", with_rows(sibling(old), ROWS + 32))
    result, _ = transfer(tmp_path, delta, target)
    assert result[EMBED].shape == (ROWS + 32, HIDDEN)


# --- 2. tied embeddings ---


def tie(tensors: Tensors, *, head: bool) -> Tensors:
    tied = {**tensors, HEAD: tensors[EMBED].clone()}
    if not head:
        del tied[HEAD]
    return tied


@pytest.mark.parametrize("delta_has_head", [False, True])
@pytest.mark.parametrize("target_has_head", [False, True])
def test_a_tied_embedding_gets_its_difference_once(
    tmp_path: Path, delta_has_head: bool, target_has_head: bool
) -> None:
    """A tied head may be stored twice or once, on either side: both copies end up equal."""
    old = tie(weights(), head=delta_has_head)
    new = tie(moved(old), head=delta_has_head)
    other = tie(sibling(old), head=target_has_head)
    ties = {"tie_word_embeddings": True}
    base, tuned = save(tmp_path / "base", old, **ties), save(tmp_path / "tuned", new, **ties)
    delta = push(tmp_path, tuned, base)
    assert manifest(delta).aliases == ({HEAD: EMBED} if delta_has_head else {})
    result, plan = transfer(tmp_path, delta, save(tmp_path / "target", other, **ties))
    once = exact(other[EMBED], new[EMBED], old[EMBED])
    assert torch.equal(result[EMBED], once)
    assert set(result) == set(other)
    if target_has_head:
        assert torch.equal(result[HEAD], once)
    if delta_has_head != target_has_head:
        assert any(HEAD in note for note in plan["notes"])
    rebuild(tmp_path, delta, base, tuned)


def test_the_head_of_an_untied_target_stays_when_the_delta_ties(tmp_path: Path) -> None:
    old = tie(weights(), head=False)
    new, other = moved(old), sibling(weights())
    ties = {"tie_word_embeddings": True}
    base, tuned = save(tmp_path / "base", old, **ties), save(tmp_path / "tuned", new, **ties)
    delta = push(tmp_path, tuned, base)
    result, plan = transfer(tmp_path, delta, save(tmp_path / "target", other))
    assert torch.equal(result[HEAD], other[HEAD])
    assert torch.equal(result[EMBED], exact(other[EMBED], new[EMBED], old[EMBED]))
    assert any("lm_head.weight stays the target's" in note for note in plan["notes"])


def test_a_tune_that_unties_takes_its_head_along(tmp_path: Path) -> None:
    old = tie(weights(), head=False)
    new = {**moved(old), HEAD: moved(weights(), seed=5)[HEAD]}
    other = tie(sibling(weights()), head=False)
    base = save(tmp_path / "base", old, tie_word_embeddings=True)
    tuned = save(tmp_path / "tuned", new, tie_word_embeddings=False)
    delta = push(tmp_path, tuned, base)
    rebuild(tmp_path, delta, base, tuned)
    target = save(tmp_path / "target", other, tie_word_embeddings=True)
    result, plan = transfer(tmp_path, delta, target)
    assert plan["added"] == [HEAD]
    assert torch.equal(result[HEAD], new[HEAD])
    assert (
        json.loads((tmp_path / "result/config.json").read_bytes())["tie_word_embeddings"] is False
    )


def test_a_changed_head_that_a_tied_target_lacks_is_refused(tmp_path: Path) -> None:
    old = weights()
    delta = push(tmp_path, save(tmp_path / "tuned", moved(old)), save(tmp_path / "base", old))
    other = tie(sibling(old), head=False)
    target = save(tmp_path / "target", other, tie_word_embeddings=True)
    with pytest.raises(NamesMismatch, match=HEAD) as caught:
        hubdiff.apply(delta, target, output=tmp_path / "result")
    assert "untie" in str(caught.value.next_step)


# --- 3. mixed dtypes ---


def test_every_tensor_keeps_the_dtype_of_its_side(tmp_path: Path) -> None:
    names = list(weights())
    kinds = (torch.bfloat16, torch.float16, torch.float32)

    def mixed(tensors: Tensors, turn: int) -> Tensors:
        return {n: tensors[n].to(kinds[(i + turn) % 3]) for i, n in enumerate(names)}

    wide = weights(dtype=torch.float32)
    old, new, other = mixed(wide, 0), mixed(moved(wide), 1), mixed(sibling(wide), 2)
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", new)
    delta = push(tmp_path, tuned, base)
    rebuild(tmp_path, delta, base, tuned)
    result, _ = transfer(tmp_path, delta, save(tmp_path / "target", other))
    with hubdiff.open_delta(delta) as opened:
        steps = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, tensor in result.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, exact(other[name], steps[name], torch.zeros(()))), name
        error = steps[name].double() - (new[name].double() - old[name].double())
        assert error.norm() <= 2**-8 * steps[name].norm()


def test_specials_keep_their_bits_where_the_tune_did_nothing(tmp_path: Path) -> None:
    specials = torch.tensor([-0.0, float("nan"), float("inf"), float("-inf"), 1e-40, 0.0])
    specials.view(torch.int32)[1] = 0x7FA12345  # a signalling NaN with a payload
    old, new, other = weights(), moved(weights()), sibling(weights())
    for tensors in (old, new):
        tensors[UP] = tensors[UP].clone()
        tensors[UP].view(-1)[:6] = 0.5
    for dtype in (torch.bfloat16, torch.float32):
        target = {**other, UP: other[UP].to(dtype).clone()}
        target[UP].view(-1)[:6] = specials.to(dtype)
        if dtype == torch.float32:
            target[UP].view(-1).view(torch.int32)[:6] = specials.view(torch.int32)
        folder = tmp_path / str(dtype)
        delta = push(folder, save(folder / "tuned", new), save(folder / "base", old))
        result, _ = transfer(folder, delta, save(folder / "target", target))
        pattern = torch.int16 if dtype == torch.bfloat16 else torch.int32
        got, given = (t[UP].view(-1)[:6].view(pattern) for t in (result, target))
        assert torch.equal(got, given)


# --- 4. renames and heads ---


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}


RENAMES = {
    "prefix in the base": (("", "bert."), ("", ""), ("", "bert.")),
    "prefix in the tuned model": (("", ""), ("", "bert."), ("", "")),
    "prefix in the target": (("", ""), ("", ""), ("", "bert.")),
    "prefix everywhere but in the target": (("", "bert."), ("", "bert."), ("", "")),
    "language model inside a larger one": (
        ("model.", "model."),
        ("model.", "model.language_model."),
        ("model.", "language_model.model."),
    ),
}


@pytest.mark.parametrize("case", RENAMES)
def test_prefixes_that_differ_are_matched_and_recorded(tmp_path: Path, case: str) -> None:
    in_base, in_tuned, in_target = RENAMES[case]
    old = {n: t for n, t in weights().items() if n != HEAD}
    new, other = moved(old), sibling(old)
    base = save(tmp_path / "base", renamed(old, *in_base))
    tuned = save(tmp_path / "tuned", renamed(new, *in_tuned))
    delta = push(tmp_path, tuned, base)
    rename = manifest(delta).rename
    assert (rename is None) == (in_base[1] == in_tuned[1])
    if rename is not None:
        assert set(renamed(old, *in_base)) == {rename.apply(n) for n in read(tuned)}
    rebuild(tmp_path, delta, base, tuned)
    result, plan = transfer(tmp_path, delta, save(tmp_path / "target", renamed(other, *in_target)))
    expected = renamed({n: exact(other[n], new[n], old[n]) for n in old}, *in_target)
    assert set(result) == set(expected)
    for name, tensor in result.items():
        assert torch.equal(tensor, expected[name]), name
    assert any("prefix" in note for note in plan["notes"]) == (in_base[1] != in_target[1])


def test_heads_on_either_side_are_handled(tmp_path: Path) -> None:
    """A base with its pre-training head, a tune with a classifier, a target with another."""
    old = {n: t for n, t in weights().items() if n != HEAD}
    new, other = moved(old), sibling(old)
    old |= {"cls.dense.weight": torch.ones(4, 4), "cls.dense.bias": torch.ones(4)}
    new |= {"classifier.dense.weight": torch.ones(4, 4) * 2, "classifier.dense.bias": torch.ones(4)}
    other |= {"cls.dense.weight": torch.ones(4, 4) * 3, "pooler.bias": torch.ones(1)}
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", new)
    delta = push(tmp_path, tuned, base)
    record = manifest(delta)
    assert record.rename is None  # a new head is no renamed old one, alike as their names may be
    assert set(record.removed) == {"cls.dense.weight", "cls.dense.bias"}
    rebuild(tmp_path, delta, base, tuned)
    result, plan = transfer(tmp_path, delta, save(tmp_path / "target", other))
    assert set(plan["added"]) == {"classifier.dense.weight", "classifier.dense.bias"}
    assert set(plan["kept"]) == {"cls.dense.weight", "pooler.bias"}
    assert torch.equal(result["classifier.dense.weight"], new["classifier.dense.weight"])
    assert torch.equal(result["cls.dense.weight"], other["cls.dense.weight"])
    assert torch.equal(result[UP], exact(other[UP], new[UP], weights()[UP]))
    record_file = json.loads((tmp_path / "result/hubdiff-result.json").read_bytes())
    assert set(record_file["added"]) == set(plan["added"])


def test_added_tensors_get_the_targets_prefix(tmp_path: Path) -> None:
    old = {f"bert.{n}": t for n, t in weights().items()}
    new = {**moved(old), "bert.adapter.weight": torch.ones(3)}
    other = {n.removeprefix("bert."): t for n, t in sibling(old).items()}
    delta = push(tmp_path, save(tmp_path / "tuned", new), save(tmp_path / "base", old))
    result, plan = transfer(tmp_path, delta, save(tmp_path / "target", other))
    assert plan["added"] == ["adapter.weight"]
    assert torch.equal(result["adapter.weight"], torch.ones(3))


def test_buffers_of_integers_stay_the_targets_and_say_so(tmp_path: Path) -> None:
    old = {**weights(), "model.position_ids": torch.arange(8), "model.same": torch.arange(3)}
    new = {**moved(old), "model.position_ids": torch.arange(8) + 1}
    other = {**sibling(old), "model.position_ids": torch.arange(8) + 5}
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", new)
    delta = push(tmp_path, tuned, base)
    rebuild(tmp_path, delta, base, tuned)
    result, plan = transfer(tmp_path, delta, save(tmp_path / "target", other))
    assert torch.equal(result["model.position_ids"], other["model.position_ids"])
    assert any("model.position_ids stays" in note for note in plan["notes"])


# --- 5. tensors on disk ---


def test_fused_experts_are_diffed_as_they_lie_on_disk(tmp_path: Path) -> None:
    """One file has experts apart, the loaded model would have them fused: names stay as on disk."""
    experts = {
        f"model.layers.0.mlp.experts.{i}.{k}_proj.weight": torch.randn(4, 4).bfloat16()
        for i in range(4)
        for k in ("gate", "up", "down")
    }
    old = {**weights(), **experts}
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", moved(old))
    delta = push(tmp_path, tuned, base)
    assert {t.name for t in manifest(delta).tensors} == set(old)
    rebuild(tmp_path, delta, base, tuned)


# --- 6. shards ---


@pytest.mark.parametrize(("of_base", "of_tuned", "of_target"), [(1, 3, 2), (4, 1, 1), (2, 2, 5)])
def test_sides_may_be_sharded_differently(
    tmp_path: Path, of_base: int, of_tuned: int, of_target: int
) -> None:
    old = weights()
    new, other = moved(old), sibling(old)
    base = save(tmp_path / "base", old, shards=of_base)
    tuned = save(tmp_path / "tuned", new, shards=of_tuned)
    target = save(tmp_path / "target", other, shards=of_target)
    delta = push(tmp_path, tuned, base)
    rebuild(tmp_path, delta, base, tuned)
    result, _ = transfer(tmp_path, delta, target)
    layout = {file.name for file in target.glob("*.safetensors*")}
    assert {file.name for file in (tmp_path / "result").glob("*.safetensors*")} == layout
    for name, tensor in result.items():
        assert torch.equal(tensor, exact(other[name], new[name], old[name])), name


def test_files_beside_the_weights_stay_behind_and_are_listed(tmp_path: Path) -> None:
    old = weights()
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", moved(old))
    for file in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "optimizer.pt"):
        (tuned / file).write_bytes(b"x" * 9)
    (tuned / "onnx").mkdir()
    (tuned / "onnx/model.onnx").write_bytes(b"x")
    delta = push(tmp_path, tuned, base)
    left = {item.path: item.reason for item in manifest(delta).not_carried}
    assert set(left) == {
        "pytorch_model.bin",
        "consolidated.safetensors",
        "model.gguf",
        "optimizer.pt",
        "onnx/model.onnx",
    }
    assert "pickle" in left["pytorch_model.bin"]
    applied = hubdiff.apply(delta, base, output=tmp_path / "rebuilt")
    assert {item["path"] for item in applied.plan["left_out"]} == set(left)
    assert set(hashes(tmp_path / "rebuilt")) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors",
        "hubdiff-result.json",
    }


def test_added_tensors_are_in_the_index_and_load(tmp_path: Path) -> None:
    old = weights()
    new = {**moved(old), "score.weight": torch.randn(3, HIDDEN), "steps": torch.tensor(7)}
    other = sibling(old)
    delta = push(tmp_path, save(tmp_path / "tuned", new), save(tmp_path / "base", old))
    result, _ = transfer(tmp_path, delta, save(tmp_path / "target", other, shards=3))
    index = json.loads((tmp_path / "result/model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == {*other, "score.weight", "steps"}
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "result" / file)
    total = sum(tensor.nbytes for tensor in result.values())
    assert index["metadata"]["total_size"] == total
    assert torch.equal(result["score.weight"], new["score.weight"])
    assert torch.equal(result["steps"], new["steps"])


# --- 7. side files ---


def test_side_files_follow_the_tune_and_structure_follows_the_target(tmp_path: Path) -> None:
    """eos and tokenizer from the tuned model, rope from the target, labels from the tune."""
    old = weights()
    base = save(tmp_path / "base", old, rope_theta=10000.0)
    tuned = save(
        tmp_path / "tuned",
        moved(old),
        files={
            "tokenizer.json": '{"model": {"vocab": {"a": 0, "<|im_end|>": 1}}}',
            "chat_template.jinja": "{{ messages }}",
            "generation_config.json": '{"eos_token_id": [2, 7]}',
            "README.md": "# tuned by hand",
        },
        rope_theta=10000.0,
        eos_token_id=7,
        id2label={"0": "no", "1": "yes"},
    )
    target = save(
        tmp_path / "target",
        sibling(old),
        files={
            "generation_config.json": '{"eos_token_id": 2, "temperature": 0.6}',
            "notes.txt": "the target's own",
            "README.md": "# the target",
        },
        rope_theta=500000.0,
        max_position_embeddings=4096,
        rope_scaling={"rope_type": "llama3", "factor": 8.0},
    )
    delta = push(tmp_path, tuned, base)
    rebuild(tmp_path, delta, base, tuned)
    _, plan = transfer(tmp_path, delta, target)
    result = tmp_path / "result"
    merged = json.loads((result / "config.json").read_bytes())
    assert merged == config(
        rope_theta=500000.0,
        max_position_embeddings=4096,
        rope_scaling={"rope_type": "llama3", "factor": 8.0},
        eos_token_id=7,
        id2label={"0": "no", "1": "yes"},
    )
    generation = json.loads((result / "generation_config.json").read_bytes())
    assert generation == {"eos_token_id": [2, 7], "temperature": 0.6}
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (result / file).read_bytes() == (tuned / file).read_bytes()
    assert (result / "notes.txt").read_text() == "the target's own"
    # A result is no one's fine-tune but a merge: it has a card of its own.
    card = (result / "README.md").read_text()
    assert "- merge" in card
    assert "tuned by hand" not in card
    assert {f["path"] for f in plan["files"]} >= {"config.json", "tokenizer.json", "notes.txt"}


# --- 8. quantised ---


def test_a_quantised_target_is_refused(tmp_path: Path) -> None:
    old = weights()
    delta = push(tmp_path, save(tmp_path / "tuned", moved(old)), save(tmp_path / "base", old))
    target = save(
        tmp_path / "target", sibling(old), quantization_config={"quant_method": "gptq", "bits": 4}
    )
    with pytest.raises(NotPortable, match=r"target.* are quantised \(gptq\)") as caught:
        hubdiff.apply(delta, target, output=tmp_path / "result")
    assert "unquantised" in str(caught.value.next_step)
    assert not (tmp_path / "result").exists()


def test_an_fp8_target_without_a_word_in_its_config_is_refused(tmp_path: Path) -> None:
    old = weights()
    delta = push(tmp_path, save(tmp_path / "tuned", moved(old)), save(tmp_path / "base", old))
    other = {**sibling(old), UP: sibling(old)[UP].to(torch.float8_e4m3fn)}
    with pytest.raises(NotPortable, match=r"up_proj\.weight is F8_E4M3"):
        hubdiff.apply(delta, save(tmp_path / "target", other), output=tmp_path / "result")


def test_a_delta_of_quantised_models_rebuilds_and_is_not_portable(tmp_path: Path) -> None:
    """fp8 with block scales, as released: the scales are floats, but adding to them is wrong."""

    def fp8(tensors: Tensors) -> Tensors:
        packed = {**tensors, UP: tensors[UP].to(torch.float8_e4m3fn)}
        return {**packed, f"{UP}_scale_inv": torch.ones(2, 2) * tensors[UP].float().std()}

    old = weights()
    declared = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    base = save(tmp_path / "base", fp8(old), **declared)
    tuned = save(tmp_path / "tuned", fp8(moved(old, step=1e-2)), **declared)
    delta = push(tmp_path, tuned, base)
    assert "quantised (fp8)" in str(manifest(delta).not_portable_reason)
    rebuild(tmp_path, delta, base, tuned)
    for name, target in (("fp8", fp8(sibling(old))), ("bf16", sibling(old))):
        folder = save(tmp_path / name, target, **(declared if name == "fp8" else {}))
        with pytest.raises(NotPortable, match=r"quantised \(fp8\)") as caught:
            hubdiff.apply(delta, folder, output=tmp_path / "result")
        assert "own base" in str(caught.value.next_step)
    assert not (tmp_path / "result").exists()


# --- 12. models that are not of one family ---


def test_models_of_other_names_are_refused_on_both_commands(tmp_path: Path) -> None:
    old = weights()
    stranger = {f"h.{i}.w.x": tensor for i, tensor in enumerate(old.values())}
    base, other = save(tmp_path / "base", old), save(tmp_path / "other", stranger)
    with pytest.raises(CannotDiff, match="only 0 of 21 tensors") as caught:
        push(tmp_path, other, base)
    assert "--base" in str(caught.value.next_step)
    assert not (tmp_path / "delta").exists()
    delta = push(tmp_path, save(tmp_path / "tuned", moved(old)), base)
    with pytest.raises(NamesMismatch, match="only 0 of the delta's 21") as caught_too:
        hubdiff.apply(delta, other, output=tmp_path / "result")
    assert "--to" in str(caught_too.value.next_step)
    assert not (tmp_path / "result").exists()


def test_another_size_of_the_architecture_is_refused(tmp_path: Path) -> None:
    old = weights()
    wide = {n: torch.cat([t, t]) if "layers" in n else t for n, t in old.items()}
    base, larger = save(tmp_path / "base", old), save(tmp_path / "larger", wide)
    with pytest.raises(ShapeMismatch, match=r"is \[128\] in the tuned model and \[64\] in"):
        push(tmp_path, larger, base)
    delta = push(tmp_path, save(tmp_path / "tuned", moved(old)), base)
    with pytest.raises(ShapeMismatch, match=r"is \[64.*\] in the delta and \[128.*\] in"):
        hubdiff.apply(delta, larger, output=tmp_path / "result")


def test_layers_that_the_target_lacks_are_refused(tmp_path: Path) -> None:
    old = weights()
    delta = push(tmp_path, save(tmp_path / "tuned", moved(old)), save(tmp_path / "base", old))
    shallow = {n: t for n, t in sibling(old).items() if "layers.1" not in n}
    target = save(tmp_path / "target", shallow)
    with pytest.raises(NamesMismatch, match=r"changes model\.layers\.1\..* does not have"):
        hubdiff.apply(delta, target, output=tmp_path / "result")


# --- 15. permissions ---


def test_files_have_the_permissions_that_the_umask_says(tmp_path: Path) -> None:
    old = weights()
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", moved(old), shards=2)
    target = save(tmp_path / "target", sibling(old))
    before = os.umask(0o022)
    try:
        delta = push(tmp_path, tuned, base)
        hubdiff.apply(delta, base, output=tmp_path / "rebuilt")
        transfer(tmp_path, delta, target)
        hubdiff.unpack(delta, tmp_path / "dense")
    finally:
        os.umask(before)
    for folder in ("delta", "rebuilt", "result", "dense"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o755
        for path in (tmp_path / folder).rglob("*"):
            mode = 0o755 if path.is_dir() else 0o644
            assert stat.S_IMODE(path.stat().st_mode) == mode, path


# --- masters ---


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_masters_give_a_truer_difference_and_the_same_rebuild(tmp_path: Path, plain: bool) -> None:
    """At a small learning rate the 16-bit difference is mostly rounding noise."""
    old = weights()
    masters = {
        name: tensor.float() + torch.randn(tensor.shape, generator=torch.Generator()) * 2e-5
        for name, tensor in old.items()
    }
    new = {name: tensor.bfloat16() for name, tensor in masters.items()}
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", new)
    without = push(tmp_path, tuned, base)
    better = tmp_path / "better"
    hubdiff.push_delta(
        tuned, better, base=base, tuned_master=save(tmp_path / "fp32", masters), plain=plain
    )
    assert manifest(better).master is not None
    rebuild(tmp_path, better, base, tuned)
    truth = masters[UP] - old[UP].float()

    def cosine(delta: Path) -> float:
        with hubdiff.open_delta(delta) as opened:
            step = opened.get_tensor(UP)
        return float(torch.nn.functional.cosine_similarity(step.view(1, -1), truth.view(1, -1)))

    assert cosine(without) < 0.9
    assert cosine(better) > 0.9999
    wide = {name: tensor.float() for name, tensor in sibling(old).items()}
    result, _ = transfer(tmp_path, better, save(tmp_path / "target", wide))
    assert (result[UP] - wide[UP] - truth).norm() < 0.01 * truth.norm()


def test_masters_of_another_model_are_refused(tmp_path: Path) -> None:
    old = weights()
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", moved(old))
    stranger = save(tmp_path / "fp32", {"x.y.z": torch.ones(3)})
    with pytest.raises(CannotDiff, match="masters"):
        push(tmp_path, tuned, base, tuned_master=stranger)
    assert not (tmp_path / "delta").exists()


# --- the result is a model ---


def test_a_result_loads_with_transformers(tmp_path: Path) -> None:
    """In a process of its own: transformers is slow to import and nothing else here needs it."""
    old = weights()
    new, other = moved(old), sibling(old)
    delta = push(tmp_path, save(tmp_path / "tuned", new), save(tmp_path / "base", old))
    target = save(tmp_path / "target", other, shards=2)
    code = (
        "import sys, hubdiff, torch\n"
        "from safetensors.torch import save_file\n"
        "model = hubdiff.load(sys.argv[1], sys.argv[2], dtype=torch.bfloat16)\n"
        "save_file({k: v.clone() for k, v in model.state_dict().items()}, sys.argv[3])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(delta), str(target), str(tmp_path / "out.safetensors")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = load_file(tmp_path / "out.safetensors")
    assert torch.equal(loaded[UP], exact(other[UP], new[UP], old[UP]))
    assert torch.equal(loaded[HEAD], exact(other[HEAD], new[HEAD], old[HEAD]))
