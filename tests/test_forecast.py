"""The forecast's numbers against the same ones computed from whole models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from peft_models import adapted, llama
from safetensors.torch import load_file

import hubdiff
from hubdiff.checkpoint import open_checkpoint
from hubdiff.delta import open_delta
from hubdiff.errors import BadManifest, IntegrityError
from hubdiff.files import open_tree
from hubdiff.forecast import Forecast, Look, look
from hubdiff.refs import ModelRef

Tensors = Mapping[str, torch.Tensor]
NUMBERS = ("cosine", "drift", "reach", "drift_over_delta", "along", "rounded_away")


def forecast(delta: Path, target: Path) -> Forecast:
    with open_delta(delta) as opened, open_checkpoint(open_tree(ModelRef.parse(target))) as other:
        at = Look.of(opened, other, {name: name for name in opened.records})
        assert at is not None
        return look(at)


def whole(base: Tensors, tuned: Tensors, target: Tensors) -> dict[str, float]:
    """The numbers from every element of three models but for their norms."""
    base = {name: tensor for name, tensor in base.items() if "norm" not in name}

    def flat(side: Tensors) -> np.ndarray:
        return np.concatenate([side[name].double().numpy().reshape(-1) for name in base])

    b, d, t = flat(base), flat(tuned) - flat(base), flat(target)
    kept = np.concatenate(
        [
            (target[n].double() + tuned[n].double() - base[n].double())
            .to(target[n].dtype)
            .eq(target[n])
            .numpy()
            .reshape(-1)
            for n in base
        ]
    )
    norm = np.linalg.norm
    return {
        "cosine": b @ t / norm(b) / norm(t),
        "drift": norm(t - b) / norm(b),
        "reach": norm(d) / norm(b),
        "drift_over_delta": norm(t - b) / norm(d),
        "along": d @ (t - b) / norm(d) / norm(t - b),
        "rounded_away": np.count_nonzero(kept & (d != 0)) / np.count_nonzero(d),
    }


def small(dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Tensors that are no larger than a block: a sample has all of them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (16, 16) for i in range(3)}
    shapes |= {"model.norm.weight": (7,)}
    return {n: (torch.randn(s, generator=generator) / 50).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("onto", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_sampled_whole_is_told_exactly(
    tmp_path: Path, dtype: torch.dtype, onto: torch.dtype
) -> None:
    base = small(dtype, 0)
    tuned = models.moved(base, step=3e-5, frozen="nothing")
    target = {n: t.to(onto) for n, t in models.moved(base, 2e-3, 7, frozen="nothing").items()}
    for name, tensors in (("base", base), ("tuned", tuned), ("target", target)):
        models.save(tmp_path / name, tensors)
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    found = forecast(tmp_path / "delta", tmp_path / "target")
    assert found.elements == sum(tensor.numel() for tensor in base.values())
    for name, value in whole(base, tuned, target).items():
        # Δ is kept in eight digits.
        assert getattr(found.total, name) == pytest.approx(value, rel=0.01, abs=0.01), name


@pytest.mark.parametrize("step", [1e-3, 5e-3, 3e-2], ids=str)
def test_an_estimate_is_near_the_whole(tmp_path: Path, step: float) -> None:
    base = models.weights()
    tuned = models.moved(base, frozen="nothing")
    target = models.moved(base, step, 7, frozen="nothing")
    for name, tensors in (("base", base), ("tuned", tuned), ("target", target)):
        models.save(tmp_path / name, tensors)
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    found = forecast(tmp_path / "delta", tmp_path / "target")
    assert found.elements < sum(tensor.numel() for tensor in base.values()) / 5
    for name, value in whole(base, tuned, target).items():
        assert getattr(found.total, name) == pytest.approx(value, rel=0.06, abs=0.05), name


def test_rows_tell_layers_and_kinds_apart(tmp_path: Path) -> None:
    base = models.weights()
    tuned = models.moved(base)
    only = "layers.1.mlp"
    target = {n: t + 0.01 if only in n else t for n, t in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned), ("target", target)):
        models.save(tmp_path / name, tensors)
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    rows = forecast(tmp_path / "delta", tmp_path / "target").rows
    moved = {(row.layer, row.kind): row.moments.drift for row in rows}
    assert moved[1, "mlp"] == pytest.approx(0.5, rel=0.05)
    assert all(drift == 0 for where, drift in moved.items() if where != (1, "mlp"))
    acts = {(row.layer, row.kind): row.moments.reach for row in rows}
    assert acts[0, "norm"] == 0
    assert acts[0, "mlp"]


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    base = small(torch.bfloat16, 0)
    tuned = models.moved(base, frozen="nothing")
    target = models.moved(base, 1e-3, 7, frozen="nothing")
    expected, one = None, "model.layers.0.mlp.up_proj.weight"
    for round_ in ("clean", "broken"):
        folder = tmp_path / round_
        for name, tensors in (("base", base), ("tuned", tuned), ("target", target)):
            models.save(folder / name, tensors)
        hubdiff.push_delta(folder / "tuned", folder / "delta", base=folder / "base")
        found = forecast(folder / "delta", folder / "target").total
        if expected is None:
            expected = found
        for side, value in ((base, math.nan), (tuned, math.inf), (target, -math.inf)):
            side[one] = side[one].clone()
            side[one][0, 0] = value
    assert found.elements == expected.elements - 1
    assert found.cosine == pytest.approx(expected.cosine, abs=1e-3)


def pushed(folder: Path) -> Path:
    base = models.weights()
    models.save(folder / "base", base)
    models.save(folder / "tuned", models.moved(base))
    hubdiff.push_delta(folder / "tuned", folder / "delta", base=folder / "base")
    return folder / "delta"


def test_a_sample_that_was_changed_is_refused(tmp_path: Path) -> None:
    delta = pushed(tmp_path)
    file = delta / "sample.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="sample"):
        forecast(delta, tmp_path / "base")
    file.unlink()
    with pytest.raises(BadManifest, match="missing"):
        forecast(delta, tmp_path / "base")


def test_the_sample_does_not_depend_on_how_the_delta_is_made(tmp_path: Path) -> None:
    """Packed, dense or of another number of shards: the same places, the same values."""
    base = models.weights()
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "tuned", models.moved(base))
    models.save(tmp_path / "sharded", models.moved(base), shards=3)
    samples = []
    for number, (tuned, options) in enumerate(
        [("tuned", {}), ("tuned", {"plain": True}), ("sharded", {}), ("tuned", {"rank": 2})]
    ):
        delta = tmp_path / f"delta {number}"
        hubdiff.push_delta(tmp_path / tuned, delta, base=tmp_path / "base", **options)
        with open_delta(delta) as opened:
            assert opened.manifest.sample is not None
            names = sorted(opened.manifest.sample.blocks.items())
        samples.append((names, forecast(delta, tmp_path / "base").total))
    assert all(one[0] == samples[0][0] for one in samples)
    for _, total in samples[1:]:
        assert total == pytest.approx(samples[0][1])


def test_the_masters_are_what_the_sample_has(tmp_path: Path) -> None:
    base = small(torch.bfloat16, 0)
    masters = {n: t.float() + 1e-6 for n, t in base.items()}
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "tuned", {n: t.bfloat16() for n, t in masters.items()})
    models.save(tmp_path / "masters", masters)
    hubdiff.push_delta(
        tmp_path / "tuned",
        tmp_path / "delta",
        base=tmp_path / "base",
        tuned_master=tmp_path / "masters",
    )
    found = forecast(tmp_path / "delta", tmp_path / "base").total
    norm = math.sqrt(sum(float((t.double() ** 2).sum()) for t in base.values()))
    count = sum(t.numel() for t in base.values())
    assert found.reach == pytest.approx(1e-6 * math.sqrt(count) / norm, rel=0.01)
    # A millionth is below half a unit of nearly all of these weights.
    assert found.rounded_away > 0.9


def test_an_adapter_has_a_sample_of_its_product(tmp_path: Path) -> None:
    made = adapted(tmp_path, llama(), target_modules="all-linear")
    hubdiff.push_delta(made.adapter, tmp_path / "delta", base=made.base)
    with open_delta(tmp_path / "delta") as delta:
        assert delta.manifest.sample is not None
        assert set(delta.manifest.sample.blocks) == {r.name for r in delta.manifest.tensors}
        changed = delta.keys()
        square = sum(float((delta.get_tensor(n).double() ** 2).sum()) for n in changed)
        base = load_file(made.base / "model.safetensors")
        norms = sum(float((base[n].double() ** 2).sum()) for n in changed)
    found = forecast(tmp_path / "delta", made.base).total
    assert found.cosine == pytest.approx(1)
    assert found.drift == 0
    assert found.reach == pytest.approx(math.sqrt(square / norms), rel=0.1)
