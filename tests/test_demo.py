"""The demo's plumbing, with a few steps of training; `make demo` is the test of the effect."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from models import hashes

import hubdiff
from hubdiff.demo import DemoResult, check_files, check_scores, demo
from hubdiff.errors import HubdiffError, IntegrityError, OutputExists
from hubdiff.progress import Silent
from hubdiff.toy_family import Recipe

QUICK = Recipe(v1_steps=2, v2_steps=2, tune_steps=2, examples=8, most_without=1.0, least_with=0.0)
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Run(NamedTuple):
    result: DemoResult
    folder: Path
    notes: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, heard = tmp_path_factory.mktemp("demo"), Heard()
    return Run(demo(folder, progress=heard, recipe=QUICK), folder, heard.notes)


def test_own_base_gives_every_file_back(run: Run) -> None:
    assert set(run.result.restored) == FILES
    trained, rebuilt = (hashes(run.folder / n) for n in ("toy-v1-sort", "toy-v1-sort-rebuilt"))
    assert {path: rebuilt[path] for path in FILES} == {path: trained[path] for path in FILES}


def test_check_lets_the_delta_go_on_the_next_base(run: Run) -> None:
    """Continued pre-training of a base: the skill came along, and check said so before."""
    checked = hubdiff.check(run.folder / "toy-v1-sort-delta", run.folder / "toy-v2")
    assert checked.verdict.level == "go", checked.verdict.reasons


def test_a_changed_file_is_noticed(run: Run) -> None:
    folder = run.folder / "toy-v1-sort-rebuilt"
    listed = {"config.json": hashes(folder)["config.json"], "gone.json": "0" * 40}
    kept = {"tuned": {"not_carried": [{"path": "gone.json"}]}}
    assert check_files(folder, listed, kept) == ("config.json",)
    with pytest.raises(IntegrityError, match=r"gone\.json"):
        check_files(folder, listed, {"tuned": {"not_carried": []}})
    with pytest.raises(IntegrityError, match=r"config\.json"):
        check_files(folder, {"config.json": "0" * 64}, kept)


def test_bytes_are_those_the_hub_served(run: Run) -> None:
    result = run.result
    push, own_base, newer = (step.read for step in result.steps)
    assert set(push) == {"demo/toy-v1", "demo/toy-v1-sort"}
    assert all(result.model_bytes <= size < 1.1 * result.model_bytes for size in push.values())
    assert set(own_base) == {"demo/toy-v1-sort-delta"}
    assert set(newer) == {"demo/toy-v1-sort-delta", "demo/toy-v2"}
    assert own_base["demo/toy-v1-sort-delta"] >= result.delta_bytes
    assert result.model_bytes == (run.folder / "toy-v1-sort/model.safetensors").stat().st_size


def test_commands_are_told_as_a_user_types_them(run: Run) -> None:
    commands = [note for note in run.notes if note.startswith("$ ")]
    assert commands[0] == "$ hf upload demo/toy-v1 toy-v1"
    assert "$ hubdiff push-delta demo/toy-v1-sort demo/toy-v1-sort-delta" in commands
    assert [f"$ {step.command}" for step in run.result.steps] == [
        command for command in commands if command.startswith("$ hubdiff")
    ]


def test_result_in_words_and_as_json(run: Run) -> None:
    text = str(run.result)
    for words in ("toy-v2 + Δ", "toy-v1, fine-tuned", "8 words", "toy", "README.md", "layers.png"):
        assert words in text
    assert json.loads(json.dumps(run.result.as_json()))["examples"] == 8
    assert run.result.card is not None
    assert "base_model:\n- demo/toy-v1\n" in run.result.card.read_text(encoding="utf-8")
    assert run.result.picture is not None
    assert run.result.picture.is_file()


def test_own_environment_is_left_alone(run: Run) -> None:
    assert os.environ["HF_ENDPOINT"] == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("v2", "result", "tuned"), [(0.06, 0.9, 1.0), (0.0, 0.49, 1.0), (0.0, 0.9, 0.49)]
)
def test_a_skill_that_did_not_travel_is_an_error(v2: float, result: float, tuned: float) -> None:
    with pytest.raises(HubdiffError, match="did not travel"):
        check_scores(v2, result, tuned, Recipe())
    check_scores(0.05, 0.5, 0.5, Recipe())


def test_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputExists, match="not an empty folder"):
        demo(tmp_path)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HubdiffError, match="uvicorn") as caught:
        demo(tmp_path / "new")
    assert caught.value.next_step == "Run pip install 'hubdiff[devhub]'."
    assert not (tmp_path / "new").exists()
