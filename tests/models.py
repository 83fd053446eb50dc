"""Small models for tests: real safetensors, configs, tokenizers in folders, and their fine-tunes.

The weights are drawn, not trained: what these tests check is bytes. Seeds are fixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, ROWS, LAYERS = 64, 96, 2


def config(**changes: object) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 4,
        "vocab_size": ROWS,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "bos_token_id": 1,
        **changes,
    }


def shapes() -> dict[str, tuple[int, ...]]:
    square, up, down = (HIDDEN, HIDDEN), (2 * HIDDEN, HIDDEN), (HIDDEN, 2 * HIDDEN)
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        result |= {f"{layer}.self_attn.{k}_proj.weight": square for k in "qkvo"}
        result |= {f"{layer}.mlp.gate_proj.weight": up, f"{layer}.mlp.up_proj.weight": up}
        result |= {f"{layer}.mlp.down_proj.weight": down}
        result |= {
            f"{layer}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")
        }
    return result | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (ROWS, HIDDEN)}


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for name, shape in shapes().items()
    }


def moved(
    tensors: Mapping[str, torch.Tensor], step: float = 2e-4, seed: int = 1, frozen: str = "norm"
) -> dict[str, torch.Tensor]:
    """A fine-tune: every tensor but the ``frozen`` ones moves by about ``step``."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator) * step
        keep = frozen in name or not tensor.is_floating_point()
        result[name] = tensor if keep else (tensor.float() + noise).to(tensor.dtype)
    return result


def save(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    files: Mapping[str, str] | None = None,
    **changes: object,
) -> Path:
    """A model folder as ``save_pretrained`` leaves it; ``files`` are more files, by name → text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**changes), indent=2, sort_keys=True))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file, by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
