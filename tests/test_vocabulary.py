"""Two vocabularies in one result: rows go where their token is, new ones come along, and the
tokenizer, the configs and what is said of it fit the rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
import torch
import vocabularies as v
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import hubdiff
from hubdiff.devhub import DevHub
from hubdiff.errors import BadManifest, CannotApply, ShapeMismatch, VocabularyMismatch
from hubdiff.jobs.verify import verify
from hubdiff.manifest import parse_manifest
from hubdiff.plan import token_files
from hubdiff.plan.alignment import Alignment
from hubdiff.vocab import Vocabulary

WORDS = [f"w{i}" for i in range(60)]
SPECIALS = ["<s>", "</s>", "<unk>"]


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing would take most of the time here; test_picture.py does it."""
    monkeypatch.setattr("hubdiff.jobs.making.layer_picture", lambda *_: None)


class World(NamedTuple):
    """Base, tuned model and target, and the delta of the first two."""

    base: Path
    tuned: Path
    target: Path
    delta: Path


def world(
    folder: Path,
    base: tuple[int, str | None],
    tuned: tuple[int, str | None],
    target: tuple[int, str | None],
    *,
    width: int = 8,
    push: dict[str, Any] | None = None,
    **tuned_config: object,
) -> World:
    """Models of so many rows with these tokenizers."""
    old = v.tensors(base[0], width)
    new = v.resized(models.moved(old), tuned[0])
    ours = v.save(folder / "base", old, base[1])
    theirs = v.save(folder / "tuned", new, tuned[1], **tuned_config)
    later = models.moved(old, step=1e-3, seed=9)
    to = v.save(folder / "target", v.resized(later, target[0], seed=21), target[1])
    hubdiff.push_delta(theirs, folder / "delta", base=ours, **(push or {}))
    return World(ours, theirs, to, folder / "delta")


def put(here: World, **options: Any) -> tuple[v.Tensors, Path, dict[str, Any]]:
    output = here.target.parent / "result"
    options = {"output": output, "force": True, **options}
    applied = hubdiff.apply(here.delta, here.target, **options)
    return v.read(output), output, applied.plan


def check_rows(here: World, result: v.Tensors, output: Path) -> None:
    """Every token of the result, against the three models it comes from."""
    tokens = {name: v.tokens_of(path) for name, path in here._asdict().items() if name != "delta"}
    found = v.tokens_of(output)
    base, tuned, target = (v.read(path) for path in here[:3])
    cut = max(tokens["base"].values()) + 1  # what comes behind is the tuned model's own
    named = {row: token for token, row in tokens["base"].items()}
    new = {token: row for token, row in tokens["tuned"].items() if token not in tokens["base"]}
    old_names = {token: named[row] for token, row in new.items() if row in named}
    gone = {old for token, old in old_names.items() if token not in tokens["target"]}
    assert set(found) == {*(set(tokens["target"]) - gone), *new}
    # Rows of the result, each with the row of the model that it is told by.
    left: list[tuple[int, int]] = []
    moved: list[tuple[int, int]] = []
    own: list[tuple[int, int]] = []
    for token, row in found.items():
        mine, theirs = tokens["tuned"].get(token), tokens["target"].get(token)
        if theirs is not None:
            assert row == theirs
        if mine is None:
            left.append((row, row))
        elif tokens["base"].get(token, mine) == mine < cut and (
            theirs is not None or token in old_names
        ):
            assert row == (tokens["target"][old_names[token]] if theirs is None else theirs)
            moved.append((row, mine))
        else:
            own.append((row, mine))
    for name in (v.EMBED, v.HEAD):
        assert len(result[name]) > max(found.values())
        for pairs, wanted in (
            (left, lambda rows, _, name=name: target[name][rows]),
            (own, lambda _, mine, name=name: tuned[name][mine]),
            (
                moved,
                lambda rows, mine, name=name: v.exact(
                    target[name][rows], tuned[name][mine], base[name][mine]
                ),
            ),
        ):
            rows, mine = ([pair[side] for pair in pairs] for side in (0, 1))
            assert torch.equal(result[name][rows], wanted(rows, mine)), name
    assert v.config(output)["vocab_size"] == len(result[v.EMBED]) == len(result[v.HEAD])


# --- the families of the wild ---


def test_like_vicuna_one_more_row_than_the_base(tmp_path: Path) -> None:
    """32,000 rows and 32,001: a padding token was added and the embedding resized."""
    words = [f"w{i}" for i in range(31_997)]
    plain, padded = v.tokenizer(words, SPECIALS), v.tokenizer(words, [*SPECIALS, "<pad>"])
    here = world(tmp_path, (32_000, plain), (32_001, padded), (32_000, plain), pad_token_id=32_000)
    found = verify(here.delta, base=here.base, tuned=here.tuned)
    assert found.rebuilt == found.tuned_files

    said = "| 32,001: 32,000 compared with the base's of 32,000, 1 kept as they are |"
    assert said in (here.delta / "README.md").read_text()
    hubdiff.apply(here.delta, here.base, output=tmp_path / "again")
    again, tuned = models.hashes(tmp_path / "again"), models.hashes(here.tuned)
    assert {path: again[path] for path in tuned} == tuned

    result, output, plan = put(here)
    check_rows(here, result, output)
    assert plan["case"] == "transfer"
    assert plan["scratch"] == 0  # nothing had to be laid out anew
    (said,) = plan["vocabulary"]
    assert said["rows"] == {"result": 32_001, "target": 32_000, "shared": 32_000}
    assert said["added"] == {"count": 1, "tokens": {"<pad>": 32_000}}
    assert said["tokenizer"] == "the tuned model's"
    assert v.config(output)["pad_token_id"] == 32_000
    assert AutoTokenizer.from_pretrained(output).convert_tokens_to_ids("<pad>") == 32_000


def test_like_qwen_rows_padded_to_a_multiple(tmp_path: Path) -> None:
    """151,936 rows for 151,665 tokens, and 152,064 in another release. The tune took two of the
    rows that were padding for tokens of its own."""
    words = [f"w{i}" for i in range(151_643)]
    specials = [f"<|special_{i}|>" for i in range(22)]
    plain = v.tokenizer(words, specials)
    more = v.tokenizer(words, [*specials, "<|tool|>", "<|/tool|>"])
    here = world(tmp_path, (151_936, plain), (151_936, more), (152_064, plain), width=4)
    result, output, plan = put(here)
    check_rows(here, result, output)
    (said,) = plan["vocabulary"]
    assert said["added"]["tokens"] == {"<|tool|>": 151_665, "<|/tool|>": 151_666}
    assert said["rows"]["result"] == 152_064
    target = v.read(here.target)
    assert torch.equal(result[v.EMBED][151_936:], target[v.EMBED][151_936:])
    assert verify(here.delta, base=here.base, tuned=here.tuned).rebuilt


def test_like_qwen_a_tune_that_cut_the_padding_off(tmp_path: Path) -> None:
    """``resize_token_embeddings(len(tokenizer))`` leaves fewer rows than the base has."""
    plain = v.tokenizer(WORDS, SPECIALS)
    here = world(tmp_path, (96, plain), (63, plain), (96, plain))
    assert verify(here.delta, base=here.base, tuned=here.tuned).rebuilt
    result, output, plan = put(here)
    check_rows(here, result, output)
    assert torch.equal(result[v.HEAD][63:], v.read(here.target)[v.HEAD][63:])
    assert plan["vocabulary"][0]["tokenizer"].startswith("the same tokens")


def llama_3(names: dict[int, str]) -> str:
    """128,000 words and 256 special tokens, of which ``names`` are not reserved."""
    words = [f"w{i}" for i in range(128_000)]
    reserved = iter(range(256))
    specials = [names.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    return v.tokenizer(words, specials)


BASE_SPECIALS = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 9: "<|eot_id|>"}


def test_like_llama_3_reserved_tokens_that_the_target_has_elsewhere(tmp_path: Path) -> None:
    """3.1 put new names between the reserved ones: the same names stand for other rows."""
    old = llama_3(BASE_SPECIALS)
    new = llama_3({**BASE_SPECIALS, 4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>"})
    here = world(tmp_path, (128_256, old), (128_256, old), (128_256, new), width=4)
    result, output, plan = put(here)
    check_rows(here, result, output)
    (said,) = plan["vocabulary"]
    assert said["left"] == {"count": 2, "tokens": ["<|finetune_right_pad_id|>", "<|eom_id|>"]}
    assert said["missing"]["count"] == 2  # the last two reserved ones
    assert said["moved"] == 249
    assert said["tokenizer"] == "the target's"
    assert v.tokens_of(output) == v.tokens_of(here.target)


def test_like_llama_3_reserved_tokens_that_the_tune_gave_names(tmp_path: Path) -> None:
    """A chat format in reserved tokens. Δ is that of the reserved row, so it goes to that row, and
    the target's tokenizer calls it what the tune does."""
    old = llama_3(BASE_SPECIALS)
    tuned = old
    chat = {"<|im_start|>": 13, "<|im_end|>": 14}
    for name, row in chat.items():
        tuned = tuned.replace(f"<|reserved_special_token_{row - 3}|>", name)
    new = llama_3({**BASE_SPECIALS, 4: "<|finetune_right_pad_id|>"})
    here = world(
        tmp_path,
        (128_256, old),
        (128_256, tuned),
        (128_256, new),
        width=4,
        eos_token_id=128_014,
    )
    result, output, plan = put(here)
    found, theirs = v.tokens_of(output), v.tokens_of(here.target)
    (said,) = plan["vocabulary"]
    renamed = said["renamed"]["tokens"]
    assert renamed == {
        "<|reserved_special_token_10|>": "<|im_start|>",
        "<|reserved_special_token_11|>": "<|im_end|>",
    }
    assert found["<|im_start|>"] == 128_014  # one further than in the tuned model
    base, tune, target = (v.read(path) for path in here[:3])
    mine = v.tokens_of(here.tuned)
    for old_name, name in renamed.items():
        assert found[name] == theirs[old_name]
        assert old_name not in found
        row = mine[name]
        wanted = v.exact(target[v.EMBED][found[name]], tune[v.EMBED][row], base[v.EMBED][row])
        assert torch.equal(result[v.EMBED][found[name]], wanted)
    assert v.config(output)["eos_token_id"] == found["<|im_end|>"]
    loaded = AutoTokenizer.from_pretrained(output)
    assert loaded.encode("<|im_start|>", add_special_tokens=False) == [found["<|im_start|>"]]


# --- any two vocabularies ---


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A base, a tune that may add tokens and rows, and a target of a part of the base's words in
    another order, with words of its own."""
    base_words = draw(st.integers(12, 40))
    base_rows = base_words + 3 + draw(st.sampled_from([0, 0, 1, 9]))
    new = draw(st.integers(0, 4))
    words = [f"w{i}" for i in range(base_words)]
    kept = draw(st.permutations(words))[: draw(st.integers(base_words // 2 + 1, base_words))]
    in_order = draw(st.booleans())
    kept = words if in_order else ["w0", *(word for word in kept if word != "w0")]
    target_words = [*kept, *(f"t{i}" for i in range(draw(st.integers(0, 6))))]
    fresh = [f"<n{i}>" for i in range(new)]
    tuned_rows = max(base_words + 3 + new, base_rows) + draw(st.sampled_from([0, 0, 5]))
    specials = [draw(st.sampled_from(["<s>", "<bos>"])), *SPECIALS[1:]]
    known = draw(st.lists(st.sampled_from(fresh), unique=True)) if fresh else []
    target_rows = len(target_words) + 3 + len(known) + draw(st.sampled_from([0, 0, 2, 7]))
    return {
        "base": (base_rows, v.tokenizer(words, SPECIALS)),
        "tuned": (tuned_rows, v.tokenizer(words, [*specials, *fresh])),
        "target": (target_rows, v.tokenizer(target_words, [*SPECIALS, *known])),
        "push": {"plain": draw(st.booleans())},
    }


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_every_token_has_its_row(
    case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    here = world(tmp_path_factory.mktemp("world"), **case)
    assert verify(here.delta, base=here.base, tuned=here.tuned).rebuilt
    result, output, _ = put(here)
    check_rows(here, result, output)


def shuffled(words: list[str], seed: int = 3) -> list[str]:
    """The words in another order, the unknown one first."""
    rest = words[1:]
    random.Random(seed).shuffle(rest)
    return [words[0], *rest]


@pytest.fixture
def moved(tmp_path: Path) -> World:
    """A target of the same words in another order, and one token that the tune added."""
    return world(
        tmp_path,
        (63, v.tokenizer(WORDS, SPECIALS)),
        (64, v.tokenizer(WORDS, [*SPECIALS, "<new>"])),
        (64, v.tokenizer(shuffled(WORDS), [*SPECIALS, "<its own>"])),
        eos_token_id=63,
    )


def test_the_result_says_what_was_matched_added_and_left(moved: World) -> None:
    result, output, plan = put(moved)
    check_rows(moved, result, output)
    (said,) = plan["vocabulary"]
    assert said["mode"] == "align"
    assert (said["matched"], said["added"]["tokens"]) == (63, {"<new>": 64})
    assert said["left"]["tokens"] == ["<its own>"]
    assert said["tokenizer"] == "the target's, with 1 of the tuned model's tokens"
    record = json.loads((output / "hubdiff-result.json").read_text())
    assert record["vocabulary"] == plan["vocabulary"]
    card = (output / "README.md").read_text()
    for text in (
        "## Vocabulary",
        "| matched: Δ is on their row | 63 | 57 of them in another row |",
        "| added: new in the tuned model | 1 | `<new>` |",
        "does not know them | 1 | `<its own>` |",
        f"Tokenizer: {said['tokenizer']}.",
    ):
        assert text in card
    assert v.config(output)["eos_token_id"] == 64  # the tune's <new>, where it is now


def test_a_dry_run_plans_what_is_done(moved: World) -> None:
    planned = hubdiff.apply(moved.delta, moved.target, output=moved.target / "x", dry_run=True)
    _, _, plan = put(moved)
    assert planned.plan == plan
    assert plan["scratch"] > 0


def test_reads_only_planned_bytes(devhub: DevHub, put_repo: Any, moved: World) -> None:
    repos = {
        name: put_repo({str(f.relative_to(folder)): f.read_bytes() for f in files(folder)})
        for name, folder in (("delta", moved.delta), ("target", moved.target))
    }
    output = moved.target.parent / "result"
    devhub.log.clear()
    planned = hubdiff.apply(repos["delta"], repos["target"], output=output, dry_run=True)
    looked = {name: devhub.log.bytes_served(repo, "*.safetensors") for name, repo in repos.items()}
    devhub.log.clear()
    applied = hubdiff.apply(repos["delta"], repos["target"], output=output, force=True)
    assert applied.plan == planned.plan
    for name, repo in repos.items():
        side = sum(
            file["bytes"]
            for file in applied.plan["files"]
            if file["action"] == f"copy from {name}" and not file["path"].endswith(".safetensors")
        )
        served = devhub.log.bytes_served(repo, "*.safetensors") - looked[name]
        assert served + side == applied.plan["read"][name]
    assert v.read(output).keys() == v.read(moved.target).keys()


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


# --- tokenizers and configs ---


def test_a_chat_format_comes_along_with_its_tokens(tmp_path: Path) -> None:
    """Saved by transformers: special tokens, a template, and the ids that configs name."""

    def save(name: str, tensors: v.Tensors, text: str, **more: Any) -> Path:
        folder = v.save(tmp_path / name, tensors, text)
        made = PreTrainedTokenizerFast(
            tokenizer_object=v.Tokenizer.from_str(text),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        )
        made.add_special_tokens(more)
        if more:
            made.chat_template = (
                "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
            )
            ids = {"eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id}
            v.save(folder, tensors, text, **ids)
        made.save_pretrained(folder)
        return folder

    plain = v.tokenizer(WORDS, SPECIALS)
    old = v.tensors(63)
    base = save("base", old, plain)
    specials = {"pad_token": "<pad>", "eos_token": "<|end|>"}
    more: dict[str, Any] = {**specials, "additional_special_tokens": ["<|start|>"]}
    tuned = save("tuned", v.resized(models.moved(old), 66), plain, **more)
    other = v.tokenizer(shuffled(WORDS), [*SPECIALS, "<its own>"])
    target = save("target", v.resized(models.moved(old, 1e-3, seed=9), 64), other)
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    here = World(base, tuned, target, tmp_path / "delta")
    result, output, _ = put(here)
    check_rows(here, result, output)
    loaded, found = AutoTokenizer.from_pretrained(output), v.tokens_of(output)
    assert len(loaded) == len(result[v.EMBED]) == 67
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|end|>", found["<|end|>"])
    assert loaded.pad_token_id == found["<pad>"]
    assert v.config(output)["eos_token_id"] == found["<|end|>"]
    assert v.config(output)["pad_token_id"] == found["<pad>"]
    asked = [{"role": "user", "content": "w5"}]
    ids = loaded.apply_chat_template(asked, tokenize=True, return_dict=False)
    assert [found["<|start|>"], found["<|end|>"]] == [ids[0], ids[-1]]


def joined() -> Alignment:
    """A target of three tokens, whose second one the tune calls otherwise, and a token of its own
    in the fourth row."""
    return Alignment(
        *("align", 4, 3, 3, (), (), 3, 0, {"<new>": 3}, {}, {"<r>": "<chat>"}, (), (), "joined"),
        {"a": 0, "<chat>": 1, "b": 2, "<new>": 3},
    )


def test_older_tokenizer_configs_list_the_tokens_with_their_rows() -> None:
    entries = {"<new>": {"special": True, "lstrip": True}}
    target = {"added_tokens_decoder": {"1": {"content": "<r>", "special": True}}, "x": 1}
    tuned = {"added_tokens_decoder": {"7": {"content": "<new>"}}, "x": 2}
    assert token_files.joined_config(tuned, target, entries, joined()) == {
        "added_tokens_decoder": {
            "1": {"content": "<chat>", "special": True},
            "3": {"content": "<new>", "special": True, "lstrip": True},
        },
        "x": 2,
    }
    assert token_files.joined_config(tuned, {}, entries, joined()) == {"x": 2}
    assert token_files.joined_added({"<r>": 1}, joined()) == {"<chat>": 1, "<new>": 3}


def test_ids_in_configs_mean_the_tokens_they_meant() -> None:
    tuned = Vocabulary({"<new>": 0, "b": 1, "gone": 2})
    config = {
        "eos_token_id": [0, 1, 2],
        "bos_token_id": -1,
        "suppress_tokens": [0, 1],
        "text_config": {"pad_token_id": 1, "hidden_size": 1},
        "vocab_size": 1,
    }
    lost = ["eos_token_id"]  # one of its tokens is not there: the target's is kept
    assert token_files.with_ids(config, tuned, joined()) == (
        {
            "bos_token_id": -1,
            "suppress_tokens": [3, 2],
            "text_config": {"pad_token_id": 2, "hidden_size": 1},
            "vocab_size": 1,
        },
        lost,
    )


def test_a_word_of_the_vocabulary_can_be_renamed_where_it_is_a_whole_word() -> None:
    """As BERT's [unused1]: it stands in the model's own list."""
    words = {"model": {"type": "WordPiece", "vocab": {"a": 0, "<r>": 1, "b": 2}}}
    made = token_files.joined_tokenizer(words, {"<new>": {}}, joined(), "x")
    assert made["model"]["vocab"] == {"a": 0, "<chat>": 1, "b": 2}
    assert made["added_tokens"] == [{"id": 3, "content": "<new>"}]
    words["model"]["type"] = "BPE"
    with pytest.raises(VocabularyMismatch, match="'<r>' other names, which x can't be given"):
        token_files.joined_tokenizer(words, {"<new>": {}}, joined(), "x")


# --- which tensors, which tokens ---


PLAIN = v.tokenizer(WORDS, SPECIALS)


def family(
    folder: Path, tensors: v.Tensors, tuned: v.Tensors, target: v.Tensors, *texts: str
) -> World:
    """Three models of any tensors, with the tokenizers of base, tuned model and target."""
    made = []
    for name, model, text in zip(
        ("base", "tuned", "target"), (tensors, tuned, target), texts, strict=True
    ):
        models.save(folder / name, model, files={"tokenizer.json": text}, num_hidden_layers=0)
        made.append(folder / name)
    hubdiff.push_delta(made[1], folder / "delta", base=made[0])
    return World(*made, folder / "delta")


def test_only_tables_of_tokens_are_cut_and_moved(tmp_path: Path) -> None:
    """As T5 and BERT: layers of the decoder that have more rows than the vocabulary, and positions
    that have as many."""
    old = {
        "shared.weight": v.table(70, 8, 1),
        "decoder.block.0.layer.2.DenseReluDense.wi.weight": v.table(90, 8, 2),
        "encoder.embed_positions.weight": v.table(70, 8, 3),
        "lm_head.weight": v.table(70, 8, 4),
    }
    tuned = models.moved(old)
    target = models.moved(old, step=1e-3, seed=9)
    more = v.tokenizer(WORDS, [*SPECIALS, "<new>"])
    here = family(tmp_path, old, tuned, target, PLAIN, more, v.tokenizer(shuffled(WORDS), SPECIALS))
    manifest = json.loads((here.delta / "hubdiff.json").read_text())
    assert set(manifest["rows"]) == {"shared.weight", "lm_head.weight"}
    result, output, _ = put(here)
    for name in ("decoder.block.0.layer.2.DenseReluDense.wi.weight", *old):
        if name in ("shared.weight", "lm_head.weight"):
            row, found = v.tokens_of(output)["w7"], v.tokens_of(here.tuned)["w7"]
            wanted = v.exact(target[name][row], tuned[name][found], old[name][found])
            assert torch.equal(result[name][row], wanted)
        else:
            assert torch.equal(result[name], v.exact(target[name], tuned[name], old[name]))


def test_a_tensor_of_unknown_use_is_a_doubt(tmp_path: Path) -> None:
    """It has as many rows as there are tokens: nobody may guess whether they are moved."""
    old = {v.EMBED: v.table(63, 8, 1), "readout.weight": v.table(63, 8, 2)}
    target = models.moved(old, step=1e-3, seed=9)
    other = v.tokenizer(shuffled(WORDS), SPECIALS)
    here = family(tmp_path, old, models.moved(old), target, PLAIN, PLAIN, other)
    _, _, plan = put(here)
    assert plan["vocabulary"] == [None]
    assert any("readout.weight has a row for every token" in note for note in plan["notes"])
    with pytest.raises(VocabularyMismatch, match=r"whether readout\.weight has a row"):
        put(here, vocab="align")


def test_the_tuned_model_may_call_its_tensors_otherwise(tmp_path: Path) -> None:
    old = {**v.tensors(63), **{f"model.layers.{i}.x.weight": v.table(8, 8, i) for i in range(4)}}
    tuned = v.resized(models.moved(old), 64)
    renamed = {f"language_model.{name}": tensor for name, tensor in tuned.items()}
    target = models.moved(old, step=1e-3, seed=9)
    more = v.tokenizer(WORDS, [*SPECIALS, "<new>"])
    here = family(tmp_path, old, renamed, target, PLAIN, more, PLAIN)
    assert verify(here.delta, base=here.base, tuned=here.tuned).rebuilt
    result, _, _ = put(here)
    assert set(result) == set(old)
    assert torch.equal(result[v.EMBED][63], tuned[v.EMBED][63])


def test_a_base_with_other_rows_behind_is_not_the_own_base(tmp_path: Path) -> None:
    """A rebuild would drop them without a word."""
    here = world(tmp_path, (90, PLAIN), (63, PLAIN), (90, PLAIN))
    own = v.read(here.base)
    other = {name: tensor.clone() for name, tensor in own.items()}
    other[v.EMBED][80] += 1
    v.save(here.target, other, PLAIN)
    _, _, plan = put(here)
    assert plan["case"] == "transfer"
    v.save(here.target, own, PLAIN)
    assert put(here)[2]["case"] == "own base"


def test_tokens_follow_the_rows_where_the_delta_touches_none(tmp_path: Path) -> None:
    """As an adapter of other modules does, with a tokenizer saved beside it."""
    old = v.tensors(63)
    tuned = {**old, v.NORM: old[v.NORM] * 1.5}
    target = models.moved(old, step=1e-3, seed=9)
    saved_anew = PLAIN.replace('"version"', ' "version"')
    here = family(
        tmp_path, old, tuned, target, PLAIN, saved_anew, v.tokenizer(shuffled(WORDS), SPECIALS)
    )
    result, output, plan = put(here)
    assert v.tokens_of(output) == v.tokens_of(here.target)
    assert torch.equal(result[v.EMBED], target[v.EMBED])
    assert plan["vocabulary"][0]["tokenizer"] == "the target's"


def test_a_tune_that_moved_tokens_is_a_doubt(tmp_path: Path) -> None:
    """Its Δ of a row is no difference of one token."""
    other = v.tokenizer(shuffled(WORDS), SPECIALS)
    here = world(tmp_path, (63, PLAIN), (63, other), (63, PLAIN))
    _, _, plan = put(here)
    assert any("another row than it has in the base" in note for note in plan["notes"])
    with pytest.raises(VocabularyMismatch, match="another row than it has in the base"):
        put(here, vocab="align")


def test_a_base_whose_tokens_are_not_known_is_a_doubt(tmp_path: Path) -> None:
    more = v.tokenizer(WORDS, [*SPECIALS, "<new>"])
    here = world(tmp_path, (70, None), (70, more), (70, PLAIN))
    with pytest.raises(VocabularyMismatch, match="tokenizer of its base base can't be read"):
        put(here, vocab="align")


def test_a_token_that_the_tune_dropped_stays_the_targets(tmp_path: Path) -> None:
    fewer = PLAIN.replace('"w17":17,', "")
    here = world(tmp_path, (63, PLAIN), (63, fewer), (63, v.tokenizer(shuffled(WORDS), SPECIALS)))
    result, output, plan = put(here)
    row = v.tokens_of(output)["w17"]
    assert plan["vocabulary"][0]["left"]["tokens"] == ["w17"]
    assert torch.equal(result[v.EMBED][row], v.read(here.target)[v.EMBED][row])


def test_a_new_token_that_the_target_has_gets_the_tuned_models_row(tmp_path: Path) -> None:
    """But at scale 0, where all the target has stays."""
    more = v.tokenizer(WORDS, [*SPECIALS, "<new>"])
    there = v.tokenizer(shuffled(WORDS), [*SPECIALS, "<new>"])
    here = world(tmp_path, (63, PLAIN), (64, more), (64, there))
    result, output, plan = put(here)
    check_rows(here, result, output)
    assert plan["vocabulary"][0]["replaced"]["tokens"] == {"<new>": 63}
    assert "replaces the target's | 1 | `<new>`" in (output / "README.md").read_text()
    nothing, _, _ = put(here, scale=0.0)
    target = v.read(here.target)
    assert all(torch.equal(nothing[name], target[name]) for name in target)
    half, _, _ = put(here, scale={"*": 1.0, "*embed*": 0.0})
    assert torch.equal(half[v.EMBED], target[v.EMBED])
    assert torch.equal(half[v.HEAD], result[v.HEAD])


def test_a_row_that_one_delta_replaces_and_another_changes_is_refused(tmp_path: Path) -> None:
    more = v.tokenizer(WORDS, [*SPECIALS, "<new>"])
    here = world(tmp_path, (63, PLAIN), (64, more), (64, more))
    old = v.tensors(64)
    base = v.save(tmp_path / "base-2", old, more)
    tuned = v.save(tmp_path / "tuned-2", models.moved(old, seed=4), more)
    hubdiff.push_delta(tuned, tmp_path / "delta-2", base=base)
    with pytest.raises(
        CannotApply, match="brings a row of its own for '<new>' and delta-2 changes"
    ):
        hubdiff.apply([here.delta, tmp_path / "delta-2"], here.target, output=tmp_path / "out")


def test_ids_that_the_tokenizer_would_not_give_are_refused(tmp_path: Path) -> None:
    """The tokenizers library numbers new tokens on from the length of the vocabulary, whatever its
    largest id is."""
    words = {word: row for row, word in enumerate(shuffled(WORDS))}
    holes = v.Tokenizer(v.WordLevel({**words, "far": 66}, unk_token="w0"))
    holes.add_special_tokens(SPECIALS)
    more = v.tokenizer(WORDS, [*SPECIALS, "<new>"])
    here = world(tmp_path, (63, PLAIN), (64, more), (72, str(holes.to_str())))
    with pytest.raises(VocabularyMismatch, match="out some ids: its next token would get 64"):
        put(here)


def test_a_stopped_run_is_not_taken_for_one_of_another_mode(
    moved: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that it finished have other rows."""
    wanted, _, _ = put(moved)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr("hubdiff.jobs.apply._Apply._describe", stop)
        with pytest.raises(KeyboardInterrupt):
            hubdiff.apply(moved.delta, moved.target, output=output, vocab="rows", force=True)
    hubdiff.apply(moved.delta, moved.target, output=output, force=True)
    again = v.read(output)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_dare_draws_the_same_whatever_else_is_merged(moved: World) -> None:
    options = {"method": "dare", "density": 0.5, "vocab": "align"}
    whole, _, _ = put(moved, **options)
    parts = {}
    for name in (v.EMBED, v.HEAD):
        other = v.HEAD if name == v.EMBED else v.EMBED
        kept = {**v.read(moved.target)}
        v.save(moved.target, v.resized(kept, 70), (moved.target / "tokenizer.json").read_text())
        parts[name], _, _ = put(moved, include=[name], **options)
        assert torch.equal(parts[name][other], v.read(moved.target)[other])
        assert torch.equal(parts[name][name][:64], whole[name][:64])


def test_ties_keeps_its_share_of_the_rows_that_have_a_difference(tmp_path: Path) -> None:
    """A target twice as tall fills up with nothing, which is no part of Δ."""
    tall = v.tokenizer(WORDS, SPECIALS)
    here = world(tmp_path, (63, PLAIN), (63, PLAIN), (120, tall))
    result, _, plan = put(here, method="ties", density=0.2)
    target = v.read(here.target)
    assert plan["scratch"] == 0
    changed = int((result[v.EMBED] != target[v.EMBED]).sum())
    assert 0 < changed <= int(0.2 * 63 * 8)
    moved_tall = v.tokenizer(shuffled(WORDS), SPECIALS)
    v.save(here.target, target, moved_tall)
    again, _, plan = put(here, method="ties", density=0.2)
    assert plan["scratch"] > 0
    assert int((again[v.EMBED] != target[v.EMBED]).sum()) <= int(0.2 * 63 * 8)


# --- a stranger's manifest ---


def _other_rest(manifest: Any) -> None:
    rest = next(t for t in manifest["tensors"] if t["name"].endswith("[63:]"))
    rest["shape"] = [2, 4]


def _two_places(manifest: Any) -> None:
    manifest["rows"][v.HEAD]["shared"] = 62


def _unexplained(manifest: Any) -> None:
    del manifest["rows"][v.HEAD]


def _more_than_the_base(manifest: Any) -> None:
    manifest["rows"][v.EMBED]["base"] = 5


def _no_record(manifest: Any) -> None:
    manifest["rows"]["x"] = {"shared": 3, "base": 3, "rest": None}


def _a_scalar(manifest: Any) -> None:
    rest = next(t for t in manifest["tensors"] if t["name"].endswith("[63:]"))
    rest["shape"] = []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_rest, "behind those of"),
        (_two_places, "cut behind 62 rows, which no record has"),
        (_unexplained, "that no cut explains"),
        (_more_than_the_base, "shares 63 rows of 5"),
        (_no_record, "cut behind 3 rows, which no record has"),
        (_a_scalar, "behind those of"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(moved: World, damage: Any, words: str) -> None:
    file = moved.delta / "hubdiff.json"
    manifest = json.loads(file.read_text())
    damage(manifest)
    with pytest.raises(BadManifest, match=words):
        parse_manifest(json.dumps(manifest).encode(), "hubdiff.json")


@pytest.mark.parametrize("name", ["vocabulary.json.zst", "base-vocabulary.json.zst"])
def test_a_vocabulary_that_is_listed_must_be_there(moved: World, name: str) -> None:
    (moved.delta / name).unlink()
    with pytest.raises(BadManifest, match=f"{name} is missing"):
        put(moved)


# --- the modes ---


def test_strict_refuses_other_tokens(moved: World) -> None:
    with pytest.raises(VocabularyMismatch, match="not those of the base") as caught:
        put(moved, vocab="strict")
    assert "--vocab align" in str(caught.value.next_step)


def test_strict_is_content_where_the_target_has_the_tokens_of_the_base(tmp_path: Path) -> None:
    plain = v.tokenizer(WORDS, SPECIALS)
    here = world(tmp_path, (63, plain), (64, v.tokenizer(WORDS, [*SPECIALS, "<new>"])), (63, plain))
    strict, _, plan = put(here, vocab="strict")
    assert plan["vocabulary"][0]["mode"] == "strict"
    aligned, output, _ = put(here)
    check_rows(here, aligned, output)
    assert all(torch.equal(strict[name], aligned[name]) for name in aligned)


def test_rows_goes_by_number(moved: World) -> None:
    result, _, plan = put(moved, vocab="rows")
    base, tuned, target = (v.read(path) for path in moved[:3])
    for name in (v.EMBED, v.HEAD):
        wanted = v.exact(target[name][:63], tuned[name][:63], base[name])
        assert torch.equal(result[name][:63], wanted)
        assert torch.equal(result[name][63], tuned[name][63])
    assert plan["vocabulary"][0]["mode"] == "rows"


@pytest.mark.parametrize("side", ["target", "delta"])
def test_without_a_tokenizer_strict_is_the_default(tmp_path: Path, side: str) -> None:
    plain = v.tokenizer(WORDS, SPECIALS)
    ours, theirs = (None, plain) if side == "delta" else (plain, None)
    here = world(tmp_path, (63, ours), (63, ours), (70, theirs))
    with pytest.raises(VocabularyMismatch, match="63 rows in the delta and 70 in the target"):
        put(here)
    with pytest.raises(VocabularyMismatch, match=r"tokenizer .* can't be read"):
        put(here, vocab="align")
    result, _, _ = put(here, vocab="rows")
    assert torch.equal(result[v.EMBED][63:], v.read(here.target)[v.EMBED][63:])


def test_a_tokenizer_of_a_few_of_the_rows_is_a_doubt(tmp_path: Path) -> None:
    """A vocabulary that leaves most rows without a token is not that of the model."""
    few = v.tokenizer(WORDS[:20])
    here = world(tmp_path, (63, few), (63, few), (70, few))
    with pytest.raises(VocabularyMismatch, match="63 rows in the delta and 70 in the target"):
        put(here)
    put(here, vocab="align")  # who knows better may say so


def test_a_mode_that_is_none_is_refused(moved: World) -> None:
    with pytest.raises(CannotApply, match="no way 'alike'"):
        put(moved, vocab="alike")


# --- whatever else a model is ---


def test_tokens_of_the_tokenizers_own_rules_are_refused(tmp_path: Path) -> None:
    """Words of its model can't be put into another: its merges or scores would be missing."""
    here = world(
        tmp_path,
        (63, v.tokenizer(WORDS, SPECIALS)),
        (65, v.tokenizer([*WORDS[:60]], [*SPECIALS]).replace('"w59":59', '"w59":59,"x":63')),
        (64, v.tokenizer(shuffled(WORDS), [*SPECIALS, "<its own>"])),
    )
    with pytest.raises(VocabularyMismatch, match="1 tokens of the tuned model are no added") as e:
        put(here)
    assert "--vocab rows" in str(e.value.next_step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_new_rows_get_the_targets_dtype(moved: World, dtype: torch.dtype) -> None:
    wide = {name: tensor.to(dtype) for name, tensor in v.read(moved.target).items()}
    text = (moved.target / "tokenizer.json").read_text()
    v.save(moved.target, wide, text)
    result, _, _ = put(moved)
    tuned = v.read(moved.tuned)[v.EMBED]
    assert result[v.EMBED].dtype == dtype
    assert torch.equal(result[v.EMBED][64], tuned[63].to(dtype))


def test_a_tied_head_gets_the_same_rows(tmp_path: Path) -> None:
    """The target stores its tied head a second time: both copies stay equal."""
    plain = v.tokenizer(WORDS, SPECIALS)
    folder = tmp_path / "tied"
    folder.mkdir()
    old = {name: t for name, t in v.tensors(63).items() if name != v.HEAD}
    new = v.resized(models.moved(old), 64)
    base = v.save(folder / "base", old, plain, tie_word_embeddings=True)
    added = v.tokenizer(WORDS, [*SPECIALS, "<new>"])
    tuned = v.save(folder / "tuned", {**new, v.HEAD: new[v.EMBED].clone()}, added,
                   tie_word_embeddings=True)  # fmt: skip
    later = models.moved(old, step=1e-3, seed=9)
    other = v.tokenizer(shuffled(WORDS), SPECIALS)
    target = v.save(folder / "target", {**later, v.HEAD: later[v.EMBED].clone()}, other,
                    tie_word_embeddings=True)  # fmt: skip
    hubdiff.push_delta(tuned, folder / "delta", base=base)
    here = World(base, tuned, target, folder / "delta")
    assert verify(here.delta, base=base, tuned=tuned).rebuilt
    result, output, _ = put(here)
    assert torch.equal(result[v.EMBED], result[v.HEAD])
    assert len(result[v.EMBED]) == 64
    row = v.tokens_of(output)["<new>"]
    assert torch.equal(result[v.EMBED][row], new[v.EMBED][63])


def test_several_deltas_are_aligned_each(moved: World, tmp_path: Path) -> None:
    """Each Δ goes where its tokens are; only one delta may bring tokens of its own."""
    plain = v.tokenizer(WORDS, SPECIALS)
    other = v.save(tmp_path / "other", models.moved(v.read(moved.base), seed=4), plain)
    hubdiff.push_delta(other, tmp_path / "delta-2", base=moved.base)
    output = tmp_path / "both"
    hubdiff.apply([moved.delta, tmp_path / "delta-2"], moved.target, output=output, force=True)
    result, found = v.read(output)[v.EMBED], v.tokens_of(output)
    base, tuned, target = (v.read(path)[v.EMBED] for path in moved[:3])
    second, mine = v.read(other)[v.EMBED], v.tokens_of(moved.base)
    for token in WORDS:
        row, was = found[token], mine[token]
        deltas = (side[was].float() - base[was].float() for side in (tuned, second))
        wanted = target[row].float()
        for delta in deltas:
            wanted = wanted + delta
        assert torch.equal(result[row], wanted.to(torch.bfloat16))
    assert torch.equal(result[found["<new>"]], tuned[63])
    with pytest.raises(CannotApply, match="both change the target's tokens"):
        hubdiff.apply([moved.delta, moved.delta], moved.target, output=output, force=True)


@pytest.mark.parametrize("options", [{"method": "ties"}, {"method": "dare", "density": 0.5}])
def test_methods_work_on_aligned_rows(moved: World, options: dict[str, Any]) -> None:
    result, output, _ = put(moved, **options)
    tuned, target = v.read(moved.tuned)[v.EMBED], v.read(moved.target)[v.EMBED]
    found = v.tokens_of(output)
    assert torch.equal(result[v.EMBED][found["<new>"]], tuned[63])
    assert torch.equal(result[v.EMBED][found["<its own>"]], target[found["<its own>"]])
    assert not torch.equal(result[v.EMBED][:60], target[:60])


@pytest.mark.parametrize("options", [{"rank": 2}, {"plain": True}])
def test_any_encoding_is_laid_out(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = v.tokenizer(WORDS, SPECIALS)
    other = v.tokenizer(shuffled(WORDS), SPECIALS)
    here = world(tmp_path, (63, plain), (63, plain), (63, other), push=options)
    result, output, plan = put(here)
    assert plan["scratch"] > 0
    mine, found = v.tokens_of(here.tuned), v.tokens_of(output)
    with hubdiff.open_delta(here.delta) as delta:
        change = delta.get_tensor(v.EMBED)
    target = v.read(here.target)[v.EMBED]
    for token, row in found.items():
        wanted = (target[row].double() + change[mine[token]].double()).float()
        assert torch.allclose(result[v.EMBED][row].float(), wanted, rtol=2**-8)


def test_load_gives_what_apply_writes(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(93)]
    old = models.weights()
    base = models.save(
        tmp_path / "base", old, files={"tokenizer.json": v.tokenizer(words, SPECIALS)}
    )
    new = v.resized(models.moved(old), 97)
    more = v.tokenizer(words, [*SPECIALS, "<new>"])
    tuned = models.save(tmp_path / "tuned", new, files={"tokenizer.json": more}, vocab_size=97)
    other = v.tokenizer(shuffled(words), SPECIALS)
    later = models.moved(old, step=1e-3, seed=9)
    target = models.save(tmp_path / "target", later, files={"tokenizer.json": other})
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    hubdiff.apply(tmp_path / "delta", target, output=tmp_path / "result", force=True)
    written = LlamaForCausalLM.from_pretrained(tmp_path / "result", dtype=torch.bfloat16)
    loaded = hubdiff.load(tmp_path / "delta", target, dtype=torch.bfloat16)
    assert loaded.config.vocab_size == 97
    for name, tensor in written.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_partial_delta_is_aligned_too(tmp_path: Path) -> None:
    plain, other = v.tokenizer(WORDS, SPECIALS), v.tokenizer(shuffled(WORDS), SPECIALS)
    push = {"include": [v.EMBED]}
    more = v.tokenizer(WORDS, [*SPECIALS, "<new>"])
    here = world(tmp_path, (63, plain), (64, more), (63, other), push=push)
    found = verify(here.delta, base=here.base)
    assert found.base_tensors == 1
    with pytest.raises(VocabularyMismatch, match=r"need 64 rows, and lm_head\.weight .* keep 63"):
        put(here)
    v.save(here.target, v.resized(v.read(here.target), 70), other)  # there is a row for it
    result, output, _ = put(here)
    row = v.tokens_of(output)["<new>"]
    assert torch.equal(result[v.EMBED][row], v.read(here.tuned)[v.EMBED][63])
    assert torch.equal(result[v.HEAD], v.read(here.target)[v.HEAD])


def test_deeper_and_wider_targets_are_refused_and_named(tmp_path: Path) -> None:
    old = models.weights()
    base = models.save(tmp_path / "base", old)
    tuned = models.save(tmp_path / "tuned", models.moved(old))
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    more = {
        name.replace(".1.", ".2."): t.clone() for name, t in old.items() if ".layers.1." in name
    }
    deep = models.save(tmp_path / "deep", {**old, **more}, num_hidden_layers=3)
    with pytest.raises(ShapeMismatch, match="has 3 layers, the base of the delta, base, has 2"):
        hubdiff.apply(tmp_path / "delta", deep, output=tmp_path / "result")
    wide = models.save(tmp_path / "wide", {n: torch.cat([t, t], -1) for n, t in old.items()})
    with pytest.raises(ShapeMismatch, match=r"is \[96, 64\] in the delta and \[96, 128\] in the"):
        hubdiff.apply(tmp_path / "delta", wide, output=tmp_path / "result")


def test_check_tells_of_tokens_that_are_aligned(moved: World) -> None:
    found = {item.subject: item for item in hubdiff.check(moved.delta, moved.target).findings}
    assert found["tokens"].state == "differs"
    assert "63 tokens matched" in found["tokens"].text
    assert "rows of the vocabulary only" in found["shapes"].text
    refused = hubdiff.check(moved.delta, moved.target, vocab="strict")
    assert refused.verdict.level == "refuse"


def test_the_forecast_compares_rows_of_one_token(tmp_path: Path) -> None:
    """The target is the base with its rows in another order: compared by token it is the same."""
    plain, other = v.tokenizer(WORDS, SPECIALS), v.tokenizer(shuffled(WORDS), SPECIALS)
    here = world(tmp_path, (63, plain), (63, plain), (63, other), width=256)
    old, mine = v.read(here.base), v.tokens_of(here.base)
    order = [
        mine[token] for token, _ in sorted(v.tokens_of(here.target).items(), key=lambda i: i[1])
    ]
    permuted = {n: t[order].clone() if n != v.NORM else t for n, t in old.items()}
    v.save(here.target, permuted, other)
    assert cosine(here, None) > 0.9999
    assert cosine(here, "rows") < 0.5


def cosine(here: World, mode: str | None) -> float:
    forecast = hubdiff.check(here.delta, here.target, vocab=mode).forecast
    assert forecast is not None
    assert forecast.cosine is not None
    return forecast.cosine
