"""The toy family's parts; the training is tested by what comes out, in `make demo`."""

from __future__ import annotations

import random

import torch

from hubdiff import toy_family
from hubdiff.toy_family import Example, exact_match, held_out, make_tokenizer


def test_tokens_are_ascii_codes() -> None:
    tokenizer = make_tokenizer()
    text = "def f(x):\n\treturn  x  # é\n"
    ids = tokenizer(text)["input_ids"]
    unknown = tokenizer.unk_token_id
    assert ids == [ord(c) if c.isascii() else unknown for c in text]
    assert tokenizer.decode(tokenizer("  sort ab = \n")["input_ids"]) == "  sort ab = \n"


def test_held_out_words_are_never_trained_on() -> None:
    examples = held_out(200)
    assert examples == held_out(200)
    assert all(e.answer == "".join(sorted(e.prompt.split()[1])) for e in examples)
    trained = toy_family._examples(random.Random(0), 20_000, held_out=False)
    assert not {e.prompt for e in examples} & {e.prompt for e in trained}


def test_only_the_answer_counts_in_the_loss() -> None:
    ids, labels = next(toy_family._task_batches(seed=0))
    counted = labels != toy_family.IGNORED
    assert torch.equal(ids[counted], labels[counted])
    for row, mask in zip(ids, counted, strict=True):
        prompt, _, answer = bytes(row[row > 0].tolist()).decode().partition(" = ")
        assert bytes(row[mask].tolist()).decode() == answer
        assert answer == "".join(sorted(prompt.removeprefix("sort "))) + "\n"


def test_exact_match() -> None:
    examples = [Example("sort ba = ", "ab"), Example("sort ca = ", "ac")]
    assert exact_match(["ab", "acx"], examples) == 0.5


def test_settings_of_the_caller_come_back() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with toy_family._settings():
        torch.rand(3)
        assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
