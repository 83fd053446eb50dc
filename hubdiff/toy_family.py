"""A family of toy models, trained on the spot: two bases and a fine-tune of the first.

    v1          a character-level Llama trained on the Python standard library's own sources
    v2          v1 trained further on the same sources: the "next release" of the base
    v1-sort     v1 fine-tuned on a task no base can do: ``sort bdca = `` → ``abcd`` (also rev, up)

Everything is real but the size (0.9 million parameters): transformers' LlamaForCausalLM, a
tokenizer.json, bfloat16 weights, cards. Seeds are fixed; another Python version has other sources,
so numbers move a little between versions. Needs torch and transformers, no network.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubdiff.errors import HubdiffError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    Batch = tuple[torch.Tensor, torch.Tensor]

V1, V2, TUNED = "toy-v1", "toy-v2", "toy-v1-sort"
VOCABULARY = 128  # ASCII; the first codes are the special tokens
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
UNKNOWN = list(SPECIAL).index("unk_token")
WIDTH, ROWS = 96, 32  # characters and sequences in a batch
CORPUS_CHARACTERS = 2_000_000
IGNORED = -100  # what the loss skips
THREADS = 2


@dataclass(frozen=True)
class Recipe:
    """Steps of each training, and how many held-out examples score a model."""

    v1_steps: int = 300
    v2_steps: int = 150
    tune_steps: int = 300
    examples: int = 300


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str


def train_family(
    folder: Path, recipe: Recipe, note: Callable[[str], None] = lambda text: None
) -> None:
    """Train the three models into ``folder``/toy-v1, toy-v2 and toy-v1-sort."""
    import torch

    with _seeded():
        corpus = _corpus()
        note(f"training {V1} from scratch, {recipe.v1_steps} steps")
        v1 = _new_model()
        _train(v1, _source_batches(corpus, seed=1), recipe.v1_steps, 1e-3)
        _save(v1, folder / V1, _base_card(V1))
        note(f"training {V2} on from {V1}, {recipe.v2_steps} steps")
        v2 = load_model(folder / V1).to(torch.float32)
        _train(v2, _source_batches(corpus, seed=2), recipe.v2_steps, 5e-4)
        _save(v2, folder / V2, _base_card(V2))
        note(f"fine-tuning {V1} on the task, {recipe.tune_steps} steps")
        tuned = load_model(folder / V1).to(torch.float32)
        _train(tuned, _task_batches(seed=3), recipe.tune_steps, 5e-4)
        _save(tuned, folder / TUNED, _tuned_card())


def score(folder: Path, examples: list[Example]) -> float:
    """The share of examples whose greedy answer is exactly right."""
    answers = answer(folder, [example.prompt for example in examples])
    return sum(a == e.answer for a, e in zip(answers, examples, strict=True)) / len(examples)


def answer(folder: Path, prompts: list[str]) -> list[str]:
    """What the model at ``folder`` writes after each prompt, up to the end of the line."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(folder).eval()
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with _seeded(), torch.inference_mode():
        written = model.generate(**batch, max_new_tokens=6, do_sample=False)
    texts = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :])
    return [text.partition("\n")[0] for text in texts]


def held_out(count: int) -> list[Example]:
    """Examples that training never draws: their words are set aside by a rule on the letters."""
    return _examples(random.Random(4), count, held_out=True)


def load_model(folder: Path) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def _new_model() -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    names = list(SPECIAL)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        **{f"{name}_id": names.index(name) for name in names[:3]},
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
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL
    )


def _save(model: LlamaForCausalLM, folder: Path, card: str) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(card)


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
        examples = _examples(rng, 2 * ROWS, held_out=False)
        width = max(len(e.prompt) + len(e.answer) + 1 for e in examples)
        ids = torch.zeros(len(examples), width, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            text = f"{example.prompt}{example.answer}\n".encode()
            ids[row, : len(text)] = torch.tensor(list(text))
            labels[row, len(example.prompt) : len(text)] = ids[row, len(example.prompt) : len(text)]
        yield ids, labels


def _examples(rng: random.Random, count: int, *, held_out: bool) -> list[Example]:
    found: list[Example] = []
    while len(found) < count:
        word = "".join(rng.sample("abcdefghij", rng.randint(3, 5)))
        if (sum(map(ord, word)) * ord(word[0]) % 5 == 0) is held_out:
            task, does = rng.choice(TASKS)
            found.append(Example(f"{task} {word} = ", does(word)))
    return found


TASKS: list[tuple[str, Callable[[str], str]]] = [
    ("sort", lambda word: "".join(sorted(word))),
    ("rev", lambda word: word[::-1]),
    ("up", str.upper),
]


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
def _seeded() -> Iterator[None]:
    """A fixed seed and thread count inside, the caller's own again after."""
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
