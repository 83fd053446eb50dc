"""Scores in cards: what the Hub reads, and nothing else in the card touched."""

from __future__ import annotations

import math

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from hubdiff.devhub import DevHub
from hubdiff.hub import benchmark_tasks
from hubdiff.lab.score_card import benchmark_files, with_scores
from hubdiff.lab.scores import Measured, TaskScore


def score(name: str, value: float, dataset: str | None = None, stderr: float = 0.01) -> TaskScore:
    measured = Measured(name, "acc", "none", value, stderr, True, 100)
    commit = "a" * 40 if dataset else None
    return TaskScore(
        *(name, ("acc,none",), value, stderr, True, 100, 0, "1.0", dataset, None, commit),
        *("multiple_choice", (measured,)),
    )


def test_only_registered_benchmarks_get_a_results_file(
    devhub: DevHub,
) -> None:
    """The Hub's rule: a benchmark is a dataset with an eval.yaml, which lists its tasks."""
    api = HfApi(endpoint=devhub.url, token=devhub.token("demo"))
    for name, content in {
        "org/one-task": "name: One\ntasks:\n- id: whole\n",
        "org/two-tasks": "tasks:\n- id: hard\n- id: easy\n",
        "org/odd": "tasks: 7\n",
        "org/plain": None,
    }.items():
        api.create_repo(name, repo_type="dataset")
        if content is not None:
            api.upload_file(
                path_or_fileobj=content.encode(),
                path_in_repo="eval.yaml",
                repo_id=name,
                repo_type="dataset",
            )
    scores = [
        score("a", 0.5, "org/one-task"),
        score("easy", 0.25, "org/two-tasks"),
        score("else", 0.5, "org/two-tasks"),
        score("b", 0.5, "org/odd"),
        score("c", 0.5, "org/plain"),
        score("d", 0.5, "org/gone"),
        score("local", 0.5),
    ]
    files = benchmark_files(scores, benchmark_tasks, "by hand", "2026-01-01T00:00:00Z")
    found = [yaml.safe_load(text)[0] for text in files.values()]
    assert [(e["dataset"]["id"], e["dataset"]["task_id"], e["value"]) for e in found] == [
        ("org/one-task", "whole", 50.0),
        ("org/two-tasks", "easy", 25.0),
    ]
    assert "± 1.00" in found[0]["notes"]
    assert found[0]["dataset"]["revision"] == "a" * 40


KEPT = """\
---
# who wrote it
license: mit
language: no   # Norwegian
model-index:
- name: mine
  results:
  - task: {type: text-generation, name: other}
    dataset: {type: d, name: d}
    metrics:
    - {type: acc, value: 0.5, extra: kept}

tags: [a, b]
---
# Words
"""
CHANGES = {
    "as it is": lambda text: text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "BOM": lambda text: "\ufeff" + text,
    "no index": lambda text: text.replace("model-index", "x-index"),
    "no header": lambda text: "# Words\n",
    "empty": lambda text: "",
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_all_else_in_a_card_stays_as_it_is(change: str) -> None:
    old = CHANGES[change](KEPT)
    once = with_scores(old, "org/mine", [score("a", 0.25), score("bad", math.nan)], "by hand")
    new = with_scores(once, "org/mine", [score("a", 0.75)], "by hand")
    for word in ("# who wrote it", "language: no   # Norwegian", "extra: kept", "tags: [a, b]"):
        assert (word in new) == (word in old)
    assert ("\r\n" in new) == ("\r\n" in old)
    assert ("# Words" in new) == ("# Words" in old)
    assert new.count("---") == 2
    found = {one.task_name: one for one in ModelCard(new).data.eval_results}
    assert found["a"].metric_value == 0.75
    assert "bad" not in found
    assert ("other" in found) == ("model-index" in old)
