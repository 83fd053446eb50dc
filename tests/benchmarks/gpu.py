"""What a GPU does for apply and load, against what its memory, the bus and the files allow.

    python tests/benchmarks/gpu.py --gb 16 --folder /some/fast/disk --json gpu.json

- kernels: ``numerics.add`` and the decoding of packed blobs on data that lies on the device
  already, in GB/s of what they must read and write at least, beside a device-to-device copy
- decoding: whole blobs, zstd included, by numpy, by the device, and by nvCOMP where it is installed
- limits: copies to and from the device (pinned, block by block), file reads from the page cache and
  file writes, sha256 (of a rebuilt file) and blake3 (of any other result) on one core
- end to end: ``apply`` from the page cache with ``--device cpu`` and ``cuda`` (their files are
  compared), ``load(device_map="cuda")``, and the peak of device memory each needs

The model is shaped like Llama 8B (``--gb`` of bf16; fewer GB, fewer layers), its weights are
drawn: base N(0, 0.02), tuned = base + N(0, 6.5e-5), which leaves 45 % of the elements unchanged.
Medians of ``--runs`` runs, with the least and the most; seeds are fixed. Needs four times the model
on disk.
Without a GPU the same functions run once at a tiny size on the CPU, as a check of themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import hubdiff
from hubdiff import numerics
from hubdiff.device import Gpu, _Blob
from hubdiff.encodings import ENCODINGS, SEGMENT, Stream
from hubdiff.hashing import Hasher, tensor_hash
from hubdiff.nvcomp import frame_decoder
from hubdiff.safetensors_io import build_header
from hubdiff.stream import BLOCK_BYTES

POOL = 1 << 23  # distinct elements per model; repeated, shifted, until the model is full
Row = dict[str, object]


def timed(call: Callable[[], object], runs: int, nbytes: int, device: torch.device) -> Row:
    """Seconds and GB/s of ``nbytes``, after one call to warm up."""
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return spread(seconds[1:], nbytes)


def spread(seconds: list[float], nbytes: int) -> Row:
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "min": min(seconds),
        "max": max(seconds),
        "bytes": nbytes,
        "GB/s": nbytes / middle / 1e9,
    }


def bf16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def pools(seed: int = 0, count: int = POOL) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = bf16(rng.standard_normal(count, dtype=np.float32) * 0.02)
    start = (base.astype(np.uint32) << 16).view(np.float32)
    tuned = bf16(start + rng.standard_normal(count, dtype=np.float32) * 6.5e-5)
    return {"base": base, "tuned": tuned}


# --- kernels, on what lies on the device ---


def kernels(device: torch.device, elements: int, runs: int) -> dict[str, Row]:
    drawn = pools(count=elements)
    target = numerics.from_bits(drawn["base"], "BF16")
    delta = numerics.difference(numerics.from_bits(drawn["tuned"], "BF16"), target, "BF16")
    assert delta.lo is not None
    here, there = target.to(device), delta.hi.to(device)
    moved = numerics.Difference(there, delta.lo.to(device))
    alone = numerics.Difference(there, None)
    size = 2 * elements
    rows = {
        "device to device copy": timed(here.clone, runs, 2 * size, device),
        "add hi": timed(lambda: numerics.add(here, alone, 1.0, here.dtype), runs, 3 * size, device),
        "add hi and lo": timed(
            lambda: numerics.add(here, moved, 1.0, here.dtype), runs, 4 * size, device
        ),
        "add 0.7 (hi and lo)": timed(
            lambda: numerics.add(here, moved, 0.7, here.dtype), runs, 4 * size, device
        ),
    }
    bits = numerics.to_bits(delta.hi)
    sparse = np.where(np.arange(elements) % 9 == 0, bits, np.uint16(0x8000))
    for name, symbols in (("decode ranks", bits), ("decode gaps", sparse)):
        rows[name] = _decoding(symbols[:SEGMENT], device, runs)
    return rows


def _decoding(symbols: np.ndarray, device: torch.device, runs: int) -> Row:
    """One segment out of streams that lie on the device, decompressed."""
    blob = memoryview(ENCODINGS["packed"].encode(symbols))
    kept: dict[int, torch.Tensor] = {}

    def load(stream: Stream) -> torch.Tensor:
        place = np.frombuffer(stream.body, np.uint8).ctypes.data
        if place not in kept:
            kept[place] = torch.from_numpy(stream.content().copy()).to(device)
        return kept[place]

    made = _Blob(load, device, len(symbols), 2).from_packed(blob)
    assert made.cpu().numpy().tobytes() == symbols.tobytes()
    read = sum(stream.numel() for stream in kept.values())
    call = lambda: _Blob(load, device, len(symbols), 2).from_packed(blob)  # noqa: E731
    return timed(call, runs, read + symbols.nbytes, device)


def frames(device: torch.device, runs: int) -> dict[str, Row]:
    """Whole blobs from memory to decoded symbols, zstd frames included: by the CPU, by nvCOMP."""
    drawn = pools(count=SEGMENT)
    tuned, base = (numerics.from_bits(drawn[name], "BF16") for name in ("tuned", "base"))
    symbols = numerics.to_bits(numerics.difference(tuned, base, "BF16").hi)
    blob = memoryview(ENCODINGS["packed"].encode(symbols))
    out = np.empty_like(symbols)
    rows = {"numpy": timed(lambda: ENCODINGS["packed"].decode(blob, out), runs, out.nbytes, device)}
    engine = Gpu(device)
    decoders = {"frames on the CPU": None, "frames by nvCOMP": frame_decoder(device)}
    for name, decoder in decoders.items():
        if name.endswith("nvCOMP") and decoder is None:
            continue
        engine._frames = decoder

        def decode() -> None:
            from hubdiff.manifest import Part

            with engine.block() as work:
                part = Part("delta", ("hi",), "packed", "BF16", len(blob), "")
                work.decode(part, blob, len(symbols), "benchmark")
                work.settle()

        rows[name] = timed(decode, runs, out.nbytes, device)
    return rows


# --- limits ---


def limits(device: torch.device, folder: Path, nbytes: int, runs: int) -> dict[str, Row]:
    pinned = device.type == "cuda"
    blocks = max(1, nbytes // BLOCK_BYTES)
    here = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned)
    there = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=device)

    def copies(into: torch.Tensor, out_of: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(blocks):
                into.copy_(out_of, non_blocking=pinned)

        return run

    file = folder / "limit"
    data = np.random.default_rng(0).bytes(BLOCK_BYTES)

    def write() -> None:
        with file.open("wb") as output:
            for _ in range(blocks):
                output.write(data)
            output.flush()
            os.fsync(output.fileno())

    def read() -> None:
        buffer = here.numpy().data
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass

    def hashing(hasher: Callable[[], Hasher]) -> Callable[[], None]:
        def run() -> None:
            digest = hasher()
            for _ in range(blocks):
                digest.update(data)

        return run

    total = blocks * BLOCK_BYTES
    rows = {
        "host to device": timed(copies(there, here), runs, total, device),
        "device to host": timed(copies(here, there), runs, total, device),
        "file write, synced": timed(write, runs, total, device),
        "file read, page cache": timed(read, runs, total, device),
        "sha256, one core": timed(hashing(hashlib.sha256), runs, total, device),
        "blake3, one core": timed(hashing(tensor_hash), runs, total, device),
    }
    file.unlink()
    return rows


# --- end to end ---


def config(layers: int, hidden: int, inner: int, rows: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128 or 1,
        "num_key_value_heads": hidden // 512 or 1,
        "head_dim": min(128, hidden),
        "vocab_size": rows,
        "tie_word_embeddings": False,
    }


def shapes(made: dict[str, object]) -> dict[str, tuple[int, ...]]:
    hidden, inner, rows, head, heads, groups, layers = (
        int(str(made[name]))
        for name in (
            "hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads",
            "num_key_value_heads", "num_hidden_layers",
        )
    )  # fmt: skip
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (groups * head, hidden),
        "self_attn.v_proj": (groups * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
    }
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for i in range(layers):
        result |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return result | {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}


def make_models(folder: Path, gigabytes: float | None) -> int:
    """base and tuned under ``folder``, and the delta; the size of a model in bytes. No size: one
    that is as small as it gets."""
    if gigabytes is None:
        made = config(1, 128, 256, 512)
    else:
        per_layer = 2 * 218_112_000  # bytes of one layer of Llama 8B
        layers = max(1, round((gigabytes * 1e9 - 4 * 128_256 * 4096) / per_layer))
        made = config(layers, 4096, 14336, 128_256)
    sized = [(name, "BF16", s, 2 * math.prod(s)) for name, s in shapes(made).items()]
    header = build_header(sized, {"format": "pt"})
    total = sum(nbytes for *_, nbytes in sized)
    for name, pool in pools(count=POOL if gigabytes else 1 << 16).items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(made))
        with (folder / name / "model.safetensors").open("wb") as file:
            file.write(header)
            for i in range(-(-total // pool.nbytes)):
                file.write(np.roll(pool, 977 * i).tobytes()[: total - i * pool.nbytes])
    hubdiff.push_delta(folder / "tuned", folder / "delta", base=folder / "base")
    return len(header) + total


def end_to_end(device: torch.device, folder: Path, size: int, runs: int) -> dict[str, Row]:
    rows = {}
    for case, scale in (("own base", 1.0), ("transfer", 0.7)):
        files = set()
        for name in dict.fromkeys(("cpu", str(device))):
            rows[f"apply, {case}, {name}"] = _measured(
                lambda name=name, scale=scale: _apply(folder, name, scale), runs, size, device
            )
            files.add(_sha256(folder / "out" / "model.safetensors"))
        assert len(files) == 1, f"{device} gives other bits than the CPU ({case})"
        if case == "own base":
            assert files == {_sha256(folder / "tuned" / "model.safetensors")}
        shutil.rmtree(folder / "out")
    rows[f"load, own base, {device}"] = _measured(
        lambda: hubdiff.load(folder / "delta", folder / "base", device_map={"": str(device)}),
        runs,
        size,
        device,
    )
    return rows


def _apply(folder: Path, device: str, scale: float) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    delta, base = folder / "delta", folder / "base"
    hubdiff.apply(delta, base, output=folder / "out", device=device, scale=scale)


def _measured(
    call: Callable[[], object], runs: int, size: int, device: torch.device
) -> dict[str, object]:
    if device.type != "cuda":
        return timed(call, runs, size, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    row = timed(call, runs, size, device)
    row["peak device bytes"] = torch.cuda.max_memory_allocated(device)
    row["peak device bytes, reserved"] = torch.cuda.max_memory_reserved(device)
    return row


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while piece := opened.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


# --- the report ---


def machine(device: torch.device) -> dict[str, object]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hubdiff": hubdiff.__version__,
        "nvcomp": frame_decoder(device) is not None,
        "seed": 0,
    }


def measure(
    device: torch.device, folder: Path, gigabytes: float | None, runs: int
) -> dict[str, dict[str, Row]]:
    small = gigabytes is None
    size = make_models(folder, gigabytes)
    parts: dict[str, Callable[[], dict[str, Row]]] = {
        "kernels, resident": lambda: kernels(device, 1 << (16 if small else 26), runs),
        "decoding a segment": lambda: frames(device, runs),
        "limits": lambda: limits(device, folder, size if small else 1 << 30, runs),
        "end to end": lambda: end_to_end(device, folder, size, runs),
    }
    report = {}
    for title, part in parts.items():
        report[title] = part()
        if not small:
            print(*lines(title, report[title]), sep="\n", flush=True)
    return report


def lines(title: str, rows: dict[str, Row]) -> list[str]:
    made = [title]
    for name, row in rows.items():
        seconds = f"{row['seconds']:.4g} s ({row['min']:.4g}–{row['max']:.4g})"
        peak = row.get("peak device bytes")
        more = f"  {int(str(peak)) / 1e9:.2f} GB on the device" if peak is not None else ""
        made.append(f"  {name:28} {seconds:34} {row['GB/s']:8.2f} GB/s{more}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=16.0, help="size of the model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the models are made and removed")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    here = torch.cuda.is_available()
    device = torch.device("cuda:0" if here else "cpu")
    if not here:
        print("There is no CUDA device here: nothing is measured, the benchmark checks itself.")
    about = machine(device)
    if here:
        print(about, flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.folder) as folder:
        gigabytes, runs = (options.gb, options.runs) if here else (None, 1)
        report = measure(device, Path(folder), gigabytes, runs)
    if not here:
        rows = sum(len(part) for part in report.values())
        print(f"It runs ({rows} results), and the results are the right bits.")
        return
    if options.json:
        numbers = {"at": time.strftime("%F"), "machine": about, "report": report}
        options.json.write_text(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
