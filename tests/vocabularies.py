"""Models of a few tensors whose rows stand for tokens, with real tokenizers, and what a transfer
between two of them must give: token by token, without any code of hubdiff."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import models
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Tensors = dict[str, torch.Tensor]


def tokenizer(words: Sequence[str], specials: Sequence[str] = ()) -> str:
    """A ``tokenizer.json`` of words, by row, and special tokens behind them."""
    made = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token=words[0]))
    made.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return str(made.to_str())


def tokens_of(folder: Path) -> dict[str, int]:
    """Token → row, as the tokenizers library reads a model's file."""
    found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return found


def table(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) * 0.02).to(torch.bfloat16)


def tensors(rows: int, width: int = 8, seed: int = 0) -> Tensors:
    return {
        EMBED: table(rows, width, seed),
        HEAD: table(rows, width, seed + 1),
        NORM: torch.ones(width, dtype=torch.bfloat16),
    }


def resized(given: Mapping[str, torch.Tensor], rows: int, seed: int = 5) -> Tensors:
    """The same model with so many rows: new ones are drawn, others cut off."""
    new = dict(given)
    for number, name in enumerate((EMBED, HEAD)):
        if name in given:
            old = given[name]
            more = table(max(0, rows - len(old)), old.shape[1], seed + number).to(old.dtype)
            new[name] = torch.cat([old, more])[:rows].clone()
    return new


def save(folder: Path, given: Mapping[str, torch.Tensor], text: str | None, **more: object) -> Path:
    """A model folder with this tokenizer; None: without one."""
    rows, width = given[EMBED].shape
    files = {"tokenizer.json": text} if text is not None else {}
    made = {"vocab_size": rows, "hidden_size": width, "num_hidden_layers": 0, **more}
    models.save(folder, given, files=files, **made)
    if text is None:
        (folder / "tokenizer.json").unlink()
    return folder


def read(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def exact(target: torch.Tensor, tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """round(target + (tuned − base)): bf16 numbers near 0.02, whose sum float64 holds."""
    wide = target.double() + (tuned.double() - base.double())
    if target.dtype != torch.bfloat16:
        return wide.to(target.dtype)
    quantum = 2 ** (wide.abs().clamp(min=2.0**-126).log2().floor() - 7)
    return ((wide / quantum).round() * quantum).to(torch.bfloat16)
