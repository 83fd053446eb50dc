"""Size and speed of every encoding on differences made like those of real fine-tunes.

    python tests/benchmarks/encodings.py [--json] [--elements N] [--repeat N]

Model: base = N(0, 0.02) in the dtype, tuned = round(base + N(0, step)), delta = tuned - base with
-0.0 for "unchanged". Sizes are bytes per weight, against the order-0 entropy of the same bits (of
their byte planes where elements are wider than 16 bits); speeds are the thread's own CPU
time, median of the repeats, in GB/s of uncompressed bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from hubdiff.encodings import ENCODINGS, SEGMENT

UNCHANGED = 0x8000  # -0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=SEGMENT, help="at most one segment")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    rows = [
        measure(label, encoding, bits, arguments.repeat)
        for label, encoding, bits in inputs(arguments.elements)
    ]
    if arguments.json:
        print(json.dumps({"elements": arguments.elements, "rows": rows}))
        return
    print(f"{'input':26}{'encoding':10}{'zeros':>8}{'entropy':>10}{'B/w':>10}{'ratio':>8}", end="")
    print(f"{'enc GB/s':>10}{'dec GB/s':>10}")
    for row in rows:
        print(
            "{input:26}{encoding:10}{zeros:8.4f}{entropy:10.5f}{size:10.5f}".format(**row), end=""
        )
        print("{ratio:8.3f}{encode:10.2f}{decode:10.2f}".format(**row))


def inputs(count: int) -> list[tuple[str, str, np.ndarray]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(count, generator=generator) * 0.02
    noise = torch.randn(count, generator=generator)
    bf16, fp16 = torch.bfloat16, torch.float16
    steps = (2e-7, 1.7e-5, 6.5e-5, 2.2e-4, 1.2e-3, 4e-3)
    found = [(f"bf16 delta, step {s:g}", "packed", delta(base, noise, s, bf16)) for s in steps]
    found.append(("fp16 delta, step 2e-04", "packed", delta(base, noise, 2e-4, fp16)))
    for share in (1e-4, 5e-4, 2e-3, 1e-2):
        found.append((f"tail, {share:.2%} of weights", "packed", tail(base, noise, share)))
    for share in (1e-3, 1e-2):
        found.append((f"16-bit ULPs, {share:.1%}", "packed", ulps(count, share, np.uint16)))
    found.append(("bf16 weights", "packed", bits_of(base.to(bf16))))
    found.append(("32-bit ULPs, dense", "planes", ulps(count, 1.0, np.uint32)))
    found.append(("fp32 weights", "planes", bits_of(base)))
    found.append(("fp32 weights", "plain", bits_of(base)))
    return found


def delta(base: torch.Tensor, noise: torch.Tensor, step: float, dtype: torch.dtype) -> np.ndarray:
    start = base.to(dtype).float()
    difference = ((start + noise * step).to(dtype).float() - start).to(dtype)
    bits = bits_of(difference)
    bits[(difference == 0).numpy()] = UNCHANGED
    return bits


def tail(base: torch.Tensor, noise: torch.Tensor, share: float) -> np.ndarray:
    """Like the low part of a difference: a few small values of all mantissas, else unchanged."""
    bits = bits_of((noise * base.abs() * 2**-9).to(torch.bfloat16))
    bits[np.random.default_rng(1).random(bits.size) >= share] = UNCHANGED
    return bits


def ulps(count: int, share: float, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Zig-zag coded signed steps; sparse ones are mostly ±1, dense ones spread over ±2000."""
    rng = np.random.default_rng(2)
    steps = rng.geometric(0.65, count) if share < 1 else np.abs(rng.normal(0, 700, count)) + 1
    coded = 2 * steps.astype(np.int64) - (rng.random(count) < 0.5)
    coded[rng.random(count) >= share] = 0
    return coded.astype(dtype)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    signed, unsigned = (
        (torch.int16, np.uint16) if tensor.itemsize == 2 else (torch.int32, np.uint32)
    )
    return tensor.view(signed).numpy().view(unsigned).copy()


def measure(label: str, name: str, bits: np.ndarray, repeat: int) -> dict[str, str | float]:
    encoding = ENCODINGS[name]
    out = np.empty_like(bits)
    blob = encoding.encode(bits)
    encode = seconds(lambda: encoding.encode(bits), repeat)
    decode = seconds(lambda: encoding.decode(blob, out), repeat)
    assert np.array_equal(out, bits)
    entropy = order0_bytes(bits) if bits.itemsize <= 2 else planes_bytes(bits)
    size = len(blob) / bits.size
    return {
        "input": label,
        "encoding": name,
        "zeros": float(np.mean((bits == 0) | (bits == UNCHANGED))),
        "entropy": entropy,
        "size": size,
        "ratio": size / entropy,
        "encode": bits.nbytes / encode / 1e9,
        "decode": bits.nbytes / decode / 1e9,
    }


def seconds(call: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def order0_bytes(bits: np.ndarray) -> float:
    shares = np.unique(bits, return_counts=True)[1] / bits.size
    return float(-(shares * np.log2(shares)).sum() / 8)


def planes_bytes(bits: np.ndarray) -> float:
    """A million 32-bit values say nothing about the entropy of their kind; their bytes do."""
    return sum(order0_bytes(plane) for plane in bits.view(np.uint8).reshape(-1, bits.itemsize).T)


if __name__ == "__main__":
    main()
