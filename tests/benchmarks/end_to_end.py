"""Time and peak memory of push-delta and apply on Llama-shaped bf16 models of any size.

    python tests/benchmarks/end_to_end.py --gb 1.7 7 --folder /some/disk

Each job runs in a process of its own; its peak resident memory is the kernel's count (Linux).
"copy" reads the target and writes it again in 8 MiB pieces: what disk and page cache allow. The
weights are drawn: base N(0, 0.02), tuned = base + N(0, 6.5e-5), which leaves 45 % of the elements
unchanged, target = base + N(0, 2e-3). Needs four times
the model's size on disk. Medians over --runs runs; seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from hubdiff.safetensors_io import build_header

HIDDEN, INNER, ROWS = 2048, 5632, 32000
POOL = 1 << 23  # distinct elements per model; repeated, shifted, until the model is full

JOBS = {
    "copy": "copy",
    "push-delta": "hubdiff.push_delta(d / 'tuned', d / 'delta', base=d / 'base')",
    "push-delta --plain": "hubdiff.push_delta(d/'tuned', d/'plain', base=d/'base', plain=True)",
    "apply, other target": "hubdiff.apply(d / 'delta', d / 'target', output=d / 'out')",
    "apply, own base": "hubdiff.apply(d / 'delta', d / 'base', output=d / 'out')",
    "apply, dense delta": "hubdiff.apply(d / 'plain', d / 'target', output=d / 'out')",
}
CHILD = r"""
import json, re, sys, time
from pathlib import Path
d = Path(sys.argv[1])
began = time.perf_counter()
import hubdiff
{job}
print(json.dumps({{
    "seconds": time.perf_counter() - began,
    "cpu": time.process_time(),
    # Not ru_maxrss: that starts from what the parent held when it forked.
    "peak": int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024,
}}))
"""
COPY = """
with open(d / 'target/model.safetensors', 'rb') as a, open(d / 'copied', 'wb') as b:
    while piece := a.read(8 << 20):
        b.write(piece)
"""


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    layer = {
        "input_layernorm": (HIDDEN,),
        "mlp.down_proj": (HIDDEN, INNER),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        **{f"self_attn.{k}_proj": (HIDDEN, HIDDEN) for k in "koqv"},
    }
    per_layer = sum(math.prod(shape) for shape in layer.values())
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * ROWS * HIDDEN) / per_layer))
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN)}
    for i in range(layers):
        result |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return result | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (ROWS, HIDDEN)}


def bf16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_models(folder: Path, gigabytes: float) -> int:
    """base, tuned and target under ``folder``; their size in bytes."""
    rng = np.random.default_rng(0)
    base = bf16(rng.standard_normal(POOL, dtype=np.float32) * 0.02)
    start = (base.astype(np.uint32) << 16).view(np.float32)
    pools = {
        "base": base,
        "tuned": bf16(start + rng.standard_normal(POOL, dtype=np.float32) * 6.5e-5),
        "target": bf16(start + rng.standard_normal(POOL, dtype=np.float32) * 2e-3),
    }
    sized = [(name, "BF16", s, 2 * math.prod(s)) for name, s in shapes(gigabytes).items()]
    header = build_header(sized, {"format": "pt"})
    total = sum(nbytes for *_, nbytes in sized)
    for name, pool in pools.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        with (folder / name / "model.safetensors").open("wb") as file:
            file.write(header)
            for i in range(-(-total // (2 * POOL))):
                file.write(np.roll(pool, 977 * i).tobytes()[: total - i * 2 * POOL])
    return len(header) + total


def run(job: str, folder: Path) -> dict[str, float]:
    for made in ("out", "copied"):
        shutil.rmtree(folder / made, ignore_errors=True)
    (folder / "copied").unlink(missing_ok=True)
    for made, name in (("push-delta", "delta"), ("push-delta --plain", "plain")):
        if job == made:
            shutil.rmtree(folder / name, ignore_errors=True)
    code = CHILD.format(job=COPY if job == "copy" else JOBS[job])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(gigabytes: float, folder: Path, runs: int) -> list[dict[str, object]]:
    size = make_models(folder, gigabytes)
    rows: list[dict[str, object]] = []
    for job in JOBS:
        results = [run(job, folder) for _ in range(runs)]
        seconds = [result["seconds"] for result in results]
        rows.append(
            {
                "job": job,
                "model_bytes": size,
                "seconds": statistics.median(seconds),
                "min": min(seconds),
                "max": max(seconds),
                "cpu": statistics.median(result["cpu"] for result in results),
                "peak_bytes": max(result["peak"] for result in results),
            }
        )
    for name in ("delta", "plain"):
        layers = (folder / name).glob("*.safetensors")
        nbytes = sum(file.stat().st_size for file in layers)
        rows.append({"job": f"size of {name}", "model_bytes": size, "bytes": nbytes})
    return rows


def print_rows(rows: list[dict[str, object]]) -> None:
    print(f"{'job':22} {'model':>8} {'wall s (min–max)':>20} {'cpu s':>7} {'GB/s':>6} {'peak':>8}")
    for row in rows:
        model = float(str(row["model_bytes"]))
        line = f"{row['job']!s:22} {model / 1e9:6.2f}GB"
        if "bytes" in row:
            nbytes = float(str(row["bytes"]))
            print(f"{line} {nbytes / 1e9:.3f} GB, {nbytes / model:.1%} of the model")
            continue
        wall = f"{row['seconds']:.1f} ({row['min']:.1f}–{row['max']:.1f})"
        rate = model / 1e9 / float(str(row["seconds"]))
        peak = float(str(row["peak_bytes"])) / 1e6
        print(f"{line} {wall:>20} {row['cpu']:7.1f} {rate:6.2f} {peak:6.0f}MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[1.7])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-models"))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for gigabytes in options.gb:
        folder = options.folder / f"{gigabytes:g}"
        shutil.rmtree(folder, ignore_errors=True)
        rows += measure(gigabytes, folder, options.runs)
        shutil.rmtree(folder)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print_rows(rows)
    if options.json:
        options.json.write_text(json.dumps({"at": time.strftime("%F"), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
