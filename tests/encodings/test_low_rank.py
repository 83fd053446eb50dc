"""``low-rank``: any run of the product's elements, bit for bit as FORMAT.md defines them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hubdiff.encodings.low_rank import Product
from hubdiff.errors import CorruptPayload
from hubdiff.floats import BYTES

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def drawn(product: Product, seed: int, spread: int) -> torch.Tensor:
    """Finite factors of all magnitudes that ``spread`` allows, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    count = (product.rows + product.columns) * product.rank
    numbers = torch.randn(count, generator=generator, dtype=torch.float64)
    numbers *= 10.0 ** torch.randint(-spread, spread + 1, (count,), generator=generator)
    numbers[torch.randint(0, 5, (count,), generator=generator) == 0] *= 0.0
    largest = torch.finfo(TORCH[product.dtype]).max
    return numbers.clamp(-largest, largest).to(TORCH[product.dtype])


def payload_of(factors: torch.Tensor) -> bytes:
    return factors.view(torch.uint8).numpy().tobytes()


def element(product: Product, factors: list[float], i: int, j: int) -> float:
    """One element as FORMAT.md writes it; a Python float is a binary64."""
    left, right = product.rank * i, product.rows * product.rank + j
    total = 0.0
    for k in range(product.rank):
        total += factors[left + k] * factors[right + k * product.columns]
    number = product.scale * total
    return oracle.rounded(Fraction(number), torch.float32) or -0.0


@example(rows=3, columns=2100, rank=1, dtype="F32", scale=1.0, seed=0, spread=1, cut=(0.1, 0.9))
@example(rows=130, columns=3, rank=2, dtype="BF16", scale=0.1, seed=1, spread=0, cut=(0.0, 1.0))
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    rank=st.integers(1, 12),
    dtype=st.sampled_from(sorted(BYTES)),
    scale=st.sampled_from([1.0, 2.0, 0.1, 16 / 3, -1.5, 0.0]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0, 1, 6, 25]),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_run_of_elements_is_what_the_format_says(
    rows: int,
    columns: int,
    rank: int,
    dtype: str,
    scale: float,
    seed: int,
    spread: int,
    cut: tuple[float, float],
) -> None:
    product = Product(rows, columns, rank, dtype, scale)
    factors = drawn(product, seed, spread)
    first, last = sorted(round(c * rows * columns) for c in cut)
    out = np.full(last - first, np.nan, np.float32)
    product.fill(payload_of(factors), first, out)
    numbers = factors.double().tolist()
    expected = [element(product, numbers, *divmod(n, columns)) for n in range(first, last)]
    assert out.view(np.uint32).tolist() == np.array(expected, np.float32).view(np.uint32).tolist()


def test_the_example_of_the_format_document() -> None:
    out = np.empty(4, np.float32)
    Product(2, 2, 1, "BF16", 0.5).fill(bytes.fromhex("803F 00C0 4040 0000"), 0, out)
    assert out.tolist() == [1.5, 0.0, -3.0, 0.0]
    assert np.signbit(out).tolist() == [False, True, True, True]


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    assert Product.of((8, 3, 5, 5), 2, "F16", 1.0) == Product(8, 75, 2, "F16", 1.0)
    assert Product.of((8, 3, 5, 5), 2, "F16", 1.0).nbytes == (8 + 75) * 2 * 2


@pytest.mark.parametrize("size", [0, 1, 23, 25])
def test_another_size_is_refused(size: int) -> None:
    product = Product(2, 1, 2, "F32", 1.0)
    assert product.nbytes == 24
    with pytest.raises(CorruptPayload, match=f"{size} bytes, expected 24") as caught:
        product.fill(bytes(size), 0, np.empty(2, np.float32))
    assert caught.value.next_step


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("dtype", sorted(BYTES))
def test_a_factor_that_is_no_number_is_refused(number: float, place: int, dtype: str) -> None:
    factors = torch.ones(4, dtype=TORCH[dtype])
    factors[place] = number
    with pytest.raises(CorruptPayload, match="Inf or NaN"):
        Product(2, 2, 1, dtype, 1.0).fill(payload_of(factors), 0, np.empty(4, np.float32))
