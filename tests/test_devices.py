"""A GPU computes the same bits as the CPU: subnormals, −0.0, NaN payloads and ties included."""

from __future__ import annotations

import pytest
import torch

from hubdiff import numerics
from hubdiff.errors import RefError
from hubdiff.jobs.apply import choose_device
from hubdiff.numerics import DTYPES, Difference

DEVICES = [
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    ),
    pytest.param(
        "mps",
        marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU here"),
    ),
    "cpu",
]


def every_pattern(dtype: str, seed: int) -> torch.Tensor:
    """All 65,536 patterns of a 16-bit dtype, shuffled; as many random ones of float32."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "F32":
        words = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator)
        return words.to(torch.int32).view(torch.float32)
    patterns = torch.arange(-(1 << 15), 1 << 15)[torch.randperm(1 << 16, generator=generator)]
    return patterns.to(torch.int16).view(DTYPES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("delta", ["BF16", "F16"])
def test_a_device_computes_the_bits_of_the_cpu(delta, target, scale, device):
    given, hi = every_pattern(target, 1), every_pattern(delta, 2)
    lo = torch.where(torch.arange(1 << 16) % 50 == 0, every_pattern(delta, 3), 0.0).to(hi.dtype)
    expected = numerics.add(given, Difference(hi, lo), scale, given.dtype)
    there = Difference(hi.to(device), lo.to(device))
    result = numerics.add(given.to(device), there, scale, given.dtype).cpu()
    numbers = ~torch.isnan(expected)
    assert torch.equal(numerics.bits(result)[numbers], numerics.bits(expected)[numbers])
    assert torch.equal(torch.isnan(result), torch.isnan(expected))


def test_auto_is_cuda_where_there_is_one():
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(RefError):
        choose_device(name)
