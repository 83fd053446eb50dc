"""Against mergekit: its results on the same inputs, committed by ``mergekit_reference.py``.

How close, and why not closer. Both sides compute in float32 and round once. mergekit adds the
weighted Δ up and then adds the base, hubdiff begins with the target; so sums differ by the rounding
of float32, a few 2^-24 of the largest term. In bfloat16 hardly any of that is left: an element in
a thousand may round to the neighbour.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from mergekit_reference import CASES, DENSITY, DTYPES, GOLDEN, MODELS, WEIGHTS, reference, saved
from safetensors.torch import load_file

import hubdiff

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=DTYPES)
def short(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def folder(short: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the reference in folders, and a delta of each tune."""
    place = tmp_path_factory.mktemp(short)
    inputs = load_file(GOLDEN / f"{short}-inputs.safetensors")
    for model in MODELS:
        own = {n.partition("/")[2]: t for n, t in inputs.items() if n.startswith(f"{model}/")}
        saved(place / model, own, DTYPES[short])
    for model in WEIGHTS:
        # A float32 Δ is kept whole by --plain only.
        plain = short == "fp32"
        hubdiff.push_delta(
            place / model, place / f"{model}-delta", base=place / "base", plain=plain
        )
    return place


def weights(model: Path) -> Tensors:
    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_that_of_mergekit(folder: Path, short: str, case: str, tmp_path: Path) -> None:
    deltas = [(folder / f"{model}-delta", weight) for model, weight in WEIGHTS.items()]
    hubdiff.apply(deltas, folder / "base", output=tmp_path / "out", **CASES[case][0])
    ours, theirs = weights(tmp_path / "out"), load_file(GOLDEN / f"{short}-{case}.safetensors")
    assert ours.keys() == theirs.keys()
    base, tunes = weights(folder / "base"), [weights(folder / model) for model in WEIGHTS]
    apart = moved = 0
    for name, found in ours.items():
        given, expected = base[name].double(), theirs[name].double()
        largest = given.abs()
        for tune in tunes:
            largest = largest + (tune[name].double() - given).abs() / DENSITY
        unit = torch.finfo(found.dtype).eps if short == "bf16" else 2.0**-22
        assert ((found.double() - expected).abs() <= unit * largest).all(), name
        apart += int((found != theirs[name]).sum())
        moved += int((theirs[name] != base[name]).sum())
    assert moved > 300
    if short == "bf16":
        assert apart <= 3


def test_the_committed_results_are_what_mergekit_gives(tmp_path: Path) -> None:
    python = os.environ.get("MERGEKIT_PYTHON")
    if not python:
        pytest.skip("mergekit is not here; MERGEKIT_PYTHON names the Python of one that has it")
    reference(Path(python), tmp_path)
    for golden in GOLDEN.glob("*.safetensors"):
        old, new = load_file(golden), load_file(tmp_path / golden.name)
        assert old.keys() == new.keys()
        for name, tensor in old.items():
            assert torch.equal(tensor, new[name]), (golden.name, name)
