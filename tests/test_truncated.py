"""--rank and --energy: a truncated Δ, its error measured, and the adapter it becomes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import hashes, moved, save, weights
from peft import PeftModel
from peft_models import gpt2, llama, load, logits
from safetensors.torch import load_file, save_file

import hubdiff
from hubdiff.errors import CannotDiff, CannotExport, IntegrityError, WrongBase
from hubdiff.jobs.push import Pushed
from hubdiff.manifest import Manifest
from hubdiff.truncate import Truncation, truncate

FULL = 10**9  # bytes that any factors are below


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib would take most of the time."""
    monkeypatch.setattr("hubdiff.jobs.making.layer_picture", lambda *_: None)


def pair(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """A base and a full fine-tune whose matrices have singular values that fall off."""
    old = weights(dtype=dtype)
    new = moved(old, step=1e-4)
    torch.manual_seed(5)
    for name, tensor in new.items():
        if tensor.dim() == 2:
            left, right = torch.randn(tensor.shape[0], 3), torch.randn(3, tensor.shape[1])
            new[name] = (tensor.float() + 1e-3 * left @ right).to(dtype)
        else:
            new[name] = (tensor.float() + 1e-3).to(dtype)
    return save(folder / "base", old), save(folder / "tuned", new)


def manifest(delta: Path) -> Manifest:
    return hubdiff.inspect(delta).manifest


def push(folder: Path, base: Path, tuned: Path, **options: Any) -> Pushed:
    return hubdiff.push_delta(tuned, folder, base=base, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [{"rank": 3}, {"energy": 0.8}], ids=["rank", "energy"])
def test_the_error_is_the_one_that_anyone_can_measure(
    tmp_path: Path, dtype: torch.dtype, wanted: dict[str, Any]
) -> None:
    base, tuned = pair(tmp_path, dtype)
    push(tmp_path / "delta", base, tuned, **wanted)
    old, new = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    missing = total = 0.0
    with hubdiff.open_delta(tmp_path / "delta") as delta:
        factored = 0
        for record in delta.manifest.tensors:
            exact = new[record.name].double() - old[record.name].double()
            stored = delta.get_tensor(record.name).double()
            lost = float((exact - stored).norm())
            part = record.part("delta")
            assert part is not None
            if part.low_rank is None:
                assert len(record.shape) == 1
                # A float32 Δ is packed in bf16; the others exactly.
                assert lost <= float(exact.norm()) * (2**-8 if dtype == torch.float32 else 1e-7)
                total += float(exact.norm()) ** 2
                continue
            factored += 1
            said = part.low_rank
            # Δ is rounded to float32 before it is factorised.
            assert math.isclose(said.error, lost / float(exact.norm()), rel_tol=1e-4)
            values = torch.linalg.svdvals(exact)
            kept = float((values[: said.rank] ** 2).sum() / (values**2).sum())
            assert said.energy is not None
            assert math.isclose(said.energy, kept, rel_tol=1e-6)
            best = math.sqrt(1 - kept)
            assert best * (1 - 1e-6) <= said.error <= 1.02 * best  # no factors do better
            if "energy" in wanted:
                assert 1 - said.error**2 >= wanted["energy"]
                less = values[: said.rank - 1] ** 2
                assert float(less.sum() / (values**2).sum()) < wanted["energy"] + 0.02
            else:
                assert said.rank == 3
            missing, total = missing + lost**2, total + float(exact.norm()) ** 2
        lossy = delta.manifest.lossy
        assert lossy is not None
        assert math.isclose(lossy.error, math.sqrt(missing / total), rel_tol=1e-3)
        assert factored == sum(len(tensor.shape) == 2 for tensor in old.values())


def test_the_result_is_the_target_plus_the_product(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    push(tmp_path / "delta", base, tuned, rank=3)
    applied = hubdiff.apply(tmp_path / "delta", base, output=tmp_path / "out", scale=0.5)
    assert applied.plan["case"] == "transfer"
    old, result = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    with hubdiff.open_delta(tmp_path / "delta") as delta:
        for name in old:
            if old[name].dim() == 2:  # both are float32 at the most: float64 holds the sum
                step = delta.get_tensor(name).double()
                assert torch.equal(result[name], (old[name].double() + 0.5 * step).bfloat16())


def test_it_is_smaller_and_says_what_it_lost(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    packed = push(tmp_path / "packed", base, tuned)
    pushed = push(tmp_path / "delta", base, tuned, rank=3)
    assert pushed.delta_bytes < packed.delta_bytes / 2
    lossy = manifest(tmp_path / "delta").lossy
    assert lossy is not None
    assert pushed.as_json()["error"] == lossy.error > 0
    assert hubdiff.inspect(tmp_path / "delta").as_json()["lossy"]["error"] == lossy.error
    assert hubdiff.inspect(tmp_path / "delta").as_json()["rebuilds_tuned"] is False
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "can't give the tuned model again" in card
    assert "| Tensor | Rank | Factors | Error |" in card
    assert card.count("| BF16 |") == 10  # the worst ones
    assert packed.as_json()["error"] is None


def test_it_rebuilds_nothing(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    push(tmp_path / "delta", base, tuned, rank=3)
    applied = hubdiff.apply(tmp_path / "delta", base, output=tmp_path / "out")
    assert applied.plan["case"] == "transfer"
    assert "lossy" in applied.plan["reason"]
    verified = hubdiff.verify(tmp_path / "delta", base=base, tuned=tuned)
    assert verified.rebuilt is None
    assert "lossy" in (verified.why or "")
    save_file(
        {n: t + 1 for n, t in load_file(base / "model.safetensors").items()},
        base / "model.safetensors",
    )
    with pytest.raises(WrongBase):
        hubdiff.verify(tmp_path / "delta", base=base)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    for name in ("one", "two"):
        push(tmp_path / name, base, tuned, energy=0.9)
    one, two = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    del one["README.md"], two["README.md"]  # it says the folder's name
    assert one == two
    assert not [path for path in one if "scratch" in path]


def test_masters_are_what_is_factorised(tmp_path: Path) -> None:
    base = save(tmp_path / "base", weights())
    fine = {n: t.float() for n, t in weights().items()}
    torch.manual_seed(2)
    for name, tensor in fine.items():
        if tensor.dim() == 2:  # below what bf16 can hold
            step = torch.randn(tensor.shape[0], 1) @ torch.randn(1, tensor.shape[1])
            fine[name] = tensor + 1e-6 * step
    fine["model.embed_tokens.weight"] += 0.01
    master = save(tmp_path / "master", fine)
    tuned = save(tmp_path / "tuned", {n: t.bfloat16() for n, t in fine.items()})
    push(tmp_path / "delta", base, tuned, rank=1, tuned_master=master)
    with hubdiff.open_delta(tmp_path / "delta") as delta:
        name = "model.layers.0.mlp.up_proj.weight"
        part = delta.records[name].part("delta")
        assert part is not None
        assert part.low_rank is not None
        step = fine[name].double() - weights()[name].double()
        assert (delta.get_tensor(name).double() - step).norm() < 0.05 * step.norm()


# --- as an adapter ---


def tune(folder: Path, model: torch.nn.Module) -> tuple[Path, Path]:
    model.save_pretrained(folder / "base")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                one, other = torch.randn(len(parameter), 2), torch.randn(2, parameter.shape[1])
                parameter += 0.02 * one @ other + 0.001 * torch.randn_like(parameter)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (llama, {"rank": 2}),
        (llama, {"energy": 0.95}),
        (lambda: llama(tie_word_embeddings=True), {"rank": 2}),
        (gpt2, {"rank": 2}),
    ],
    ids=["llama", "llama by energy", "tied llama", "gpt2"],
)
def test_peft_loads_it_and_its_outputs_match(
    tmp_path: Path, make: Any, wanted: dict[str, Any]
) -> None:
    base, tuned = tune(tmp_path, make())
    push(tmp_path / "delta", base, tuned, **wanted)
    exported = hubdiff.export(tmp_path / "delta", tmp_path / "adapter")
    assert not exported.same_files
    assert exported.left_out == ()
    hubdiff.apply(tmp_path / "delta", base, output=tmp_path / "out")
    ours, start = logits(load(tmp_path / "out")), logits(load(base))
    adapted = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter"))
    theirs = logits(adapted)
    assert (ours - theirs).abs().max() < 1e-4 * (ours - start).abs().max()
    if exported.notes:
        assert "without merging" in exported.notes[0]
        return
    assert (ours - logits(adapted.merge_and_unload())).abs().max() < 1e-4
    # What it became can be published again, now as an adapter, and means the same.
    hubdiff.push_delta(tmp_path / "adapter", tmp_path / "again", base=base)
    hubdiff.apply(tmp_path / "again", base, output=tmp_path / "same")
    files = [load_file(tmp_path / f / "model.safetensors") for f in ("out", "same")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_ranks_that_differ_are_told_to_peft(tmp_path: Path) -> None:
    base, tuned = tune(tmp_path, llama())
    push(tmp_path / "delta", base, tuned, energy=0.999)
    hubdiff.export(tmp_path / "delta", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(set(config["rank_pattern"].values())) > 1
    model = PeftModel.from_pretrained(load(base), str(tmp_path / "adapter"))
    ranks = {
        name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "r")
    }
    for record in manifest(tmp_path / "delta").tensors:
        for part in record.parts:
            if part.low_rank:
                module = f"base_model.model.{record.name.removesuffix('.weight')}"
                assert ranks[module] == part.low_rank.rank


def test_what_cant_be_in_an_adapter_is_listed_with_its_share(tmp_path: Path) -> None:
    base, tuned = tune(tmp_path, llama())
    new = load_file(tuned / "model.safetensors")
    new["model.norm.weight"] += 0.5
    save_file(new, tuned / "model.safetensors", metadata={"format": "pt"})
    push(tmp_path / "delta", base, tuned, rank=2)
    exported = hubdiff.export(tmp_path / "delta", tmp_path / "adapter")
    (left,) = exported.left_out
    assert left.name == "model.norm.weight"
    old = load_file(base / "model.safetensors")
    norms = {n: float((new[n].double() - old[n].double()).norm()) ** 2 for n in new}
    assert math.isclose(left.share, norms[left.name] / sum(norms.values()), rel_tol=1e-3)
    assert exported.as_json()["left_out"][0]["name"] == left.name


def test_a_packed_delta_is_no_adapter(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    push(tmp_path / "delta", base, tuned)
    with pytest.raises(CannotExport, match="no factors") as caught:
        hubdiff.export(tmp_path / "delta", tmp_path / "adapter")
    assert "--rank" in (caught.value.next_step or "")
    assert not (tmp_path / "adapter").exists()


def test_a_base_that_nobody_knows_cant_be_exported_for(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    (base / "config.json").write_text('{"architectures": ["SecretModel"], "model_type": "llama"}')
    push(tmp_path / "delta", base, tuned, rank=3)
    with pytest.raises(CannotExport, match="SecretModel"):
        hubdiff.export(tmp_path / "delta", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"hidden_act": "zzz"},
        {"vocab_size": -1},
        {"pad_token_id": 10**6},
    ],
    ids=str,
)
def test_a_base_whose_config_makes_no_sense_cant_be_exported_for(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    base, tuned = pair(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    push(tmp_path / "delta", base, tuned, rank=3)
    with pytest.raises(CannotExport):
        hubdiff.export(tmp_path / "delta", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("flip", [0x40, 0x01], ids=["exponent", "mantissa"])
def test_a_damaged_factor_is_not_exported(tmp_path: Path, flip: int) -> None:
    base, tuned = pair(tmp_path)
    push(tmp_path / "delta", base, tuned, rank=3)
    layer = next((tmp_path / "delta").glob("delta-*.safetensors"))
    data = bytearray(layer.read_bytes())
    placed = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = "model.layers.0.mlp.up_proj.weight"
    start = 8 + int.from_bytes(data[:8], "little") + placed[name]["data_offsets"][0]
    data[start + 1] ^= flip
    layer.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"up_proj"):
        hubdiff.export(tmp_path / "delta", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# --- asked for wrongly ---


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 2, "energy": 0.5}, "one question"),
        ({"rank": 2, "plain": True}, "--plain"),
        ({"rank": 0}, "rank 0"),
        ({"energy": 1.0}, "energy 1.0"),
        ({"energy": 0.0}, "energy 0.0"),
        ({"rank": 64}, "smaller as factors"),
    ],
)
def test_it_is_refused_and_nothing_written(
    tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    base, tuned = pair(tmp_path)
    with pytest.raises(CannotDiff, match=word) as caught:
        push(tmp_path / "delta", base, tuned, **options)
    assert caught.value.next_step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


# --- the factors themselves ---


def drawn(rows: int, columns: int, rank: int) -> torch.Tensor:
    torch.manual_seed(rows + columns)
    return torch.randn(rows, rank) @ torch.randn(rank, columns)


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (12, 12), (1, 30), (30, 1)])
def test_a_product_is_found_again(shape: tuple[int, int]) -> None:
    delta = drawn(*shape, 1)
    found = truncate(delta, Truncation(rank=5), FULL)
    assert found is not None
    # No more of it than there is; and in float32, since bf16 would cost all the exactness.
    assert (found.low_rank.rank, found.low_rank.dtype) == (1, "F32")
    assert found.low_rank.error < 1e-6
    assert truncate(delta, Truncation(rank=5), len(found.payload)) is None


def test_bf16_where_it_costs_nothing() -> None:
    torch.manual_seed(0)
    found = truncate(torch.randn(60, 50), Truncation(rank=10), FULL)
    assert found is not None
    assert found.low_rank.dtype == "BF16"


@pytest.mark.parametrize("odd", [0.0, float("nan"), float("inf")])
def test_what_has_no_factors(odd: float) -> None:
    delta = torch.zeros(8, 8)
    delta[2, 3] = odd
    assert truncate(delta, Truncation(rank=2), FULL) is None


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.99, 0.999999])
def test_energy_keeps_at_least_that(energy: float) -> None:
    delta = drawn(30, 20, 20)
    found = truncate(delta, Truncation(energy=energy), FULL)
    assert found is not None
    product = found.low_rank.product((30, 20))
    out = np.empty(600, np.float32)
    product.fill(found.payload, 0, out)
    lost = (delta.reshape(-1).double() - torch.from_numpy(out).double()).norm() / delta.norm()
    assert 1 - float(lost) ** 2 >= energy - 1e-9
    assert math.isclose(found.low_rank.error, float(lost), rel_tol=1e-5)
