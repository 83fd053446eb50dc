"""Merge methods as functions, and through whole merges against naive ones on whole tensors.

The naive ones compute with numpy in float32, in the order the method states; what they share with
hubdiff is the draw of DARE, which is held by its own values.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_delta_battery import manifest, segments_of, workplace, write
from test_devices import DEVICES, every_pattern

import hubdiff
from hubdiff import methods, numerics
from hubdiff.encodings import SEGMENT

# --- the functions ---


def test_the_draw_is_the_same_for_ever() -> None:
    kept = methods.drawn("a\0b\0c", seed=7, segment=3, count=4099, density=0.3)
    digest = hashlib.sha256(np.packbits(kept.numpy()).tobytes()).hexdigest()
    assert digest == DRAWN
    assert kept[:1000].equal(methods.drawn("a\0b\0c", 7, 3, 1000, 0.3))


DRAWN = "c126f4b2a6dd0152dd3ddef2795927d3c21ae2cc60def354339a1afb5cc7d472"


def test_a_draw_keeps_its_share_and_depends_on_everything() -> None:
    def draw(identity: str = "x", seed: int = 0, segment: int = 0) -> torch.Tensor:
        return methods.drawn(identity, seed, segment, 100_000, 0.1)

    draws = [draw(), draw("y"), draw(seed=1), draw(segment=1)]
    for one in draws:
        assert abs(one.double().mean() - 0.1) < 0.005
        assert sum(abs((one & other).double().mean() - 0.01) < 0.002 for other in draws) == 3
    assert not methods.drawn("x", 0, 0, 1000, 1e-12).any()
    assert methods.drawn("x", 0, 0, 1000, 1 - 1e-12).all()


def test_ties_elects_by_weight_and_takes_the_mean_of_those_that_agree() -> None:
    target = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    a = torch.tensor([0.5, 0.5, -0.5, 0.0, 0.25])
    b = torch.tensor([0.25, -2.0, 0.5, 0.0, 0.0])
    result = methods.ties(target, [a, b], [1.0, 3.0], [1.0, 3.0])
    # Together; b outvotes a; b again; nobody; a alone.
    assert result.tolist() == [1 + (0.5 + 0.75) / 4, -1.0, 1.5, 1.0, 1.25]
    # A tie elects plus; twice the factors double the mean.
    assert methods.ties(target, [a, -a], [1, 1], [2, 2]).tolist() == [2.0, 2.0, 2.0, 1.0, 1.5]


def test_a_nan_is_not_outvoted() -> None:
    nan, one = torch.tensor([float("nan")]), torch.ones(1)
    for deltas in ([nan, one], [one, nan]):
        assert methods.ties(one, deltas, [1, 1], [1, 1]).isnan().all()
        assert methods.linear(one, deltas, [1, 1]).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_a_device_merges_to_the_bits_of_the_cpu(method: str, dtype: str, device: str) -> None:
    target = every_pattern(dtype, 1)
    deltas = [every_pattern(dtype, seed) for seed in (2, 3, 4)]

    def merged(where: str) -> torch.Tensor:
        here, moved = target.to(where), [delta.to(where) for delta in deltas]
        thin = []
        for delta in moved:
            wide = numerics.as_float32(numerics.Difference(delta, None))
            if method == "ties":
                patterns = numerics.bits(delta)
                magnitude = patterns & torch.iinfo(patterns.dtype).max
                wide = methods.trimmed(wide, magnitude, int(magnitude.median()), 1)
            if method == "dare":
                kept = methods.drawn("x", 0, 0, len(wide), 0.3).to(where)
                wide = methods.dropped(wide, kept, 0.3)
            thin.append(wide)
        factors = [rounded32(value) for value in (0.7, -0.3, 1.1)]
        if method == "ties":
            total = methods.ties(here, thin, factors, factors)
        else:
            total = methods.linear(here, thin, factors)
        untouched = torch.stack([delta == 0 for delta in thin]).all(0)
        return numerics.settle(total, here, target.dtype, untouched).cpu()

    assert numerics.bits(merged(device)).equal(numerics.bits(merged("cpu")))


def rounded32(value: float) -> float:
    return float(np.float32(value))


# --- through whole merges ---


class Example(NamedTuple):
    """A tensor of base, target and several tunes; Δ have few magnitudes, so that many are equal."""

    dtype: torch.dtype
    target_dtype: torch.dtype
    count: int
    weights: tuple[float, ...]
    density: float
    scale: float
    segment: int
    seed: int

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        rng = np.random.default_rng(self.seed)
        grid = rng.integers(-64, 64, self.count) * 2.0**-8
        base = torch.from_numpy(grid).to(self.dtype)
        target = torch.from_numpy(rng.standard_normal(self.count)).to(self.target_dtype)
        target[torch.from_numpy(rng.random(self.count) < 0.1)] = -0.0
        tunes = []
        for _ in self.weights:
            steps = rng.integers(-4, 5, self.count) * 2.0 ** rng.integers(-12, -7, self.count)
            steps[rng.random(self.count) < rng.choice([0.0, 0.5, 0.95])] = 0
            tunes.append((base.double() + torch.from_numpy(steps)).to(self.dtype))
        return base, target, tunes


EXAMPLES = st.builds(
    Example,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    target_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    count=st.sampled_from([1, 2, 7, 40, 133]),
    weights=st.lists(st.sampled_from([1.0, 0.7, 0.5, -0.4, 0.1]), min_size=2, max_size=3).map(
        tuple
    ),
    density=st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]),
    scale=st.sampled_from([1.0, 0.6]),
    segment=st.sampled_from([SEGMENT, 5, 16]),
    seed=st.integers(0, 2**32 - 1),
)


def f32(values: torch.Tensor) -> np.ndarray:
    return values.double().numpy().astype(np.float32)


class Naive:
    """The whole tensor at once."""

    def __init__(self, example: Example, plain: bool) -> None:
        self.example = example
        base, self.target, tunes = example.tensors()
        exact = [(tune.double() - base.double()).numpy() for tune in tunes]
        # Δ of float32 is kept in float32 by --plain and rounded to bfloat16 otherwise.
        own = example.dtype if plain or example.dtype != torch.float32 else torch.bfloat16
        self.hi = [torch.from_numpy(delta).to(own) for delta in exact]
        if example.dtype == torch.float32:
            exact = [hi.double().numpy() for hi in self.hi]
        self.deltas = [delta.astype(np.float32) for delta in exact]
        self.exact = exact
        self.factors = [np.float32(weight * example.scale) for weight in example.weights]

    def linear(self) -> torch.Tensor:
        present = [i for i, delta in enumerate(self.deltas) if delta.any()]
        if len(present) < 2:
            return self._exactly(present)
        return self._summed(self.deltas)

    def _exactly(self, present: list[int]) -> torch.Tensor:
        if not present:
            return self.target
        (i,) = present
        steps = [oracle.Fraction(step) for step in self.exact[i].tolist()]
        numbers = oracle.added(self.target, steps, float(self.factors[i]), self.target.dtype)
        made = torch.tensor(numbers, dtype=torch.float64).to(self.target.dtype)
        return torch.where(torch.from_numpy(self.deltas[i] == 0), self.target, made)

    def dare(self, kept: list[np.ndarray]) -> torch.Tensor:
        density = np.float32(self.example.density)
        thinned = [
            np.where(keep, delta / density, np.float32(0))
            for keep, delta in zip(kept, self.deltas, strict=True)
        ]
        return self._summed(thinned)

    def ties(self) -> torch.Tensor:
        trimmed = []
        for hi, delta in zip(self.hi, self.deltas, strict=True):
            k = max(1, int(self.example.density * len(delta)))
            order = np.argsort(-hi.double().abs().numpy(), kind="stable")[:k]
            mask = np.zeros(len(delta), bool)
            mask[order] = True
            trimmed.append(np.where(mask, delta, np.float32(0)))
        votes = [d * np.float32(w) for d, w in zip(trimmed, self.example.weights, strict=True)]
        elected = np.zeros_like(votes[0])
        for vote in votes:
            elected = elected + vote
        sign = np.where(elected >= 0, 1, -1)
        total, share = np.zeros_like(elected), np.zeros_like(elected)
        for vote, delta, factor, weight in zip(
            votes, trimmed, self.factors, self.example.weights, strict=True
        ):
            agrees = np.sign(vote) == sign
            total = total + np.where(agrees, delta * factor, np.float32(0))
            share = share + np.where(agrees, np.float32(weight), np.float32(0))
        mean = total / np.where(share == 0, np.float32(1), share)
        return self._rounded(f32(self.target) + mean, trimmed)

    def _summed(self, deltas: list[np.ndarray]) -> torch.Tensor:
        total = f32(self.target)
        for delta, factor in zip(deltas, self.factors, strict=True):
            total = total + delta * factor
        return self._rounded(total, deltas)

    def _rounded(self, total: np.ndarray, deltas: list[np.ndarray]) -> torch.Tensor:
        made = torch.from_numpy(total).to(self.target.dtype)
        nothing = torch.from_numpy(np.all([delta == 0 for delta in deltas], axis=0))
        return torch.where(nothing, self.target, made)


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
@settings(max_examples=6, deadline=None)
@given(example=EXAMPLES)
def test_a_merge_is_the_naive_one(method: str, plain: bool, example: Example) -> None:
    examples = {
        f"layer.{i}.weight": example._replace(seed=example.seed + i, count=count)
        for i, count in enumerate((example.count, 1, 7, 40, 133))
    }
    made = {name: one.tensors() for name, one in examples.items()}
    options = {} if method == "linear" else {"method": method, "density": example.density}
    with workplace() as folder, segments_of(example.segment, 4 * example.segment):
        write(folder / "base", {name: base for name, (base, _, _) in made.items()})
        write(folder / "target", {name: target for name, (_, target, _) in made.items()})
        deltas = []
        for number, weight in enumerate(example.weights):
            tuned, delta = folder / f"tuned-{number}", folder / f"delta-{number}"
            write(tuned, {name: tunes[number] for name, (_, _, tunes) in made.items()})
            hubdiff.push_delta(tuned, delta, base=folder / "base", plain=plain)
            deltas.append((delta, weight))
        out = folder / "out"
        hubdiff.apply(
            deltas, folder / "target", output=out, scale=example.scale, **options, force=True
        )
        found = load_file(out / "model.safetensors")
        for name, one in examples.items():
            naive = Naive(one, plain)
            if method == "dare":
                expected = naive.dare([kept(one, delta, name) for delta, _ in deltas])
            else:
                expected = naive.ties() if method == "ties" else naive.linear()
            assert oracle.bits(found[name]).equal(oracle.bits(expected)), name


def kept(example: Example, delta: Path, name: str) -> np.ndarray:
    """What DARE draws for the tensor, segment by segment."""
    if example.density == 1:
        return np.ones(example.count, bool)
    record = next(record for record in manifest(delta).tensors if record.name == name)
    identity = f"{name}\0{record.base}\0{record.tuned}"
    pieces = []
    for number, start in enumerate(range(0, example.count, example.segment)):
        count = min(example.segment, example.count - start)
        pieces.append(methods.drawn(identity, 0, number, count, example.density))
    return torch.cat(pieces).numpy()
