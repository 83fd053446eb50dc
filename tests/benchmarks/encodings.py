"""Size and speed of every encoding, beside other codecs, on differences like real fine-tunes'.

    python tests/benchmarks/encodings.py [--elements N] --json encodings.json --readme README.md

Model: base = N(0, 0.02) in the dtype, tuned = round(base + N(0, step)), delta = tuned - base: hi,
and the tail that makes it exact. Sizes are bytes per weight, against the order-0 entropy of the
same bits (of their byte planes where elements are wider than 16 bits; of hi and lo added up);
speeds are GB/s of uncompressed weights in CPU time of one thread. Peers get hi alone, in a process
of their own; pcodec encodes each twice, as signed and as rotated integers, and keeps the smaller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import (
    PROGRAMS,
    Goal,
    PeerFailed,
    Peers,
    Row,
    arguments,
    goals_table,
    main,
    order0_bytes,
    origin,
    spread,
    table,
)
from safetensors.numpy import save_file

from hubdiff.encodings import ENCODINGS, SEGMENT, tails
from hubdiff.encodings.tails import Tail
from hubdiff.numerics import DTYPES
from hubdiff.segment_delta import Floats, compare

UNCHANGED = 0x8000  # -0.0
STEPS = {  # of the noise → what leaves as many elements unchanged
    2e-7: "RL-like",
    1.7e-5: "SFT at 5e-6",
    6.5e-5: "SFT at 2e-5",
    2.2e-4: "SFT at 1e-4",
    1.2e-3: "SFT, short-trained base",
    4e-3: "continued pre-training",
}
GOALS = {"RL-like": 3.0, "SFT at 5e-6": 1.0, "SFT at 2e-5": 1.0, "SFT at 1e-4": 1.0}
CODECS = ("zipnn", "pcodec", "zstd-1")


@dataclass(frozen=True)
class Input:
    """``bits`` for the encoding of that name; of a difference the ``lo`` and the dtype too."""

    what: str
    encoding: str
    bits: np.ndarray
    dtype: str = ""
    lo: Tail | None = None

    @property
    def entropy(self) -> float:
        if self.bits.itemsize > 2:
            return planes_bytes(self.bits)
        lo = order0_bytes(self.lo.full(self.bits.size)) if self.lo else 0
        return order0_bytes(self.bits) + lo

    def encode(self) -> list[bytes]:
        blob = ENCODINGS[self.encoding].encode(self.bits)
        return [blob, tails.encode(self.lo, self.bits, self.dtype, len(blob)) if self.lo else b""]

    def decode(self, blobs: list[bytes], out: np.ndarray) -> Tail | None:
        ENCODINGS[self.encoding].decode(blobs[0], out)
        return tails.decode(blobs[1], out, self.dtype) if self.lo else None


def inputs(count: int) -> list[Input]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(count, generator=generator) * 0.02
    noise = torch.randn(count, generator=generator)
    found = [delta(label(name), base, noise * step, "BF16") for step, name in STEPS.items()]
    found.append(delta("fp16 delta, SFT at 2e-5", base, noise * 2e-4, "F16"))
    for share in (1e-3, 1e-2):
        found.append(Input(f"16-bit ULPs, {share:.1%}", "packed", ulps(count, share, np.uint16)))
    found.append(Input("bf16 weights", "packed", bits_of(base.bfloat16())))
    found.append(Input("32-bit ULPs, dense", "planes", ulps(count, 1.0, np.uint32)))
    found.append(Input("fp32 weights", "planes", bits_of(base)))
    found.append(Input("fp32 weights", "plain", bits_of(base)))
    return found


def label(name: str) -> str:
    return f"bf16 delta, {name}"


def delta(what: str, base: torch.Tensor, step: torch.Tensor, dtype: str) -> Input:
    start = base.to(DTYPES[dtype])
    tuned = (start.float() + step).to(DTYPES[dtype])
    sides = (Floats(bits_of(side), dtype) for side in (tuned, start))
    found = compare(*sides, None, dtype)
    assert found.hi is not None
    return Input(what, "packed", found.hi, dtype, found.lo)


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


def measure_encoding(given: Input, runs: int) -> Row:
    bits, out = given.bits, np.empty_like(given.bits)
    blobs = given.encode()
    encode = seconds(given.encode, runs)
    decode = seconds(lambda: given.decode(blobs, out), runs)
    lo = given.decode(blobs, out)
    assert np.array_equal(out, bits)
    if given.lo and lo:
        assert np.array_equal(given.lo.full(bits.size), lo.full(bits.size))
    return {
        "input": given.what,
        "encoding": given.encoding + " + tail" * bool(given.lo),
        "zeros": float(np.mean((bits == 0) | (bits == UNCHANGED))),
        "entropy": given.entropy,
        "size": sum(map(len, blobs)) / bits.size,
        "encode": [bits.nbytes / s / 1e9 for s in encode],
        "decode": [bits.nbytes / s / 1e9 for s in decode],
    }


def seconds(call: Callable[[], object], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return times


def planes_bytes(bits: np.ndarray) -> float:
    """A million 32-bit values say nothing about the entropy of their kind; their bytes do."""
    return sum(order0_bytes(plane) for plane in bits.view(np.uint8).reshape(-1, bits.itemsize).T)


def measure_peers(tensors: dict[str, np.ndarray], others: Peers, runs: int) -> Row:
    """codec → input → its row, or why there is none."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "tensors.safetensors"
        save_file({name: bits.view(np.int16) for name, bits in tensors.items()}, file)
        try:
            words = (PROGRAMS / "peer_codecs.py", file, str(runs), *CODECS)
            found: Row = json.loads(others.process("zstandard", *words)["output"])
        except PeerFailed as reason:
            return {codec: {"failed": str(reason)} for codec in CODECS}
    return found


def measure(options: argparse.Namespace, others: Peers) -> Row:
    given = inputs(options.elements)
    rows = [measure_encoding(one, options.runs) for one in given]
    tensors = {one.what: one.bits for one in given[: len(STEPS)]}
    found = measure_peers(tensors, others, options.runs)
    failed = {codec: row.pop("failed") for codec, row in found.items() if "failed" in row}
    for codec, by_input in found.items():
        for what, row in by_input.items():
            bits = tensors[what]
            ours = next(one for one in rows if one["input"] == what)
            rows.append(
                {
                    **{key: ours[key] for key in ("input", "zeros")},
                    "entropy": order0_bytes(bits),
                    "encoding": codec,
                    "size": row["bytes"] / bits.size,
                    "encode": [bits.nbytes / s / 1e9 for s in row["encode"]],
                    "decode": [bits.nbytes / s / 1e9 for s in row["decode"]],
                }
            )
    order = [one.what for one in given]
    rows.sort(key=lambda row: order.index(row["input"]))
    return {
        "elements": options.elements,
        "rows": rows,
        "failed": failed,
    }


def render(document: Row) -> str:
    head = ["", "encoding", "zeros", "entropy", "B/w", "ratio", "enc GB/s", "dec GB/s"]
    rows = [
        [
            row["input"],
            row["encoding"],
            f"{row['zeros']:.4f}",
            f"{row['entropy']:.5f}",
            f"{row['size']:.5f}",
            f"{row['size'] / row['entropy']:.3f}",
            f"{statistics.median(row['encode']):.2f}",
            spread(row["decode"]),
        ]
        for row in document["rows"]
    ]
    failed = [f"{codec} did not run: {why}." for codec, why in document["failed"].items()]
    ours = {row["input"]: row for row in document["rows"] if row["encoding"] not in CODECS}
    goals = [
        Goal(f"decode, {what}, one core", ours[label(what)]["decode"], limit, "GB/s", at_least=True)
        for what, limit in GOALS.items()
    ]
    return "\n\n".join([origin(document), table(head, rows), *failed, goals_table(goals)])


if __name__ == "__main__":
    parser = arguments(__doc__, runs=9)
    parser.add_argument("--elements", type=int, default=SEGMENT, help="at most one segment")
    main("encodings", parser.parse_args(), measure, render)
