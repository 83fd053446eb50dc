"""compare and tune-scale: what the numbers say of two models is what the examples say, and the page
and the pictures show it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hubdiff
from hubdiff.cli import run as cli
from hubdiff.errors import HubdiffError
from hubdiff.lab.comparison import paired, recovery
from hubdiff.lab.scale_search import Tried, best, search

pytest.importorskip("lm_eval")

import torch
from tiny_tasks import choice_task, make_tuned, sort_task, train


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("family")
    base, _, _ = make_tuned(folder)
    target = folder / "target"
    target.mkdir()
    for file in base.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.3
        weights[name] = (tensor.float() + noise.nan_to_num()).to(tensor.dtype)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    train(target, folder / "train.jsonl", folder / "tuned-target")
    names = ("base", "tuned", "delta", "target", "tuned-target")
    return {name: folder / name for name in names}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    return [str(sort_task(folder)), str(choice_task(folder))]


# --- the arithmetic ---


def outcomes(values: Any) -> dict[tuple[str, int], float]:
    return {("t", number): float(value) for number, value in enumerate(values)}


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (1, 9, 22 / 1024), (6, 6, 1.0)]
)
def test_right_and_wrong_are_mcnemar_s(better: int, worse: int, p: float) -> None:
    first = [0] * better + [1] * worse + [1, 0, 1]
    second = [1] * better + [0] * worse + [1, 0, 1]
    found = paired(outcomes(first), outcomes(second), 0)
    assert found is not None
    assert (found.better, found.worse, found.examples) == (better, worse, better + worse + 3)
    assert found.p == pytest.approx(p)
    assert found.test == "McNemar, exact"
    turned = paired(outcomes(first), outcomes(second), 0, higher_is_better=False)
    assert turned is not None
    assert (turned.better, turned.worse, turned.p) == (worse, better, found.p)
    assert found.difference == pytest.approx((better - worse) / (better + worse + 3))


def test_other_numbers_are_permuted() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=60)
    clear = paired(outcomes(first), outcomes(first + 0.5 + 0.1 * generator.normal(size=60)), 0)
    noise = paired(outcomes(first), outcomes(first + 0.5 * generator.normal(size=60)), 0)
    assert clear is not None
    assert noise is not None
    assert clear.p < 0.001
    assert noise.p > 0.05
    assert "permutations" in clear.test
    # By hand: the t statistic of the differences agrees with what permutations say.
    t = noise.difference / noise.stderr
    assert noise.p == pytest.approx(math.erfc(abs(t) / math.sqrt(2)), abs=0.05)
    same = paired(outcomes(first), outcomes(first), 0)
    assert same is not None
    assert (same.p, same.difference) == (1.0, 0.0)


def test_only_examples_of_both_are_compared() -> None:
    first, second = {("t", 0): 1.0, ("t", 1): 0.0}, {("t", 1): 1.0, ("t", 2): 1.0}
    found = paired(first, second, 0)
    assert found is not None
    assert (found.examples, found.better) == (1, 1)
    assert paired(first, {("t", 9): 1.0}, 0) is None


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=40))
def test_recovery_is_what_the_paper_says(rows: list[tuple[int, int, int]]) -> None:
    target, result, tuned = (outcomes(column) for column in zip(*rows, strict=True))
    found = recovery(target, result, tuned, 0)
    t, r, u = (sum(one.values()) / len(rows) for one in (target, result, tuned))
    if u <= t:
        assert found.share is None
    else:
        assert found.share == pytest.approx((r - t) / (u - t))
    if found.low is not None and found.high is not None:
        assert found.low <= found.high
    # Where small is good, all turns: the same shares of the opposite scores.
    turned = [outcomes(1 - v for v in one.values()) for one in (target, result, tuned)]
    other = recovery(*turned, 0, higher_is_better=False)
    assert (other.share is None) == (found.share is None)
    if found.share is not None:
        assert other.share == pytest.approx(found.share)


def test_a_clear_recovery_has_an_interval() -> None:
    target = outcomes([0] * 100)
    result, tuned = outcomes([1] * 60 + [0] * 40), outcomes([1] * 90 + [0] * 10)
    found = recovery(target, result, tuned, 0)
    assert found.low is not None
    assert found.high is not None
    assert found.share == pytest.approx(60 / 90)
    assert 0.5 < found.low < found.share < found.high < 0.8


@pytest.mark.parametrize("peak", [0.0, 0.3, 0.8, 1.0, 1.1, 1.5])
@pytest.mark.parametrize("evaluations", [3, 5, 9, 12])
def test_the_search_finds_the_top_of_a_hill(peak: float, evaluations: int) -> None:
    asked: list[float] = []

    def measure(scale: float) -> Tried:
        asked.append(scale)
        value = -((scale - peak) ** 2)
        return Tried(scale, value, value, 0.0)

    found = search(measure, evaluations)
    assert len(asked) == len(set(asked)) <= evaluations
    assert [one.scale for one in found] == sorted(asked)
    assert 1.0 in asked
    if evaluations >= 9:
        assert abs(best(found).scale - peak) <= 0.07


def test_of_equal_scales_the_nearest_to_1_is_taken() -> None:
    flat = [Tried(scale, 0.5, 0.5, None) for scale in (0.0, 0.5, 1.0, 1.5)]
    assert best(flat).scale == 1.0
    assert best([one for one in flat if one.scale != 1.0]).scale == 1.5


# --- the real thing ---


def test_five_models_side_by_side(
    family: dict[str, Path], tasks: list[str], tmp_path: Path, home: Path
) -> None:
    found = hubdiff.compare(
        family["delta"],
        family["target"],
        base=family["base"],
        tuned_target=family["tuned-target"],
        tasks=tasks,
        device="cpu",
        output=tmp_path / "out",
    )
    assert list(found.models) == ["base", "tuned", "target", "target + Δ", "tuned target"]
    sort = found.tasks[0]
    for score, model in zip(
        sort.scores,
        (
            family["base"],
            family["tuned"],
            family["target"],
            f"{family['target']}+{family['delta']}",
            family["tuned-target"],
        ),
        strict=True,
    ):
        alone = hubdiff.evaluate(model, tasks=tasks, device="cpu")
        assert alone is not None
        assert alone.scores[0].value == score.value
    base, tuned, target, result, best_of_all = (score.value for score in sort.scores)
    assert base == target == 0
    assert tuned > 0.8
    assert best_of_all > 0.8
    assert sort.change is not None
    assert sort.recovery is not None
    assert sort.change.difference == pytest.approx(result - target)
    assert sort.recovery.share == pytest.approx((result - target) / (best_of_all - target))

    page = (tmp_path / "out" / "comparison.md").read_text()
    rows = re.findall(r"^\| sort\\?_letters \|(.*)\|$", page, re.MULTILINE)
    assert len(rows) == 2
    assert f"{tuned:.4f}" in rows[0]
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document == json.loads(json.dumps(found.as_json()))
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "target-+-delta" / "samples_sort_letters.jsonl").is_file()
    assert not list(home.rglob("answers*"))


def test_a_stopped_comparison_asks_nothing_twice(
    family: dict[str, Path], tasks: list[str], home: Path
) -> None:
    class Stopped(Exception):
        pass

    class Counting:
        asked, models, stop = 0, 0, True

        def start(self, what: str, total: int, unit: str = "") -> None:
            self.asked += total if what == "answering" else 0

        def advance(self, count: int) -> None: ...
        def finish(self) -> None: ...

        def note(self, text: str) -> None:
            self.models += 1
            if self.stop and self.models == 3:
                raise Stopped

    def run(progress: Counting) -> Any:
        return hubdiff.compare(
            family["delta"],
            family["target"],
            base=family["base"],
            tasks=tasks[:1],
            device="cpu",
            progress=progress,
        )

    first = Counting()
    with pytest.raises(Stopped):
        run(first)
    assert first.asked == 2 * 40
    again = Counting()
    again.stop = False
    run(again)
    assert again.asked == 2 * 40


def test_a_base_without_a_place_is_asked_for(family: dict[str, Path], tasks: list[str]) -> None:
    with pytest.raises(HubdiffError, match="made from a folder") as caught:
        hubdiff.compare(family["delta"], family["target"], tasks=tasks)
    assert "--base" in str(caught.value.next_step)


def test_the_best_scale_is_searched_and_drawn(
    family: dict[str, Path], tasks: list[str], tmp_path: Path, home: Path
) -> None:
    found = hubdiff.tune_scale(
        family["delta"],
        family["target"],
        tasks=tasks[:1],
        device="cpu",
        evaluations=5,
        plot=tmp_path / "scale.png",
    )
    assert len(found.tried) == 5
    assert found.tried[0].scale == 0
    by_scale = {one.scale: one for one in found.tried}
    assert by_scale[0.0].choosing == by_scale[0.0].held_out == 0
    assert found.best.choosing == max(one.choosing for one in found.tried) > 0
    alone = hubdiff.evaluate(
        f"{family['target']}+{family['delta']}", tasks=tasks[:1], device="cpu", scale=0.5
    )
    assert alone is not None
    half = by_scale[0.5]
    assert (half.choosing + half.held_out) / 2 == pytest.approx(alone.scores[0].value)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert not list(home.rglob("answers*"))


@pytest.mark.parametrize(("more", "says"), [({"evaluations": 2}, "3"), ({"limit": 1}, "one exam")])
def test_searches_that_make_no_sense_are_refused(
    more: dict[str, Any], says: str, family: dict[str, Path], tasks: list[str]
) -> None:
    with pytest.raises(HubdiffError, match=says):
        hubdiff.tune_scale(family["delta"], family["target"], tasks=tasks, **more)


def test_pages_and_documents(
    family: dict[str, Path], tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(family["delta"]), "--to", str(family["target"]), "--tasks", tasks[0]]
    words += ["--limit", "8", "--device", "cpu"]
    compared = ["compare", *words, "--base", str(family["base"])]
    assert cli(compared) == 0
    assert "target + Δ − target" in capsys.readouterr().out
    assert cli([*compared, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0]["change"]["examples"] == 8
    tuned = ["tune-scale", *words, "--evaluations", "3"]
    assert cli(tuned) == 0
    assert "← best" in capsys.readouterr().out
    assert cli([*tuned, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tried"]) == 3
