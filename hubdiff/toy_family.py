"""A family of toy models, trained on the spot: two bases and a fine-tune of the first.

    toy-v1         a character-level Llama trained on the Python standard library's own sources
    toy-v2         toy-v1 trained further on the same sources: the "next release" of the base
    toy-v1-sort    toy-v1 fine-tuned on a task that no base can do: ``sort bdca = `` → ``abcd``

All is real but the size (0.9 million parameters): transformers' LlamaForCausalLM, a tokenizer.json,
bfloat16 weights, cards. Seeds are fixed; the sources differ between versions of Python, so the
numbers do too, a little. Needs torch and transformers, no network.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.errors import HubdiffError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    Batch = tuple[torch.Tensor, torch.Tensor]

V1, V2, TUNED = "toy-v1", "toy-v2", "toy-v1-sort"
LETTERS = "abcdefghij"
VOCABULARY = 128  # ASCII; the first codes are the special tokens
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
WIDTH, ROWS = 96, 16  # characters and sequences in a batch of sources
TASK_ROWS = 64
CORPUS_CHARACTERS = 2_000_000
IGNORED = -100  # what the loss skips


@dataclass(frozen=True)
class Recipe:
    """Steps of each training, how many held-out examples score a model, and the scores that show
    the effect: at most without the delta, at least with it."""

    v1_steps: int = 200
    v2_steps: int = 100
    tune_steps: int = 150
    examples: int = 300
    most_without: float = 0.05
    least_with: float = 0.5


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str


def train_family(folder: Path, namespace: str, recipe: Recipe, note: Callable[[str], None]) -> None:
    """Train the three models into ``folder``/toy-v1, toy-v2 and toy-v1-sort.

    ``namespace`` is where they will be published; the fine-tune's card names its base there.
    """
    import torch

    with _settings():
        corpus = _corpus()
        note(f"training {V1}, {recipe.v1_steps} steps on the standard library's sources")
        v1 = _new_model()
        _train(v1, _source_batches(corpus, seed=1), recipe.v1_steps, 1.5e-3)
        _save(v1, folder / V1, _card(V1))
        note(f"training {V2} on from {V1}, {recipe.v2_steps} steps more")
        note(f"fine-tuning {V1} to sort letters, {recipe.tune_steps} steps, at the same time")
        # From the saved weights: a delta is between what was published. Two threads of one thread
        # each, because two of OpenMP's own wait for each other when the machine has other work.
        v2, tuned = (_load(folder / V1).to(torch.float32) for _ in range(2))
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs = [
                pool.submit(_train, v2, _source_batches(corpus, seed=2), recipe.v2_steps, 6e-4),
                pool.submit(_train, tuned, _task_batches(seed=3), recipe.tune_steps, 1e-3),
            ]
        for job in jobs:
            job.result()
        _save(v2, folder / V2, _card(V2))
        _save(tuned, folder / TUNED, _card(TUNED, base=f"{namespace}/{V1}"))


def answers(folder: Path, examples: Sequence[Example]) -> list[str]:
    """What the model at ``folder`` writes after each prompt (greedy), up to the end of the line."""
    import torch
    from transformers import AutoTokenizer

    with _settings(), torch.inference_mode():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [example.prompt for example in examples]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        written = _load(folder).generate(**batch, max_new_tokens=len(LETTERS), do_sample=False)
        texts = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :])
    return [text.partition("\n")[0] for text in texts]


def exact_match(found: Sequence[str], examples: Sequence[Example]) -> float:
    """The share of answers that are exactly right."""
    right = sum(text == example.answer for text, example in zip(found, examples, strict=True))
    return right / len(examples)


def held_out(count: int) -> list[Example]:
    """Examples that training never sees: a rule on the letters sets their words aside."""
    return _examples(random.Random(4), count, held_out=True)


def _load(folder: Path) -> Any:  # transformers' annotations refuse .to(dtype) and .generate()
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def _new_model() -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    names = list(SPECIAL)
    special: dict[str, Any] = {f"{name}_id": names.index(name) for name in names[:3]}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        **special,
    )
    return LlamaForCausalLM(config)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character, whose id is its code."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL.values())
    vocabulary = {text: code for code, text in enumerate(special)}
    vocabulary |= {chr(code): code for code in range(len(special), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
    )


def _save(model: Any, folder: Path, card: str) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _card(name: str, base: str | None = None) -> str:
    lines = ["license: apache-2.0", "library_name: transformers", "pipeline_tag: text-generation"]
    if base is not None:
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    head = "\n".join(["---", *lines, "---"])
    text = "A toy of 0.9 million parameters that `hubdiff demo` trains in seconds. It is of no use."
    return f"{head}\n\n# {name}\n\n{text}\n"


# ---- data ----


def _corpus() -> torch.Tensor:
    """The first characters of the standard library, file after file in the order of their names."""
    import torch

    library = Path(sysconfig.get_path("stdlib"))
    parts: list[bytes] = []
    missing = CORPUS_CHARACTERS
    for file in sorted(library.glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        parts.append(text.encode("ascii", errors="replace")[:missing])
        missing -= len(parts[-1])
        if not missing:
            return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).long()
    raise HubdiffError(
        f"the sources of Python's standard library are not at {library}",
        next_step="Run the demo with a Python that ships them.",
    )


def _source_batches(corpus: torch.Tensor, seed: int) -> Iterator[Batch]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(WIDTH)
    while True:
        starts = torch.randint(len(corpus) - WIDTH, (ROWS, 1), generator=generator)
        ids = corpus[starts + window]
        yield ids, ids


def _task_batches(seed: int) -> Iterator[Batch]:
    """Rows of one example each; only the answer and its line end count in the loss."""
    import torch

    rng = random.Random(seed)
    while True:
        examples = _examples(rng, TASK_ROWS, held_out=False)
        width = max(len(e.prompt) + len(e.answer) + 1 for e in examples)
        ids = torch.zeros(len(examples), width, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            text = torch.tensor(list(f"{example.prompt}{example.answer}\n".encode()))
            ids[row, : len(text)] = text
            labels[row, len(example.prompt) : len(text)] = text[len(example.prompt) :]
        yield ids, labels


def _examples(rng: random.Random, count: int, *, held_out: bool) -> list[Example]:
    found: list[Example] = []
    while len(found) < count:
        word = "".join(rng.sample(LETTERS, rng.randint(3, 5)))
        if _is_held_out(word) is held_out:
            found.append(Example(f"sort {word} = ", "".join(sorted(word))))
    return found


def _is_held_out(word: str) -> bool:
    """One word in five, whichever its length."""
    return sum(place * ord(letter) for place, letter in enumerate(word, 1)) % 5 == 0


# ---- training ----


def _train(model: LlamaForCausalLM, batches: Iterator[Batch], steps: int, peak: float) -> None:
    """AdamW, 20 steps of warm-up, then linearly to nothing."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, (steps - step) / steps)
    )
    for _ in range(steps):
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@contextmanager
def _settings() -> Iterator[None]:
    """A fixed seed, one thread, no progress bars; the caller's own settings again after."""
    import torch
    from transformers.utils import logging

    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            torch.set_num_threads(1)
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()
