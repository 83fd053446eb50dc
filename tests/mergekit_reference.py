"""What mergekit makes of small models, for test_mergekit.py to compare with.

    python tests/mergekit_reference.py FOLDER

writes ``tests/golden/mergekit/``: the three models (base and two tunes of it, Llama-shaped, in
float32 and bfloat16) and what mergekit's ``task_arithmetic``, ``ties`` and ``dare_linear`` make of
them. mergekit is LGPL and stays outside hubdiff's environment: a virtual environment of its own is
made in FOLDER, with this repository's ``constraints.txt``, unless one is there already.

mergekit computes in float32 (``dtype: float32``), rounded to the models' dtype at the end
(``out_dtype``). Three things are set so that both sides do the same:

- the mask of ``dare_linear``: mergekit draws from torch's global generator, so its ``bernoulli`` is
  handed the mask that hubdiff draws;
- its rescaling: mergekit scales what is left of Δ to the L1 norm Δ had, the paper by 1/density. It
  runs with ``rescale: false`` and weights divided by the density;
- which of equally large elements TIES keeps: mergekit sorts with an unstable sort, so it is open
  (and differs here for 2 % of those kept); its ``argsort`` is made stable, lowest index first.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/mergekit"
MODELS = ("base", "a", "b")
WEIGHTS = {"a": 0.7, "b": -0.4}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
DENSITY, SEED = 0.3, 11
# What each case is called, what hubdiff is asked for, and what mergekit is.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {"merge_method": "task_arithmetic"}),
    "ties": (
        {"method": "ties", "density": DENSITY},
        {"merge_method": "ties", "density": DENSITY},
    ),
    "ties-scaled": (
        {"method": "ties", "density": 0.05, "scale": 0.6},
        {"merge_method": "ties", "density": 0.05, "lambda": 0.6},
    ),
    "dare": (
        {"method": "dare", "density": DENSITY, "seed": SEED},
        {"merge_method": "dare_linear", "density": DENSITY, "rescale": False},
    ),
}
HIDDEN, ROWS = 16, 24


def shapes() -> dict[str, tuple[int, ...]]:
    layer, wide = "model.layers.0", 2 * HIDDEN
    return {
        "model.embed_tokens.weight": (ROWS, HIDDEN),
        **{f"{layer}.self_attn.{k}_proj.weight": (HIDDEN, HIDDEN) for k in "qkvo"},
        f"{layer}.mlp.gate_proj.weight": (wide, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (wide, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, wide),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (ROWS, HIDDEN),
    }


def config(dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "vocab_size": ROWS,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def models(dtype: str) -> dict[str, dict[str, Any]]:
    """Base and two tunes; of bfloat16 weights the steps are a few units in the last place, so that
    many magnitudes of Δ are equal, and a third of the elements does not move."""
    import torch

    generator = torch.Generator().manual_seed(3)

    def drawn(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    base = {name: drawn(shape, 0.02) for name, shape in shapes().items()}
    made = {"base": base}
    for name in ("a", "b"):
        steps = {n: drawn(t.shape, 2e-4) * (drawn(t.shape, 1) > -0.5) for n, t in base.items()}
        made[name] = {n: t.to(getattr(torch, dtype)).float() + steps[n] for n, t in base.items()}
    return {
        name: {n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}
        for name, tensors in made.items()
    }


def saved(folder: Path, tensors: dict[str, Any], dtype: str) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(dtype)))
    return folder


def masks(base: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    """What hubdiff keeps of each tensor for the case ``dare``."""
    import torch
    from blake3 import blake3

    from hubdiff.methods import drawn

    def digest(tensor: torch.Tensor) -> str:
        return blake3(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()

    found = {}
    for name, tensor in base.items():
        identity = f"{name}\0{digest(tensor)}\0{digest(tuned[name])}"
        kept = drawn(identity, SEED, 0, tensor.numel(), DENSITY)
        found[name] = kept.reshape(tensor.shape)
    return found


# --- in mergekit's environment ---


def run_mergekit(folder: Path, dtype: str) -> None:
    """Every case on the models in ``folder``, into ``folder/CASE.safetensors``."""
    import mergekit.sparsify as sparsify
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file, save_file

    base = load_file(folder / "base/model.safetensors")
    known = {}
    for name in WEIGHTS:
        kept = load_file(folder / f"masks-{name}.safetensors")
        for key, tensor in load_file(folder / name / "model.safetensors").items():
            known[(tensor.float() - base[key].float()).numpy().tobytes()] = kept[key].float()
    bernoulli, torch_bernoulli = sparsify.bernoulli, torch.bernoulli

    def ours(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        torch.bernoulli = lambda _: known[tensor.numpy().tobytes()]
        try:
            return bernoulli(tensor, *arguments, **named)
        finally:
            torch.bernoulli = torch_bernoulli

    sparsify.bernoulli = ours
    torch.argsort = functools.partial(torch.argsort, stable=True)
    for case, (_, settings) in CASES.items():
        said = dict(settings)
        density = said.pop("density", None)
        divisor = density if case == "dare" else 1.0
        inputs = [{"model": str(folder / "base")}]
        for name, weight in WEIGHTS.items():
            parameters = {"weight": weight / divisor, **({"density": density} if density else {})}
            inputs.append({"model": str(folder / name), "parameters": parameters})
        shared = {key: said.pop(key) for key in ("lambda", "rescale") if key in said}
        document = {
            **said,
            "base_model": str(folder / "base"),
            "models": inputs,
            "parameters": shared,
            "dtype": "float32",
            "out_dtype": DTYPES[dtype],
        }
        out = folder / f"out-{case}"
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(document), str(out), options)
        made: dict[str, torch.Tensor] = {}
        for file in out.glob("*.safetensors"):
            made |= load_file(file)
        save_file(made, folder / f"{case}.safetensors")


# --- in hubdiff's ---


def reference(python: Path, golden: Path) -> None:
    """Write the golden files with the mergekit of ``python``."""
    from safetensors.torch import save_file

    golden.mkdir(parents=True, exist_ok=True)
    for short, dtype in DTYPES.items():
        made = models(dtype)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for model, tensors in made.items():
                saved(folder / model, tensors, dtype)
            for model in WEIGHTS:
                save_file(masks(made["base"], made[model]), folder / f"masks-{model}.safetensors")
            subprocess.run([python, __file__, "--run", folder, short], check=True)
            for case in CASES:
                data = (folder / f"{case}.safetensors").read_bytes()
                (golden / f"{short}-{case}.safetensors").write_bytes(data)
        inputs = {f"{model}/{n}": t for model, tensors in made.items() for n, t in tensors.items()}
        save_file(inputs, golden / f"{short}-inputs.safetensors")


def environment(folder: Path) -> Path:
    """The Python of an environment with mergekit."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        constraints = ROOT / "constraints.txt"
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "-c", constraints, "mergekit==0.1.5"],
            check=True,
        )
    return python


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        run_mergekit(Path(sys.argv[2]), sys.argv[3])
    else:
        reference(environment(Path(sys.argv[1])), GOLDEN)
