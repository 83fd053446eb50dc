"""A LoRA adapter as the tuned model: factors kept, added to any base, and given back byte for byte.
Every adapter here was made and saved by PEFT."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import on_hub
import oracle
import pytest
import torch
from models import hashes
from on_hub import NewName, PutRepo, contents
from peft_models import Adapted, adapted, gpt2, llama, load, logits
from safetensors.torch import load_file, save_file
from test_delta_battery import segments_of

import hubdiff
from hubdiff.devhub import DevHub
from hubdiff.errors import (
    BadManifest,
    CannotApply,
    CannotDiff,
    CorruptPayload,
    HubdiffError,
    IntegrityError,
    NoWeights,
    WrongBase,
)

Edit = Callable[[dict[str, Any]], object]
Make = Callable[[Path], Adapted]

KINDS: dict[str, Make] = {
    "llama": lambda f: adapted(f, llama(), target_modules="all-linear"),
    "llama, bf16 base": lambda f: adapted(
        f, llama(), dtype="bfloat16", target_modules=["q_proj", "down_proj", "lm_head"]
    ),
    "llama, rsLoRA and patterns": lambda f: adapted(
        f,
        llama(),
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 1, r"^model\.layers\.[0-9]+\..*v_proj": 2},
        alpha_pattern={"v_proj": 7},
    ),
    "llama, embedding and a whole head": lambda f: adapted(
        f, llama(), target_modules=["embed_tokens", "o_proj"], modules_to_save=["lm_head", "norm"]
    ),
    "gpt2": lambda f: adapted(f, gpt2(), target_modules=["c_attn", "c_proj", "c_fc"]),
    "gpt2, trained biases": lambda f: adapted(
        f, gpt2(), target_modules=["c_attn"], bias="all", modules_to_save=["wpe"]
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS, ids=KINDS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Adapted:
    return KINDS[request.param](tmp_path)


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """An adapter for q_proj; with its delta beside it."""
    made = adapted(tmp_path_factory.mktemp("simple"), llama(), target_modules=["q_proj"])
    hubdiff.push_delta(made.adapter, made.adapter.parent / "delta", base=made.base)
    return made


def factors_of(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, bool]]:
    """Module → lora_A, lora_B and whether it is an embedding."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_(embedding_)?A(\.weight)?", name)
        if match:
            other = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            found[match[1]] = (tensor, other, bool(match[2]))
    return found


def expected_delta(made: Adapted, module: str) -> list[Fraction | float]:
    """Δ of a module's weight as FORMAT.md defines it, from PEFT's own scaling and shapes."""
    a, b, embedding = factors_of(made.adapter)[module]
    layer = made.model.base_model.model.get_submodule(module)
    left, right = (a.T, b.T) if embedding or layer.fan_in_fan_out else (b, a)
    total = np.zeros((left.shape[0], right.shape[1]))
    for k in range(left.shape[1]):
        total += left[:, k, None].double().numpy() * right[k].double().numpy()
    numbers = (total * layer.scaling["default"]).astype(np.float32)
    return [Fraction(float(number)) for number in numbers.reshape(-1)]


# --- added ---


def test_on_its_base_it_is_what_peft_makes_of_it(made: Adapted, tmp_path: Path) -> None:
    hubdiff.push_delta(made.adapter, tmp_path / "delta", base=made.base)
    applied = hubdiff.apply(tmp_path / "delta", made.base, output=tmp_path / "out")
    assert applied.plan["case"] == "transfer"
    assert "adapter" in applied.plan["reason"]
    ours = logits(load(tmp_path / "out"))
    start, unmerged = logits(load(made.base)), logits(made.model)
    merged = logits(made.model.merge_and_unload())
    # In bf16 the merged weights are rounded, and PEFT rounds the product before it adds it.
    close = 1e-4 if made.model.dtype == torch.float32 else 0.1
    for theirs in (unmerged, merged):
        assert (ours - theirs).abs().max() < close * (start - theirs).abs().max()


@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_every_bit_is_the_sum_rounded_once(made: Adapted, tmp_path: Path, scale: float) -> None:
    hubdiff.push_delta(made.adapter, tmp_path / "delta", base=made.base)
    target = tmp_path / "target"
    shutil.copytree(made.base, target)
    base = load_file(target / "model.safetensors")
    other = {n: (t.float() * 1.01 - 0.003).to(torch.bfloat16) for n, t in base.items()}
    save_file(other, target / "model.safetensors", metadata={"format": "pt"})
    hubdiff.apply(tmp_path / "delta", target, output=tmp_path / "out", scale=scale)
    result = load_file(tmp_path / "out" / "model.safetensors")
    modules = factors_of(made.adapter)
    assert modules
    for module in modules:
        name = f"{module}.weight"
        delta = expected_delta(made, module)
        expected = oracle.added(other[name], delta, scale, torch.bfloat16)
        assert oracle.same_numbers(result[name], expected), name
        with hubdiff.open_delta(tmp_path / "delta") as opened:
            assert oracle.same_numbers(opened.get_tensor(name), [float(d) for d in delta])
    touched = {f"{module}.weight" for module in modules}
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    whole = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in tensors}
    for name in set(result) - touched - whole:
        assert torch.equal(result[name], other[name])


def test_whole_tensors_arrive_whole(tmp_path: Path) -> None:
    made = KINDS["llama, embedding and a whole head"](tmp_path)
    hubdiff.push_delta(made.adapter, tmp_path / "delta", base=made.base)
    hubdiff.apply(tmp_path / "delta", made.base, output=tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    trained = load_file(made.adapter / "adapter_model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        step = result[name] - trained[f"base_model.model.{name}"]
        # Δ in float32 and one rounding of the sum: a last digit, not the bf16 of a packed Δ.
        assert step.abs().max() <= trained[f"base_model.model.{name}"].abs().max() * 2**-23


def test_an_element_that_the_factors_leave_alone_keeps_its_bits(tmp_path: Path) -> None:
    made = adapted(tmp_path, llama(), target_modules=["q_proj"])
    weights = load_file(made.adapter / "adapter_model.safetensors")
    for name, tensor in weights.items():
        if "lora_B" in name:
            tensor[::2] = 0.0
    save_file(weights, made.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    base = load_file(made.base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    base[name][0, :2] = torch.tensor([-0.0, 0.0])
    save_file(base, made.base / "model.safetensors", metadata={"format": "pt"})
    hubdiff.push_delta(made.adapter, tmp_path / "delta", base=made.base)
    hubdiff.apply(tmp_path / "delta", made.base, output=tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(oracle.bits(result[::2]), oracle.bits(base[name][::2]))
    assert not torch.equal(result[1], base[name][1])


def test_dare_draws_for_each_adapter_anew(simple: Adapted, tmp_path: Path) -> None:
    """Two adapters of one base have no tuned tensor to tell them apart by, but their factors."""
    other = tmp_path / "other"
    shutil.copytree(simple.adapter, other)
    factors = load_file(other / "adapter_model.safetensors")
    doubled = {name: 2 * tensor for name, tensor in factors.items()}
    save_file(doubled, other / "adapter_model.safetensors", metadata={"format": "pt"})
    hubdiff.push_delta(other, tmp_path / "other-delta", base=simple.base)
    before = load_file(simple.base / "model.safetensors")
    kept = []
    for number, delta in enumerate((simple.adapter.parent / "delta", tmp_path / "other-delta")):
        result = tmp_path / str(number)
        hubdiff.apply(delta, simple.base, output=result, method="dare", density=0.3)
        after = load_file(result / "model.safetensors")
        (name, *_) = [name for name in before if name.endswith("q_proj.weight")]
        kept.append(before[name] != after[name])
    assert 0.2 < kept[0].float().mean() < 0.4
    assert (kept[0] == kept[1]).float().mean() < 0.8


def test_a_tensor_of_many_blocks_reads_its_factors_once(
    simple: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubdiff.files import LocalReader

    reads: list[tuple[str, int, int]] = []
    real = LocalReader.read_into

    def spy(self: LocalReader, offset: int, buffer: memoryview) -> None:
        if self._path.name.startswith("delta-"):
            reads.append((self._path.name, offset, len(buffer)))
        real(self, offset, buffer)

    delta = simple.adapter.parent / "delta"
    hubdiff.apply(delta, simple.base, output=tmp_path / "whole")
    monkeypatch.setattr(LocalReader, "read_into", spy)
    with segments_of(7, 64):  # 256 elements a tensor: many blocks, cut across the rows
        hubdiff.apply(delta, simple.base, output=tmp_path / "cut")
        assert hubdiff.verify(delta).tensors == 2
    same = hashes(tmp_path / "whole")
    assert same["model.safetensors"] == hashes(tmp_path / "cut")["model.safetensors"]
    payloads = [read for read in reads if read[2] == (16 + 16) * 3 * 4]
    assert len(payloads) == 4  # two tensors, by apply and by verify
    assert len(set(payloads)) == 2


def test_a_base_with_other_prefixes_is_matched(tmp_path: Path) -> None:
    made = adapted(tmp_path, gpt2(), target_modules=["c_attn"])
    base = load_file(made.base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in base.items()}
    save_file(short, made.base / "model.safetensors", metadata={"format": "pt"})
    hubdiff.push_delta(made.adapter, tmp_path / "delta", base=made.base)
    hubdiff.apply(tmp_path / "delta", made.base, output=tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - logits(made.model)).abs().max() < 1e-5


def test_a_convolution(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = ViTConfig(num_hidden_layers=1, image_size=8, patch_size=4, **sizes)
    ViTModel(config).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        ViTModel.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules=["projection"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    hubdiff.push_delta(tmp_path / "adapter", tmp_path / "delta", base=tmp_path / "base")
    hubdiff.apply(tmp_path / "delta", tmp_path / "base", output=tmp_path / "out")
    pixels = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    with torch.no_grad():
        theirs = model.eval()(pixels).last_hidden_state
        ours = ViTModel.from_pretrained(tmp_path / "out").eval()(pixels).last_hidden_state
    assert (ours - theirs).abs().max() < 1e-5
    hubdiff.export(tmp_path / "delta", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "adapter")


# --- given back ---


def test_the_adapter_comes_back_byte_for_byte(made: Adapted, tmp_path: Path) -> None:
    (made.adapter / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copy(made.base / "config.json", made.adapter / "config.json")  # as the base has it
    hubdiff.push_delta(made.adapter, tmp_path / "delta", base=made.base)
    exported = hubdiff.export(tmp_path / "delta", tmp_path / "again", base=made.base)
    assert exported.same_files
    assert hashes(tmp_path / "again") == hashes(made.adapter)


def test_a_base_is_asked_for_only_where_it_is_needed(tmp_path: Path) -> None:
    for name in ("llama", "llama, embedding and a whole head"):
        made = KINDS[name](tmp_path / name)
        delta = tmp_path / name / "delta"
        hubdiff.push_delta(made.adapter, delta, base=made.base)
        if name == "llama":
            hubdiff.export(delta, tmp_path / name / "again")
            continue
        with pytest.raises(CannotApply, match="local folder") as caught:
            hubdiff.export(delta, tmp_path / name / "again")
        assert "--base" in (caught.value.next_step or "")
        base = load_file(made.base / "model.safetensors")
        base["lm_head.weight"][0, 0] += 1
        save_file(base, made.base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WrongBase, match=r"lm_head\.weight"):
            hubdiff.export(delta, tmp_path / name / "again", base=made.base)
        assert not (tmp_path / name / "again").exists()


def test_it_is_verified_unpacked_and_described(simple: Adapted, tmp_path: Path) -> None:
    delta = simple.adapter.parent / "delta"
    verified = hubdiff.verify(delta, base=simple.base, tuned=simple.adapter)
    assert (verified.tensors, verified.base_tensors, verified.rebuilt) == (2, 2, None)
    assert verified.tuned_files == len(hashes(simple.adapter))
    hubdiff.unpack(delta, tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "delta.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    numbers = [float(number) for number in expected_delta(simple, name)]
    assert oracle.same_numbers(dense[f"{name}.weight"], numbers)
    seen = hubdiff.inspect(delta)
    assert seen.as_json()["adapter"] is True
    assert seen.summary.relative_norm is not None
    part = seen.manifest.tensors[0].parts[0]
    assert part.low_rank is not None
    assert (part.encoding, part.low_rank.rank, part.low_rank.alpha) == ("low-rank", 3, 5.0)
    assert part.low_rank.scale == 5 / 3
    norm = np.sqrt(sum(float(n) ** 2 for n in expected_delta(simple, name)))
    assert np.isclose(hubdiff.inspect(delta).manifest.tensors[1].delta_norm, norm, rtol=1e-6)
    card = (delta / "README.md").read_text()
    assert "LoRA adapter" in card
    assert "hubdiff export" in card


# --- on the Hub ---


def test_pushed_to_and_applied_from_the_hub(
    devhub: DevHub, put_repo: PutRepo, new_name: NewName, tmp_path: Path
) -> None:
    # With a whole tensor: to write the adapter again takes the base, at the commit it was.
    lora = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]}
    made = adapted(tmp_path, llama(), **lora)
    base = put_repo(contents(made.base))
    config = made.adapter / "adapter_config.json"
    said = json.loads(config.read_text()) | {"base_model_name_or_path": base}
    config.write_text(json.dumps(said))
    adapter, delta = put_repo(contents(made.adapter)), new_name()
    pushed = hubdiff.push_delta(adapter, delta)
    assert pushed.base == f"{base}@{on_hub.head(devhub, base)}"
    devhub.log.clear()
    hubdiff.apply(delta, base, output=tmp_path / "out")
    parts = [part for r in hubdiff.inspect(delta).manifest.tensors for part in r.parts]
    assert {part.encoding for part in parts} == {"low-rank", "plain"}
    payloads = sum(part.bytes for part in parts if part.group == "delta")
    header = on_hub.served(devhub, delta, "delta-*.safetensors") - payloads
    assert 0 < header < 3000  # every factor once, and the header
    assert (logits(load(tmp_path / "out")) - logits(made.model)).abs().max() < 1e-5
    hubdiff.export(delta, tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(made.adapter)


@pytest.mark.parametrize("named", ["/srv/models/base", "./base", None, ""])
def test_a_config_chooses_no_folder_of_this_disk(
    simple: Adapted, tmp_path: Path, named: str | None
) -> None:
    edited = edit_config(simple, tmp_path, lambda c: c.update(base_model_name_or_path=named))
    refused(edited, None, CannotDiff, "base model", "--base")


# --- refused ---


def edit_config(made: Adapted, folder: Path, edit: Edit) -> Path:
    shutil.copytree(made.adapter, folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))
    return folder / "adapter"


def edit_tensors(made: Adapted, folder: Path, edit: Edit) -> Path:
    shutil.copytree(made.adapter, folder / "adapter")
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder / "adapter"


def refused(
    adapter: Path, base: Path | None, kind: type[HubdiffError], *words: str, **options: Any
) -> None:
    with pytest.raises(kind) as caught:
        hubdiff.push_delta(adapter, adapter.parent / "refused", base=base, **options)
    text = f"{caught.value} {caught.value.next_step}"
    assert all(word in text for word in words), text
    assert caught.value.next_step
    assert not [p for p in adapter.parent.iterdir() if "refused" in p.name]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"some_new_variant": {"x": 1}}, "some_new_variant"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 4}, "rank 3"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    simple: Adapted, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    edited = edit_config(simple, tmp_path, lambda c: c.update(change))
    refused(edited, simple.base, CannotDiff, word)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(.*)*q_proj", "*", "(" * 10, ".*" * 9, "x" * 600])
def test_a_pattern_that_could_hang_is_refused(
    simple: Adapted, tmp_path: Path, pattern: str
) -> None:
    edited = edit_config(simple, tmp_path, lambda c: c.update(alpha_pattern={pattern: 2}))
    refused(edited, simple.base, CannotDiff, "alpha_pattern", "regular expression")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), ("q_proj", "no lora_B")),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 8)}), ("q_proj", "shape")),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(16, 4)}), ("q_proj", "shape")),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 16).half()}), ("F16 and F32",)),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(3)}), ("magnitude",)),
        (lambda t: t.update({"x.lora_A.weight": torch.ones(3)}), ("base_model.model",)),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.full((3, 16), torch.nan)}), ("NaN",)),
        (
            lambda t: t.update({k.replace("q_proj", "z_proj"): t.pop(k) for k in list(t)}),
            ("z_proj", "does not have"),
        ),
        (lambda t: t.clear(), ("no tensors",)),
    ],
)
def test_factors_that_fit_nothing_are_refused(
    simple: Adapted, tmp_path: Path, edit: Edit, words: tuple[str, ...]
) -> None:
    refused(edit_tensors(simple, tmp_path, edit), simple.base, CannotDiff, *words)


def test_a_copy_of_the_embedding_must_be_the_bases(tmp_path: Path) -> None:
    made = adapted(tmp_path / "made", llama(), target_modules=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    edited = edit_tensors(made, tmp_path, lambda t: t[name].__setitem__((0, 0), 9.0))
    refused(edited, made.base, CannotDiff, "embed_tokens", "resized or trained")


def test_factors_of_a_tied_head_are_refused(tmp_path: Path) -> None:
    tied = llama(tie_word_embeddings=True)
    made = adapted(tmp_path, tied, target_modules=["lm_head"])
    refused(made.adapter, made.base, CannotDiff, "lm_head", "ties it")


def test_a_square_matrix_whose_side_cant_be_told_is_refused(
    tmp_path: Path,
) -> None:
    made = adapted(tmp_path / "made", gpt2(), target_modules=["c_attn", "c_proj"])
    edited = edit_config(made, tmp_path, lambda c: c.update(fan_in_fan_out=False))
    refused(edited, made.base, CannotDiff, "square", "fan_in_fan_out")


def test_a_pickle_is_not_opened(simple: Adapted, tmp_path: Path) -> None:
    shutil.copytree(simple.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    refused(tmp_path / "adapter", simple.base, NoWeights, "adapter_model.bin", "run code")
    file.with_suffix(".bin").unlink()
    refused(tmp_path / "adapter", simple.base, NoWeights, "no adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    file.write_bytes((simple.adapter / "adapter_model.safetensors").read_bytes())
    refused(tmp_path / "adapter", simple.base, NoWeights, "no adapter_config.json")


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"energy": 0.5}, {"plain": True}, {"include": "*q_proj*"}]
)
def test_an_adapter_is_published_as_it_is(
    simple: Adapted, tmp_path: Path, options: dict[str, Any]
) -> None:
    shutil.copytree(simple.adapter, tmp_path / "adapter")
    refused(tmp_path / "adapter", simple.base, CannotDiff, "published whole", **options)


# --- damaged ---


@pytest.fixture
def damaged(simple: Adapted, tmp_path: Path) -> Path:
    shutil.copytree(simple.adapter.parent / "delta", tmp_path / "delta")
    return tmp_path / "delta"


def edit_part(delta: Path, edit: Edit) -> None:
    document = json.loads((delta / "hubdiff.json").read_text())
    edit(document["tensors"][0]["parts"][0])
    (delta / "hubdiff.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (lambda p: p["low_rank"].update(rank=4), BadManifest, ("rank 4", "512")),
        (lambda p: p["low_rank"].update(rank=0), BadManifest, ("rank",)),
        (lambda p: p["low_rank"].update(rank=10**12), BadManifest, ("bytes of factors",)),
        (lambda p: p["low_rank"].update(scale="1"), BadManifest, ("scale",)),
        (lambda p: p["low_rank"].update(dtype="F64"), BadManifest, ("dtype",)),
        (lambda p: p.update(bytes=383), BadManifest, ("383",)),
        (lambda p: p.update(dtype="BF16"), BadManifest, ("F32",)),
        (lambda p: p.pop("low_rank"), BadManifest, ("low_rank",)),
        (lambda p: p.update(encoding="planes"), CorruptPayload, ("planes",)),
        (lambda p: p.update(encoding="wavelets"), CorruptPayload, ("wavelets", "Upgrade")),
        (lambda p: p.update(blake3="0" * 64), IntegrityError, ("q_proj",)),
    ],
)
def test_a_wrong_manifest_is_refused(
    damaged: Path,
    simple: Adapted,
    tmp_path: Path,
    edit: Edit,
    kind: type[HubdiffError],
    words: tuple[str, ...],
) -> None:
    edit_part(damaged, edit)
    with pytest.raises(kind) as caught:
        hubdiff.apply(damaged, simple.base, output=tmp_path / "out")
    text = f"{caught.value} {caught.value.next_step}"
    assert all(word in text for word in words), text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "kind"), [(b"\0\0\xc0\x7f", CorruptPayload), (b"\1\2\3\4", IntegrityError)]
)
def test_a_wrong_payload_is_refused(
    damaged: Path, simple: Adapted, tmp_path: Path, data: bytes, kind: type[HubdiffError]
) -> None:
    (file,) = damaged.glob("delta-*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + data)
    with pytest.raises(kind):
        hubdiff.apply(damaged, simple.base, output=tmp_path / "out")
    with pytest.raises(IntegrityError):
        hubdiff.export(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
