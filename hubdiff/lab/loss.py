"""The loss of a model on examples: the mean of −log p over the tokens that count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset

Tokens = tuple[list[int], int]


def tokenized(examples: Dataset, tokenizer: Any, length: int) -> list[Tokens]:
    """Each example as its tokens, ``length`` at most, and how many of the first don't count: those
    of the prompt."""
    return [_tokens(row, tokenizer, length) for row in examples]


def _tokens(row: dict[str, Any], tokenizer: Any, length: int) -> Tokens:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if "text" in row:
        return [*tokenizer(row["text"])["input_ids"], *end][:length], 1
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        start = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(
            [*prompt, *completion], tokenize=True, return_dict=False
        )
        return whole[:length], len(start)
    start = tokenizer(prompt)["input_ids"]
    rest = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*start, *rest, *end][:length], max(1, len(start))


@torch.inference_mode()
def mean_loss(model: Any, examples: Sequence[Tokens], batch: int) -> float:
    """In nats for each token that counts. Rows of a batch are filled up on the right, where nothing
    that counts can see it."""
    total, count = 0.0, 0
    for first in range(0, len(examples), batch):
        rows = examples[first : first + batch]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        counts = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, (tokens, start) in enumerate(rows):
            ids[number, : len(tokens)] = torch.tensor(tokens)
            counts[number, start : len(tokens)] = True
        ids, counts = ids.to(model.device), counts.to(model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
        chosen = counts[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[chosen].float(), ids[:, 1:][chosen], reduction="sum"
        )
        total, count = total + float(losses), count + int(chosen.sum())
    return total / count if count else float("nan")
