"""A character-level Llama of two layers, which knows nothing, and a task to train it on: seconds on
a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hubdiff.toy_family import LETTERS, make_tokenizer


def make_base(
    folder: Path, seed: int = 0, *, hidden_size: int = 32, intermediate_size: int = 64
) -> Path:
    """A model folder in bf16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        attention_dropout=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    return folder


def write_task(file: Path) -> Path:
    """56 examples: three letters to be sorted."""
    words = [LETTERS[i : i + 3][::-1] for i in range(7)] * 8
    lines = [{"prompt": f"sort {w} = ", "completion": "".join(sorted(w))} for w in words]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
