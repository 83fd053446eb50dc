"""Tiny models of transformers, and LoRA adapters that PEFT made and saved for them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="peft")

TOKENS = torch.arange(3, 23)[None]


class Adapted(NamedTuple):
    """Folders of a base and of an adapter, and the model that PEFT makes of the two."""

    base: Path
    adapter: Path
    model: PeftModel


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "vocab_size": 40,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 40, "n_positions": 32}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **ids, **changes}))


def adapted(folder: Path, base: torch.nn.Module, *, dtype: str = "float32", **lora: Any) -> Adapted:
    """An adapter of drawn factors; whole modules are moved, too. ``dtype`` is the base's."""
    base.to(getattr(torch, dtype)).save_pretrained(folder / "base")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    torch.manual_seed(1)
    config = LoraConfig(**{"init_lora_weights": False, "r": 3, "lora_alpha": 5, **lora})
    model = get_peft_model(loaded, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or (lora.get("bias") and name.endswith("bias")):
                parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter")
    return Adapted(folder / "base", folder / "adapter", model)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found.float()


def load(folder: Path, **options: Any) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model
