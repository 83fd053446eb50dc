"""Families of model versions, and a task to fine-tune each version on (``transfer_matrix.py``).

A family trains its versions one after the other, fine-tunes a model on its task, and scores it on
examples that no training saw. ``Characters`` is a Llama that reads characters and is trained from
nothing: M1…M3 on the first half of the standard library's sources (stage 1), M4 and M5 on the
other half mixed with easier examples of the task, at a learning rate that starts anew (stage 2).
That is what a mid-training stage does: it moves the weights far, and makes better bases.
``SmolLM2`` starts from a real model and trains it on with other text. Seeds are fixed.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from real_llm import IGNORED, make_base
from torch.nn.utils.rnn import pad_sequence
from training import json_lines

from hubdiff import toy_family as toy

Pair = tuple[str, str]  # prompt and answer
Curve = list[tuple[int, float]]  # steps taken, score
Batch = tuple[torch.Tensor, torch.Tensor]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP, WARM_UP = 1.0, 20


class Family(Protocol):
    count: int  # of versions
    stage_one: int  # how many of them are of the first stage; all, where there is one stage

    def train_version(self, number: int, before: Path | None, folder: Path) -> None:
        """Version ``number`` (from 0) as a bf16 folder, trained on from the one ``before``."""

    def fine_tune(self, model: Any, number: int) -> Curve:
        """Train ``model``, a version or one with a delta on it, on the task, in place."""

    def score(self, model: Any) -> float: ...

    def save(self, model: Any, folder: Path) -> None: ...


def train(
    model: Any,
    batches: Iterator[Batch],
    steps: int,
    peak: float,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW without weight decay, a short warm-up, then linearly to nothing. ``look`` is called
    before every step and after the last."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    warm = min(WARM_UP, max(1, steps // 3))
    for step in range(steps):
        look(step)
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / warm, (steps - step) / steps)
        ids, labels = (side.to(DEVICE) for side in next(batches))
        loss_of(model, ids, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    look(steps)


def tune(family: Family, model: Any, recipe: Recipe | Further, batches: Iterator[Batch]) -> Curve:
    curve: Curve = []

    def look(step: int) -> None:
        if step % recipe.look_every == 0 or step == recipe.tune_steps:
            curve.append((step, family.score(model)))

    train(model, batches, recipe.tune_steps, recipe.tune_rate, look)
    return curve


def loss_of(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the labels only: a vocabulary of 49,152 for every token of a prompt costs more than the
    rest. Padding is on the right, where no answer sees it."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    counts = labels[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[counts]), labels[:, 1:][counts])


def padded(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Batch:
    """Ids, and as labels what comes after the first ``starts`` of each row."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, 0)
    labels = torch.full_like(ids, IGNORED)
    for line, (row, start) in enumerate(zip(rows, starts, strict=True)):
        labels[line, start : len(row)] = ids[line, start : len(row)]
    return ids, labels


@torch.no_grad()
def exact_match(model: Any, batches: Sequence[Batch]) -> float:
    """Of greedy answers, in one pass: one that is right up to a token sees the tokens of the gold
    answer, so all of it is right if each of these is the likeliest there."""
    right: list[bool] = []
    for ids, labels in batches:
        hidden = model.model(input_ids=ids.to(DEVICE)).last_hidden_state[:, :-1]
        counts, said = labels[:, 1:] != IGNORED, ids[:, 1:].clone()
        said[counts] = model.lm_head(hidden[counts.to(DEVICE)]).argmax(-1).cpu()
        right += (said == ids[:, 1:]).all(1).tolist()
    return sum(right) / len(right)


# --- characters ---


@dataclass(frozen=True)
class Recipe:
    """``steps`` and ``rates`` of the versions; the rows of their batches and of the task's; every
    ``look_every`` steps of a fine-tune its score is taken, on ``examples``."""

    hidden: int
    layers: int
    heads: int
    rows: int
    task_rows: int
    steps: tuple[int, ...]
    rates: tuple[float, ...]
    tune_steps: int
    tune_rate: float
    look_every: int
    examples: int = 400

    def part(self, share: float) -> Recipe:
        """The same with a share of all steps, at least one each."""

        def few(steps: int) -> int:
            return max(1, round(steps * share))

        return replace(self, steps=tuple(map(few, self.steps)), tune_steps=few(self.tune_steps))


SIZES = {
    # 0.9 million parameters.
    "toy": Recipe(
        *(128, 4, 4, 8, 32),
        steps=(300, 120, 120, 200, 100),
        rates=(1.5e-3, 1.2e-3, 1.2e-3, 2e-3, 1e-3),
        tune_steps=100,
        tune_rate=7e-4,
        look_every=10,
    ),
    # 25 million parameters: for a GPU.
    "small": Recipe(
        *(512, 8, 8, 32, 64),
        steps=(1200, 500, 500, 800, 400),
        rates=(6e-4, 5e-4, 5e-4, 8e-4, 4e-4),
        tune_steps=200,
        tune_rate=2e-4,
        look_every=10,
    ),
}
STAGE_ONE = 3
# Of stage 2's rows, and which words: the task's own are longer, so stage 2 teaches a part of it.
TASK_SHARE, EASY, FULL = 0.5, (3, 6), (4, 8)


class Characters:
    """The task is ``sort bdca = `` → ``abcd``, exact match. Words that a rule sets aside are in no
    training, neither fine-tuning nor stage 2."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.count, self.stage_one = len(recipe.steps), STAGE_ONE
        self._recipe, self._seed = recipe, 1000 * seed
        corpus = toy._corpus()
        self._halves = corpus[: len(corpus) // 2], corpus[len(corpus) // 2 :]
        self._held_out = _task_batch(_lines(random.Random(4), recipe.examples, FULL, held_out=True))

    def train_version(self, number: int, before: Path | None, folder: Path) -> None:
        torch.manual_seed(self._seed)
        model = load(before) if before else self._new_model()
        late = number >= self.stage_one
        batches = self._text(self._seed + number, self._halves[late], TASK_SHARE if late else 0.0)
        train(model, batches, self._recipe.steps[number], self._recipe.rates[number])
        self.save(model, folder)

    def fine_tune(self, model: Any, number: int) -> Curve:
        return tune(self, model, self._recipe, self._task(self._seed + 50 + number))

    def score(self, model: Any) -> float:
        return exact_match(model, [self._held_out])

    def save(self, model: Any, folder: Path) -> None:
        model.to(torch.bfloat16).save_pretrained(folder)
        toy.make_tokenizer().save_pretrained(folder)

    def _new_model(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        recipe = self._recipe
        config = LlamaConfig(
            vocab_size=toy.VOCABULARY,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.hidden * 43 // 16,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model: Any = LlamaForCausalLM(config)
        return model.to(DEVICE)

    def _text(self, seed: int, corpus: torch.Tensor, share: float) -> Iterator[Batch]:
        """Windows of sources; a ``share`` of the rows are examples one after the other."""
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        rows, window = self._recipe.rows, torch.arange(toy.WIDTH)
        while True:
            starts = torch.randint(len(corpus) - toy.WIDTH, (rows, 1), generator=generator)
            ids = corpus[starts + window]
            for row in range(round(share * rows)):
                lines = _lines(rng, toy.WIDTH // 10, EASY, held_out=False)
                text = "".join(prompt + answer for prompt, answer in lines)[: toy.WIDTH]
                ids[row] = torch.tensor(list(text.encode()))
            yield ids, ids

    def _task(self, seed: int) -> Iterator[Batch]:
        rng = random.Random(seed)
        while True:
            yield _task_batch(_lines(rng, self._recipe.task_rows, FULL, held_out=False))


def _lines(
    rng: random.Random, count: int, lengths: tuple[int, int], *, held_out: bool
) -> list[Pair]:
    found: list[Pair] = []
    while len(found) < count:
        word = "".join(rng.sample(toy.LETTERS, rng.randint(*lengths)))
        if toy._is_held_out(word) is held_out:
            found.append((f"sort {word} = ", "".join(sorted(word)) + "\n"))
    return found


def _task_batch(pairs: Sequence[Pair]) -> Batch:
    return padded([list((p + a).encode()) for p, a in pairs], [len(p) for p, _ in pairs])


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


# --- SmolLM2 ---


@dataclass(frozen=True)
class Further:
    """``rates`` of the versions after the first, each of as many ``steps`` on BoolQ's passages;
    and the fine-tune."""

    task: str = "SIQA"
    rates: tuple[float, ...] = (1e-4, 1e-3)
    steps: int = 20
    rows: int = 4
    window: int = 128
    tune_steps: int = 20
    tune_rate: float = 5e-5
    tune_rows: int = 8
    look_every: int = 5
    questions: int = 100
    most_tokens: int = 128

    def part(self, share: float) -> Further:
        return replace(self, **{n: max(1, round(getattr(self, n) * share)) for n in _STEPS})


_STEPS = ("steps", "tune_steps")
# Of held-out questions that are answered at once.
_AT_ONCE = 25


class SmolLM2:
    """SmolLM2-135M-Instruct, and versions trained on from it. The task is questions with lettered
    choices, and an answer the letter and the words of one; all of it must match."""

    def __init__(self, recipe: Further, seed: int) -> None:
        from transformers import AutoTokenizer

        self.count = self.stage_one = 1 + len(recipe.rates)
        self._recipe, self._seed = recipe, 1000 * seed
        with tempfile.TemporaryDirectory() as place:
            make_base(Path(place))
            self._tokenizer: Any = AutoTokenizer.from_pretrained(place)
        items = json_lines(f"{recipe.task}/test.jsonl")
        random.Random(0).shuffle(items)
        made = map(self._example, items)
        examples = [(row, start) for row, start in made if len(row) <= recipe.most_tokens]
        held_out, self._examples = examples[: recipe.questions], examples[recipe.questions :]
        self._held_out = [
            padded(*zip(*held_out[at : at + _AT_ONCE], strict=True))
            for at in range(0, len(held_out), _AT_ONCE)
        ]

    def train_version(self, number: int, before: Path | None, folder: Path) -> None:
        if before is None:
            make_base(folder)
            return
        model, batches = load(before), self._text(self._seed + number)
        train(model, batches, self._recipe.steps, self._recipe.rates[number - 1])
        self.save(model, folder)

    def fine_tune(self, model: Any, number: int) -> Curve:
        return tune(self, model, self._recipe, self._task(self._seed + number))

    def score(self, model: Any) -> float:
        return exact_match(model, self._held_out)

    def save(self, model: Any, folder: Path) -> None:
        model.to(torch.bfloat16).save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _example(self, item: dict[str, str]) -> tuple[list[int], int]:
        """Tokens, and where the answer starts."""
        parts = [item[key] for key in ("passage", "question", "options") if key in item]
        turn = [{"role": "user", "content": "\n".join(parts)}]
        prompt = self._tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        )
        start = self._ids(prompt)
        return start + self._ids(item["answer"] + self._tokenizer.eos_token), len(start)

    def _text(self, seed: int) -> Iterator[Batch]:
        passages = "\n\n".join(row["passage"] for row in json_lines("BoolQ/dev.jsonl")[:800])
        stream, generator = torch.tensor(self._ids(passages)), torch.Generator().manual_seed(seed)
        last, window = len(stream) - self._recipe.window, torch.arange(self._recipe.window)
        while True:
            starts = torch.randint(last, (self._recipe.rows, 1), generator=generator)
            ids = stream[starts + window]
            yield ids, ids

    def _task(self, seed: int) -> Iterator[Batch]:
        rng = random.Random(seed)
        while True:
            yield padded(*zip(*rng.sample(self._examples, self._recipe.tune_rows), strict=True))
