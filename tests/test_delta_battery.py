"""Whole deltas of every dtype, shape and oddity: own base bit for bit, elsewhere the exact answer.

Every test runs packed and plain. A segment has 2^20 elements; most tests cut tensors into segments
of a few elements instead, so that small tensors have many, and one test uses real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import hashes
from safetensors.torch import load_file, save_file

import hubdiff
from hubdiff.encodings import SEGMENT
from hubdiff.errors import NotPortable
from hubdiff.manifest import Manifest, parse_manifest

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
RAW = (
    torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64, torch.complex64,
)  # fmt: skip
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = [(), (1,), (0,), (3, 0), (7,), (5, 9), (2, 3, 4), (64,), (1, 37)]
SEED = st.integers(0, 2**32 - 1)

plain_or_packed = pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])


# --- tensors ---


def from_patterns(patterns: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.from_numpy(patterns.astype(np.uint8) % 2 == 1).reshape(shape)
    size = torch.empty((), dtype=dtype).element_size()
    data = torch.from_numpy(
        patterns.astype(np.uint64).view(np.uint8).reshape(-1, 8)[:, :size].copy()
    )
    return data.reshape(-1).view(dtype).reshape(shape)


def wild(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bit patterns: NaN payloads, Inf and subnormals among them."""
    count = int(np.prod(shape))
    return from_patterns(rng.integers(0, 2**64, count, np.uint64), dtype, shape)


def odd(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The corners of a float format, close together so that differences meet them too."""
    info = torch.finfo(dtype)
    corners = [0.0, -0.0, 1.0, -1.0, info.max, info.min, info.tiny, -info.tiny, info.eps]
    corners += [info.tiny / 2, info.smallest_normal, float("inf"), float("-inf"), float("nan")]
    chosen = torch.tensor(corners, dtype=torch.float64).to(dtype)
    count = int(np.prod(shape))
    return chosen[torch.from_numpy(rng.integers(0, len(corners), count))].reshape(shape)


def normal(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(rng.standard_normal(shape) * 0.02)).reshape(shape).to(dtype)


def zeros(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros of both signs."""
    signs = torch.from_numpy(np.asarray(rng.integers(0, 2, shape)))
    return torch.where(signs == 1, -0.0, 0.0).to(dtype)


MAKERS = {"normal": normal, "wild": wild, "odd": odd, "zeros": zeros}
TUNES = ("same", "step", "sparse", "negated", *MAKERS)


class Kind(NamedTuple):
    """How one tensor of the three models comes about."""

    tuned_dtype: torch.dtype
    base_dtype: torch.dtype
    target_dtype: torch.dtype
    shape: tuple[int, ...]
    start: str
    tune: str
    seed: int

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(self.seed)
        base = MAKERS[self.start](rng, self.base_dtype, self.shape)
        target = MAKERS[self.start](rng, self.target_dtype, self.shape)
        return self._tuned(rng, base).to(self.tuned_dtype), base, target

    def _tuned(self, rng: np.random.Generator, base: torch.Tensor) -> torch.Tensor:
        if self.tune in MAKERS:
            return MAKERS[self.tune](rng, self.tuned_dtype, self.shape)
        if self.tune == "same":
            return base.clone()
        if self.tune == "negated":
            return -base
        step = torch.from_numpy(np.asarray(rng.standard_normal(self.shape) * 1e-3))
        if self.tune == "sparse":
            step[torch.from_numpy(np.asarray(rng.random(self.shape) < 0.9))] = 0
        return (base.double() + step).to(base.dtype)


FLOAT_KINDS = st.builds(
    Kind,
    tuned_dtype=st.sampled_from(FLOATS),
    base_dtype=st.sampled_from(FLOATS),
    target_dtype=st.sampled_from((*FLOATS, torch.float64)),
    shape=st.sampled_from(SHAPES),
    start=st.sampled_from(sorted(MAKERS)),
    tune=st.sampled_from(sorted(TUNES)),
    seed=SEED,
)
# Most fine-tunes keep the dtype: half of the examples do.
SAME_DTYPE = FLOAT_KINDS.map(lambda kind: kind._replace(base_dtype=kind.tuned_dtype))
KINDS = st.lists(st.one_of(SAME_DTYPE, FLOAT_KINDS), min_size=1, max_size=6)


# --- models ---


@contextmanager
def segments_of(elements: int, block_bytes: int) -> Iterator[None]:
    """Cut tensors into segments of a few elements, and files into blocks of a few bytes."""
    small = {"SEGMENT": elements, "BLOCK_BYTES": block_bytes}
    before: list[tuple[ModuleType, str, int]] = []
    for name, module in list(sys.modules.items()):
        for constant, value in small.items():
            if name.startswith("hubdiff.") and hasattr(module, constant):
                before.append((module, constant, getattr(module, constant)))
                setattr(module, constant, value)
    try:
        yield
    finally:
        for module, constant, value in before:
            setattr(module, constant, value)


@contextmanager
def workplace() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder)


def write(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> Path:
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def manifest(delta: Path) -> Manifest:
    return parse_manifest((delta / "hubdiff.json").read_bytes(), "m")


def rebuilt_equals(folder: Path, delta: Path, base: Path, tuned: Path) -> None:
    """Every file of the tuned model comes back from its base; ``verify`` says so too."""
    applied = hubdiff.apply(delta, base, output=folder / "rebuilt")
    assert applied.plan["case"] == "own base"
    result = hashes(folder / "rebuilt")
    del result["hubdiff-result.json"]
    assert result == hashes(tuned)
    verified = hubdiff.verify(delta, base=base, tuned=tuned)
    assert verified.rebuilt == verified.tuned_files == len(result)


# Signs of zero and infinities across dtypes: rare among the drawn ones, and where bugs were.
ACROSS = [
    Kind(tuned, base, target, (40,), start, tune, 0)
    for tuned in FLOATS
    for base in FLOATS
    for target in (base, torch.float64)
    for start in ("zeros", "odd")
    for tune in ("same", "sparse")
]


@plain_or_packed
@example(kinds=ACROSS, segment=SEGMENT)
@settings(max_examples=25, deadline=None)
@given(kinds=KINDS, segment=st.sampled_from([SEGMENT, 1, 5, 16]))
def test_own_base_restores_every_bit(plain: bool, kinds: list[Kind], segment: int) -> None:
    made = {f"layer.{i}.weight": kind.tensors() for i, kind in enumerate(kinds)}
    with workplace() as folder, segments_of(segment, 4 * segment):
        tuned = write(folder / "tuned", {n: t for n, (t, _, _) in made.items()})
        base = write(folder / "base", {n: b for n, (_, b, _) in made.items()})
        hubdiff.push_delta(tuned, folder / "delta", base=base, plain=plain)
        rebuilt_equals(folder, folder / "delta", base, tuned)


@plain_or_packed
@example(kinds=ACROSS, segment=SEGMENT, scale=1.0)
@example(kinds=ACROSS, segment=7, scale=0.3)
@settings(max_examples=30, deadline=None)
@given(
    kinds=KINDS,
    segment=st.sampled_from([SEGMENT, 1, 5, 16]),
    scale=st.sampled_from([1.0, 1.0, 0.5, -1.0, 0.3, 1.7, 0.0]),
)
def test_a_transfer_is_the_exact_sum_rounded_once(
    plain: bool, kinds: list[Kind], segment: int, scale: float
) -> None:
    made = {f"layer.{i}.weight": kind.tensors() for i, kind in enumerate(kinds)}
    with workplace() as folder, segments_of(segment, 4 * segment):
        tuned = write(folder / "tuned", {n: t for n, (t, _, _) in made.items()})
        base = write(folder / "base", {n: b for n, (_, b, _) in made.items()})
        extra = {"layer.extra.weight": torch.zeros(1)}  # so that it never is the own base
        target = write(folder / "target", {**{n: m for n, (_, _, m) in made.items()}, **extra})
        hubdiff.push_delta(tuned, folder / "delta", base=base, plain=plain)
        hubdiff.apply(folder / "delta", target, output=folder / "result", scale=scale, force=True)
        result = load_file(folder / "result" / "model.safetensors")
        for name, (tune, start, goal) in made.items():
            with hubdiff.open_delta(folder / "delta") as delta:
                step = delta.get_tensor(name) if delta.records[name].portable else None
            _check_transfer(result[name], tune, start, goal, step, scale)


def _check_transfer(
    result: torch.Tensor,
    tuned: torch.Tensor,
    base: torch.Tensor,
    target: torch.Tensor,
    step: torch.Tensor | None,
    scale: float,
) -> None:
    assert result.dtype == target.dtype
    assert result.shape == target.shape
    exact = oracle.difference(tuned, base)
    if tuned.dtype == base.dtype != torch.float32:
        delta = exact
        if step is not None:  # the dense view of it: Δ rounded once to float32
            expected = [
                d if isinstance(d, float) else oracle.rounded(d, torch.float32) for d in exact
            ]
            assert oracle.same_numbers(step, expected)
    else:
        nothing: list[Fraction | float] = [Fraction(0)] * tuned.numel()
        delta = nothing if step is None else oracle.difference(step, torch.zeros_like(step))
        for ours, theirs in zip(delta, exact, strict=True):
            if isinstance(theirs, Fraction) and abs(theirs) < torch.finfo(torch.bfloat16).max:
                # bfloat16 carries eight bits of it, and nothing below its smallest number.
                assert isinstance(ours, Fraction)
                assert abs(ours - theirs) <= max(abs(theirs) / 256, Fraction(1, 2**133))
    assert oracle.same_numbers(result, oracle.added(target, delta, scale, target.dtype))
    if tuned.dtype == base.dtype:
        unchanged = (oracle.bits(tuned) == oracle.bits(base)).all(dim=1)
        assert torch.equal(oracle.bits(result)[unchanged], oracle.bits(target)[unchanged])


MATRICES = FLOAT_KINDS.map(lambda kind: kind._replace(shape=(11, 13)))


@example(
    kinds=[kind._replace(shape=(11, 13)) for kind in ACROSS if kind.tune == "same"][:8],
    segment=7,
    scale=-1.0,
)
@settings(max_examples=12, deadline=None)
@given(
    kinds=st.lists(MATRICES, min_size=1, max_size=5),
    segment=st.sampled_from([SEGMENT, 5, 16]),
    scale=st.sampled_from([1.0, 1.0, 0.5, -1.0, 0.3, 0.0]),
)
def test_a_low_rank_transfer_is_the_exact_sum_rounded_once(
    kinds: list[Kind], segment: int, scale: float
) -> None:
    surely = Kind(*[torch.bfloat16] * 3, (11, 13), "normal", "step", 0)
    made = {f"layer.{i}.weight": kind.tensors() for i, kind in enumerate([surely, *kinds])}
    with workplace() as folder, segments_of(segment, 4 * segment):
        tuned = write(folder / "tuned", {n: t for n, (t, _, _) in made.items()})
        base = write(folder / "base", {n: b for n, (_, b, _) in made.items()})
        target = write(folder / "target", {n: m for n, (_, _, m) in made.items()})
        hubdiff.push_delta(tuned, folder / "delta", base=base, rank=1)
        hubdiff.apply(folder / "delta", target, output=folder / "result", scale=scale, force=True)
        hubdiff.verify(folder / "delta")
        result = load_file(folder / "result" / "model.safetensors")
        with hubdiff.open_delta(folder / "delta") as delta:
            factored = {r.name for r in delta.manifest.tensors for p in r.parts if p.low_rank}
            steps = {name: delta.get_tensor(name) for name in factored}
    assert "layer.0.weight" in factored
    for name, step in steps.items():
        goal = made[name][2]
        exact = oracle.difference(step, torch.zeros_like(step))
        assert oracle.same_numbers(result[name], oracle.added(goal, exact, scale, goal.dtype))
        unmoved = step.reshape(-1) == 0
        assert torch.equal(oracle.bits(result[name])[unmoved], oracle.bits(goal)[unmoved])


@plain_or_packed
@settings(max_examples=15, deadline=None)
@given(kinds=st.lists(SAME_DTYPE, min_size=1, max_size=5), segment=st.sampled_from([SEGMENT, 5]))
def test_unpacked_tensors_are_the_difference_rounded_once(
    plain: bool, kinds: list[Kind], segment: int
) -> None:
    kinds = [kind for kind in kinds if kind.tuned_dtype != torch.float32]
    made = {f"layer.{i}.weight": kind.tensors() for i, kind in enumerate(kinds)}
    made["layer.last.weight"] = (torch.tensor([2.0]).half(), torch.tensor([1.0]).half(), None)
    with workplace() as folder, segments_of(segment, 4 * segment):
        tuned = write(folder / "tuned", {n: t for n, (t, _, _) in made.items()})
        base = write(folder / "base", {n: b for n, (_, b, _) in made.items()})
        hubdiff.push_delta(tuned, folder / "delta", base=base, plain=plain)
        unpacked = hubdiff.unpack(folder / "delta", folder / "dense")
        dense = load_file(folder / "dense" / "delta.safetensors")
    assert len(dense) == unpacked.tensors
    for name, tensor in dense.items():
        tune, start, _ = made[name]
        exact = oracle.difference(tune, start)
        expected = [d if isinstance(d, float) else oracle.rounded(d, tensor.dtype) for d in exact]
        assert tensor.dtype == tune.dtype
        assert tensor.shape == tune.shape
        assert oracle.same_numbers(tensor, expected)


# --- tensors that are not added ---

RAW_KINDS = st.lists(
    st.tuples(
        st.sampled_from((*RAW, *FP8)),
        st.sampled_from(SHAPES),
        st.sampled_from(["same", "sparse", "wild", "another dtype"]),
        SEED,
    ),
    min_size=1,
    max_size=5,
)


@plain_or_packed
@settings(max_examples=20, deadline=None)
@given(kinds=RAW_KINDS, segment=st.sampled_from([SEGMENT, 1, 7]))
def test_other_dtypes_travel_as_raw_bits(
    plain: bool,
    kinds: list[tuple[torch.dtype, tuple[int, ...], str, int]],
    segment: int,
) -> None:
    old, new = {}, {}
    for i, (dtype, shape, tune, seed) in enumerate(kinds):
        name, rng = f"layer.{i}.buffer", np.random.default_rng(seed)
        old[name] = wild(rng, dtype, shape)
        new[name] = wild(rng, torch.bfloat16 if tune == "another dtype" else dtype, shape)
        if tune in ("same", "sparse"):
            changed = new[name].clone()
            new[name] = old[name].clone()
            if tune == "sparse" and changed.dim() and len(changed):
                new[name][:1] = changed[:1]
    with workplace() as folder, segments_of(segment, 4 * segment):
        base, tuned = write(folder / "base", old), write(folder / "tuned", new)
        hubdiff.push_delta(tuned, folder / "delta", base=base, plain=plain)
        rebuilt_equals(folder, folder / "delta", base, tuned)
        groups = {p.group for record in manifest(folder / "delta").tensors for p in record.parts}
    assert groups <= {"exact"}


@plain_or_packed
@pytest.mark.parametrize("dtype", FP8)
def test_fp8_rebuilds_on_its_own_base_and_is_refused_elsewhere(
    tmp_path: Path, plain: bool, dtype: torch.dtype
) -> None:
    weights = torch.linspace(-2, 2, 64)
    base = write(tmp_path / "base", {"w.weight": weights.to(dtype)})
    tuned = write(tmp_path / "tuned", {"w.weight": (weights + 0.3).to(dtype)})
    target = write(tmp_path / "target", {"w.weight": (weights + 0.1).to(dtype)})
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base, plain=plain)
    rebuilt_equals(tmp_path, tmp_path / "delta", base, tuned)
    with pytest.raises(NotPortable, match="F8_") as caught:
        hubdiff.apply(tmp_path / "delta", target, output=tmp_path / "out", force=True)
    assert caught.value.next_step
    assert not (tmp_path / "out").exists()


# --- tensors on one side only ---


ADDED = st.tuples(st.sampled_from((*FLOATS, *RAW)), st.sampled_from(SHAPES), SEED)


@plain_or_packed
@settings(max_examples=15, deadline=None)
@given(
    common=st.lists(SAME_DTYPE, min_size=2, max_size=4),
    added=st.lists(ADDED, max_size=3),
    removed=st.integers(0, 2),
    segment=st.sampled_from([SEGMENT, 5]),
)  # fmt: skip
def test_added_and_removed_tensors(
    plain: bool,
    common: list[Kind],
    added: list[tuple[torch.dtype, tuple[int, ...], int]],
    removed: int,
    segment: int,
) -> None:
    made = {f"layer.{i}.weight": kind.tensors() for i, kind in enumerate(common)}
    new = {
        f"head.{i}.weight": wild(np.random.default_rng(seed), dtype, shape)
        for i, (dtype, shape, seed) in enumerate(added)
    }
    gone = {f"pooler.{i}.weight": torch.ones(2) for i in range(removed)}
    with workplace() as folder, segments_of(segment, 4 * segment):
        tuned = write(folder / "tuned", {**{n: t for n, (t, _, _) in made.items()}, **new})
        base = write(folder / "base", {**{n: b for n, (_, b, _) in made.items()}, **gone})
        target = write(folder / "target", {**{n: m for n, (_, _, m) in made.items()}, **gone})
        hubdiff.push_delta(tuned, folder / "delta", base=base, plain=plain)
        record = manifest(folder / "delta")
        assert {t.name for t in record.tensors if t.added} == set(new)
        assert set(record.removed) == set(gone)
        rebuilt_equals(folder, folder / "delta", base, tuned)
        # A scale makes a transfer of it, even onto a target that happens to be the own base.
        applied = hubdiff.apply(
            folder / "delta", target, output=folder / "result", scale=0.5, force=True
        )
        result = load_file(folder / "result" / "model.safetensors")
    assert set(result) == {*made, *new, *gone}
    assert set(applied.plan["added"]) == set(new)
    assert set(applied.plan["kept"]) == set(gone)
    for name, tensor in (new | gone).items():
        assert torch.equal(oracle.bits(result[name]), oracle.bits(tensor)), name
        assert result[name].shape == tensor.shape


# --- real segments ---


@plain_or_packed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tensors_of_several_real_segments(tmp_path: Path, plain: bool, dtype: torch.dtype) -> None:
    """Of more than one segment, and of more than one block."""
    generator = torch.Generator().manual_seed(0)
    count = 5 * SEGMENT + 5 if dtype == torch.bfloat16 else SEGMENT + 5
    old = {
        "layer.a.weight": torch.randn(count, generator=generator).to(dtype),
        "layer.b.weight": torch.randn(300, generator=generator).to(dtype),
    }
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["layer.a.weight"][:1000] += 1e-2
    new["layer.a.weight"][-3:] = torch.tensor([-0.0, float("nan"), float("inf")])
    new["layer.b.weight"] *= 1.01
    other = {name: (tensor.float() + 0.5).to(dtype) for name, tensor in old.items()}
    base, tuned = write(tmp_path / "base", old), write(tmp_path / "tuned", new)
    target = write(tmp_path / "target", other)
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base, plain=plain)
    rebuilt_equals(tmp_path, tmp_path / "delta", base, tuned)
    hubdiff.apply(tmp_path / "delta", target, output=tmp_path / "result", force=True)
    result = load_file(tmp_path / "result" / "model.safetensors")
    for name in old:
        if dtype == torch.bfloat16:
            # Every number here is a multiple of 2^-20 or far larger: float64 holds the sums.
            wide = new[name].double() - old[name].double() + other[name].double()
            expected = wide.to(torch.float32).to(dtype)
            same = (result[name] == expected) | (result[name].isnan() & expected.isnan())
            ties = wide.to(torch.float32).double() != wide
            assert bool((same | ties).all())
        moved = oracle.bits(new[name]).ne(oracle.bits(old[name])).any(dim=1)
        assert torch.equal(oracle.bits(result[name])[~moved], oracle.bits(other[name])[~moved])


# --- one machine's delta on another ---


@plain_or_packed
def test_what_a_sum_leaves_in_nan_does_not_matter(tmp_path: Path, plain: bool) -> None:
    """Processors, and vector and scalar code on one, disagree about the payload of a NaN that a
    sum or a conversion gives. A delta made on one must rebuild on any other."""
    import os
    import subprocess

    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has only one kind of code to compare")
    rng = np.random.default_rng(0)
    old, new = {}, {}
    for i, (dtype, other) in enumerate(
        [(d, d) for d in FLOATS] + [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
    ):
        old[f"layer.{i}.weight"] = wild(rng, other, (1003,))
        new[f"layer.{i}.weight"] = wild(rng, dtype, (1003,))
    base, tuned = write(tmp_path / "base", old), write(tmp_path / "tuned", new)
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base, plain=plain)
    code = "import sys, hubdiff; hubdiff.verify(*sys.argv[1:2], base=sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "delta"), str(base)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
