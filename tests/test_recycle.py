"""recycle: Algorithm 1 over tiny models, really trained. What it makes is what its steps make by
hand, to the bit, also when it is stopped on the way; every delta leads back to those before it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import models
import on_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_llama import make_base, write_task

import hubdiff
from hubdiff.cli import run as cli
from hubdiff.devhub import DevHub
from hubdiff.errors import AuthError, HubdiffError, NotAdvised, OutputExists
from hubdiff.graph import BASE_OF, STARTED_FROM
from hubdiff.jobs import recycle as module
from hubdiff.lab.recycling import read_plan, steps_of

pytest.importorskip("trl")
from hubdiff.lab.training import Trainer

SETTINGS = {"steps": 4, "batch": 8, "micro_batch": 8, "length": 64, "learning_rate": 3e-3,
            "log_every": 2, "save_every": 2}  # fmt: skip
FAST = tuple(f"{key}={value}" for key, value in SETTINGS.items())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubdiff.jobs.making.layer_picture", lambda *_: None)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, three versions of a base, each a little on from the one before, and
    one that has nothing to do with them."""
    folder = tmp_path_factory.mktemp("family")
    write_task(folder / "train.jsonl")
    make_base(folder / "v1")
    for number in (2, 3):
        new = shutil.copytree(folder / f"v{number - 1}", folder / f"v{number}")
        weights = load_file(new / "model.safetensors")
        generator = torch.Generator().manual_seed(number)
        for name, tensor in weights.items():
            noise = torch.randn(tensor.shape, generator=generator) * 2e-4
            weights[name] = (tensor.float() + noise).bfloat16()
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    make_base(folder / "stranger", seed=5)
    return folder


@pytest.fixture
def here(family: Path, tmp_path: Path) -> Path:
    """A copy of the family that a test may change."""
    return Path(shutil.copytree(family, tmp_path / "here"))


def write_plan(folder: Path, *bases: Any, **more: Any) -> Path:
    """A plan; a key that is None is left out."""
    plan = {"data": "train.jsonl", "set": SETTINGS, "output": "runs", "bases": list(bases), **more}
    said = {key: value for key, value in plan.items() if value is not None}
    (folder / "plan.yaml").write_text(yaml.safe_dump(said))
    return folder / "plan.yaml"


def weights(folder: Path) -> dict[str, str]:
    """The hashes of all that training and deltas decide; metrics have the time in them."""
    return {
        path: digest
        for path, digest in models.hashes(folder).items()
        if path.endswith(".safetensors")
    }


def made_by_hand(family: Path, folder: Path, method: str) -> Path:
    """The algorithm, step by step, by the commands that there were before."""

    def fine_tune(name: str, version: str, start: str | None) -> None:
        hubdiff.finetune(
            family / version,
            data=family / "train.jsonl",
            output=folder / name,
            settings=FAST,
            from_delta=folder / f"{start}-delta" if start else None,
        )
        hubdiff.push_delta(
            folder / name,
            folder / f"{name}-delta",
            base=family / version,
            tuned_master=folder / name / "master",
        )

    fine_tune("1-v1", "v1", None)
    if method == "direct":
        fine_tune("2-v2-direct", "v2", None)
    fine_tune("2-v2", "v2", "1-v1")
    fine_tune("3-v3", "v3", "2-v2-direct" if method == "direct" else "2-v2")
    return folder


@pytest.fixture(scope="module")
def by_hand(family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hubdiff.jobs.making.layer_picture", lambda *_: None)
        return {
            method: made_by_hand(family, tmp_path_factory.mktemp(method), method)
            for method in ("iterative", "direct")
        }


@pytest.mark.parametrize("method", ["iterative", "direct"])
def test_what_it_makes_is_what_its_steps_make_by_hand(
    here: Path, by_hand: dict[str, Path], method: str
) -> None:
    """Every weight, every master and every delta."""
    made = hubdiff.recycle(write_plan(here, "./v1", "./v2", "./v3", method=method))
    found = weights(here / "runs")
    assert found == weights(by_hand[method])
    names = {path.partition("/")[0] for path in found}
    assert len(names) == (6 if method == "iterative" else 8)
    assert made.report["finished"]
    assert {path.name for path in here.iterdir() if path.name.startswith(".")} == set()


def test_direct_over_one_base_is_one_fine_tune(here: Path, by_hand: dict[str, Path]) -> None:
    hubdiff.recycle(write_plan(here, "./v1", method="direct"))
    found = weights(here / "runs")
    assert {path.partition("/")[0] for path in found} == {"1-v1", "1-v1-delta"}
    assert all(weights(by_hand["direct"])[path] == digest for path, digest in found.items())


# --- stopped and gone on ---


@pytest.fixture(scope="module")
def _finished(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(family, tmp_path_factory.mktemp("finished") / "family"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hubdiff.jobs.making.layer_picture", lambda *_: None)
        hubdiff.recycle(write_plan(folder, "./v1"))
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A family with a finished run over ``v1``: it has been moved, and still is finished."""
    return Path(shutil.copytree(_finished, tmp_path / "moved"))


class Stop(BaseException):
    """No error that anything would catch."""


def stops(after: Any, *, on_call: int, before: bool = False) -> Callable[..., Any]:
    """``after`` with an end of the run behind (or before) its ``on_call``th call."""
    calls: list[None] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if before and len(calls) == on_call:
            raise Stop
        made = after(*args, **kwargs)
        if len(calls) == on_call:
            raise Stop
        return made

    return call


# What is stopped, and at which of its calls from the start of that run on. One after the other they
# carry one run from its first step to its last.
MOMENTS = [
    ("hubdiff.jobs.recycle.finetune", 1, True),
    ("hubdiff.lab.training.Trainer.training_step", 4, True),
    ("hubdiff.jobs.recycle.finetune", 1, False),
    ("hubdiff.jobs.recycle.push_delta", 1, True),
    ("hubdiff.jobs.recycle.push_delta", 1, False),
    ("hubdiff.jobs.recycle.write_report", 1, True),
    ("hubdiff.jobs.recycle.check", 1, False),
    ("hubdiff.jobs.finetune.apply", 1, False),
    ("hubdiff.lab.training.Trainer.training_step", 4, True),
    ("hubdiff.jobs.recycle.training_of", 1, False),
    ("hubdiff.jobs.recycle.push_delta", 1, False),
    ("hubdiff.jobs.recycle.finetune", 1, False),
    ("hubdiff.jobs.recycle.push_delta", 1, False),
]


def test_stopped_at_every_step_it_ends_where_it_would_have(
    here: Path, by_hand: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(here, "./v1", "./v2", "./v3")
    for what, on_call, before in MOMENTS:
        owner, _, name = what.rpartition(".")
        holder = Trainer if owner.endswith(".Trainer") else import_module(owner)
        stopping = stops(getattr(holder, name), on_call=on_call, before=before)
        with monkeypatch.context() as patched:
            patched.setattr(holder, name, stopping)
            with pytest.raises(Stop):
                hubdiff.recycle(plan)
    trained: list[Path] = []
    monkeypatch.setattr(module, "finetune", lambda *_, **more: trained.append(more["output"]))
    assert hubdiff.recycle(plan).report["finished"]
    assert trained == []
    assert weights(here / "runs") == weights(by_hand["iterative"])
    left = {path.name for path in (here / "runs").iterdir() if path.name.startswith(".")}
    assert left == set()


def test_killed_it_ends_where_it_would_have(here: Path, by_hand: dict[str, Path]) -> None:
    """SIGKILL, in the middle of the first training and of the second."""
    plan, runs = write_plan(here, "./v1", "./v2"), here / "runs"
    for name in ("1-v1", "2-v2"):
        checkpoint = runs / f".{name}.hubdiff-training/checkpoints/checkpoint-2"
        process = subprocess.Popen(
            [sys.executable, "-m", "hubdiff", "recycle", str(plan)], stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        while not checkpoint.is_dir() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (runs / f"{name}-delta").exists()
    hubdiff.recycle(plan)
    expected = weights(by_hand["iterative"])
    found = weights(runs)
    assert found == {path: expected[path] for path in expected if not path.startswith("3")}


def test_bases_may_be_added_and_nothing_is_trained_twice(
    finished: Path, by_hand: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def told(*args: Any, **more: Any) -> Any:
        trained.append(more["output"].name)
        return hubdiff.finetune(*args, **more)

    monkeypatch.setattr(module, "finetune", told)
    hubdiff.recycle(write_plan(finished, "./v1", "./v2", "./v3"))
    assert trained == ["2-v2", "3-v3"]
    assert weights(finished / "runs") == weights(by_hand["iterative"])


def changed_recipe(here: Path) -> None:
    write_plan(here, "./v1", set={**SETTINGS, "steps": 3})


def changed_data(here: Path) -> None:
    with (here / "train.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')


def lost_model(here: Path) -> None:
    (here / "runs/1-v1/master/model.safetensors").unlink()


def lost_delta(here: Path) -> None:
    shutil.rmtree(here / "runs/1-v1-delta")


def another_delta(here: Path) -> None:
    (here / "runs/1-v1-delta/hubdiff.json").write_text("{}")


def another_base(here: Path) -> None:
    write_plan(here, "./v2")


def changed_base(here: Path) -> None:
    """The next version lies where the first one did, whose Δ was not made yet."""
    shutil.copy(here / "v2/model.safetensors", here / "v1/model.safetensors")
    shutil.rmtree(here / "runs/1-v1-delta")
    state = json.loads((here / "runs/recycle.json").read_text())
    del state["steps"]["1-v1"]["delta"]
    (here / "runs/recycle.json").write_text(json.dumps(state))


def another_place(here: Path) -> None:
    write_plan(here, "./v1", push="./deltas/{name}")


@pytest.mark.parametrize(
    ("change", "words", "trains"),
    [
        (changed_recipe, "1-v1 was begun with another recipe", True),
        (changed_data, "1-v1 was begun with another data", True),
        (lost_model, "1-v1 lacks what was trained", True),
        (lost_delta, "1-v1 lacks its delta", False),
        (another_delta, "1-v1 lacks its delta", False),
        (another_base, "1-v1 is no step of the plan any more", True),
        (changed_base, "1-v1 was begun with another content of its base", True),
        (another_place, "1-v1 has its delta in ./runs/1-v1-delta, not where", False),
    ],
)
def test_what_no_longer_fits_is_refused_unless_forced(
    finished: Path, change: Callable[[Path], None], words: str, trains: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan = finished / "plan.yaml"
    change(finished)
    before = models.hashes(finished)
    with pytest.raises(HubdiffError, match=words) as caught:
        hubdiff.recycle(plan)
    assert "--force" in str(caught.value.next_step)
    assert models.hashes(finished) == before
    trained = []

    def told(*args: Any, **more: Any) -> Any:
        trained.append(more["output"].name)
        return hubdiff.finetune(*args, **more)

    monkeypatch.setattr(module, "finetune", told)
    assert hubdiff.recycle(plan, force=True).report["finished"]
    assert bool(trained) == trains
    hubdiff.recycle(plan)


# --- transfers that are refused ---


def test_a_refused_transfer_stops_before_it_is_trained(finished: Path) -> None:
    plan = write_plan(finished, "./v1", "./stranger")
    with pytest.raises(NotAdvised, match=r"2-stranger: the delta of 1-v1 is not put on") as caught:
        hubdiff.recycle(plan)
    assert "--force" in str(caught.value.next_step)
    assert not (finished / "runs/2-stranger").exists()
    report = json.loads((finished / "runs/report.json").read_text())
    assert not report["finished"]
    assert report["steps"][0]["delta"]
    assert report["steps"][1]["check"]["verdict"] == "refuse"
    assert "**Not finished:**" in (finished / "runs/report.md").read_text()
    done = weights(finished / "runs")
    made = hubdiff.recycle(plan, force=True)
    assert made.report["finished"]
    assert made.report["steps"][1]["check"]["verdict"] == "refuse"
    assert {path: weights(finished / "runs")[path] for path in done} == done


# --- on the Hub ---


def test_deltas_on_the_hub_lead_back_and_bases_stay_pinned(
    here: Path, by_hand: dict[str, Path], devhub: DevHub, put_repo: Callable[..., str],
    new_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also when a branch moves while a run is stopped, and when the answer of a push is lost."""
    # transformers asks where huggingface_hub was told to when it was imported.
    urls = devhub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", urls)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", devhub.url)
    names = [put_repo(on_hub.contents(here / f"v{n}")) for n in (1, 2, 3)]
    heads = [on_hub.head(devhub, name) for name in names]
    pattern = f"{new_name()}-{{number}}"
    deltas = [pattern.format(number=n) for n in (1, 2, 3)]
    plan = write_plan(here, *names, push=pattern)
    with monkeypatch.context() as patched:
        patched.setattr(module, "push_delta", stops(module.push_delta, on_call=1))
        with pytest.raises(Stop):
            hubdiff.recycle(plan)
    put_repo(on_hub.contents(here / "stranger"), names[1])
    assert on_hub.head(devhub, names[1]) != heads[1]

    made = hubdiff.recycle(plan)
    for number, name in enumerate(names, 1):
        ours = weights(here / "runs" / f"{number}-{name.partition('/')[2]}")
        theirs = weights(by_hand["iterative"] / f"{number}-v{number}")
        assert ours == theirs
    for number, repo in enumerate(deltas, 1):
        listed = on_hub.listing(devhub, repo)
        ids = on_hub.ids(by_hand["iterative"] / f"{number}-v{number}-delta", listed)
        layers = [path for path in ids if path.endswith(".safetensors")]
        assert [listed[path] for path in layers] == [ids[path] for path in layers] != []

    graph = hubdiff.lineage(deltas[2])
    edges = {(e.origin, e.made, e.relation): e.commit for e in graph.edges}
    for old, new in ((0, 1), (1, 2)):
        commit = edges[deltas[old], deltas[new], STARTED_FROM]
        assert commit == on_hub.head(devhub, deltas[old])
        assert graph.nodes[deltas[old]].kind == "delta"
    for base, commit, delta in zip(names, heads, deltas, strict=True):
        assert edges[base, delta, BASE_OF] == commit
    assert deltas[2] in hubdiff.lineage(deltas[0]).nodes

    rows = made.report["steps"]
    assert [row["base"] for row in rows] == [
        f"{name}@{commit}" for name, commit in zip(names, heads, strict=True)
    ]
    refs = [f"{repo}@{on_hub.head(devhub, repo)}" for repo in deltas]
    assert [row["delta"]["ref"] for row in rows] == refs
    assert [row["started_from"] and row["started_from"]["delta"] for row in rows] == [
        None, *refs[:2]
    ]  # fmt: skip


def test_what_comes_of_a_private_delta_is_private(
    here: Path, by_hand: dict[str, Path], devhub: DevHub, put_repo: Callable[..., str],
    new_name: Callable[[], str],
) -> None:  # fmt: skip
    """Whoever reads it has part of what was private."""
    old = put_repo(on_hub.contents(by_hand["iterative"] / "1-v1-delta"), private=True)
    first, repo = {"base": "./v1", "delta": old}, new_name()
    hubdiff.recycle(write_plan(here, first, {"base": "./v2", "push": repo}))
    assert on_hub.api(devhub).model_info(repo).private
    assert hubdiff.inspect(repo).manifest.started_from.repo == old


def test_what_a_push_would_meet_is_met_before_training(
    here: Path, devhub: DevHub, put_repo: Callable[..., str], new_name: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    taken = put_repo({"model.safetensors": b"somebody's"})
    (here / "mine").mkdir()
    (here / "mine/thesis.txt").write_text("years")
    monkeypatch.setattr(module, "finetune", lambda *_, **__: pytest.fail("trained"))
    for push, words in ((taken, "holds model.safetensors already"), ("./mine", "is not empty")):
        with pytest.raises(OutputExists, match=words):
            hubdiff.recycle(write_plan(here, "./v1", push=push))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AuthError):
        hubdiff.recycle(write_plan(here, "./v1", push=new_name()))
    assert not (here / "runs").exists()


# --- a fine-tune that there is already ---


def test_the_first_base_may_be_tuned_already(here: Path, by_hand: dict[str, Path]) -> None:
    """Given its delta all goes on as if it had been trained here."""
    shutil.copytree(by_hand["iterative"] / "1-v1-delta", here / "old-delta")
    made = hubdiff.recycle(write_plan(here, {"base": "./v1", "delta": "./old-delta"}, "./v2"))
    expected = weights(by_hand["iterative"])
    assert weights(here / "runs") == {p: h for p, h in expected.items() if p.startswith("2-")}
    assert made.report["steps"][0]["delta"]["ref"] == "./old-delta"
    assert made.report["steps"][0]["losses"] is None


def test_the_delta_of_a_given_model_is_made(here: Path, by_hand: dict[str, Path]) -> None:
    tuned = shutil.copytree(by_hand["iterative"] / "1-v1", here / "tuned")
    hubdiff.recycle(write_plan(here, {"base": "./v1", "tuned": "./tuned"}, output="out"))
    hubdiff.push_delta(tuned, here / "expected", base=here / "v1")
    assert weights(here / "out/1-v1-delta") == weights(here / "expected")
    assert not (here / "out/1-v1").exists()


def test_a_delta_of_another_base_is_refused(here: Path, by_hand: dict[str, Path]) -> None:
    shutil.copytree(by_hand["iterative"] / "1-v1-delta", here / "old-delta")
    with pytest.raises(HubdiffError, match="was not made from"):
        hubdiff.recycle(write_plan(here, {"base": "./v2", "delta": "./old-delta"}, "./v3"))
    assert not (here / "runs").exists()


# --- the report, and what is said ---


def test_the_report_has_every_step_and_a_picture(finished: Path) -> None:
    hubdiff.recycle(write_plan(finished, "./v1", "./v2"))
    report = json.loads((finished / "runs/report.json").read_text())
    one, two = report["steps"]
    logged = (finished / "runs/2-v2/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in logged]
    assert two["losses"] == [losses[0], losses[-1]]
    assert two["losses"][0] < one["losses"][0]
    assert two["training_steps"] == 4
    assert two["seconds"] > 0
    assert two["check"]["verdict"] == "go"
    assert two["check"]["cosine"] > 0.99
    assert 0 < two["check"]["drift"] < 0.1
    assert two["started_from"] == {"step": "1-v1", "delta": "./runs/1-v1-delta"}
    sizes = [
        file.stat().st_size for file in (finished / "runs/2-v2-delta").glob("delta-*.safetensors")
    ]
    assert two["delta"]["bytes"] >= sum(sizes) > 0
    old, new = (
        load_file(f / "model.safetensors") for f in (finished / "v2", finished / "runs/2-v2/master")
    )
    norm = sum(float((new[n].double() - old[n].double()).square().sum()) for n in old) ** 0.5
    assert two["delta"]["norm"] == pytest.approx(norm, rel=1e-3)
    text = (finished / "runs/report.md").read_text()
    assert str(finished) not in text + json.dumps(report)
    for words in ("| 2-v2 | base + Δ of 1-v1 | go |", "](losses.png)", "`./runs/1-v1-delta`"):
        assert words in text
    assert (finished / "runs/losses.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_are_those_of_all_runs(tmp_path: Path) -> None:
    from hubdiff.jobs.recycle_report import training_of

    lines = [{"step": n, "loss": 3 - n, "seconds": s} for n, s in ((1, 5.0), (2, 8.0), (3, 2.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_of(tmp_path) == {"losses": [2, 0], "seconds": 10.5}


def test_a_dry_run_says_the_steps_and_writes_nothing(here: Path, by_hand: dict[str, Path]) -> None:
    first = {"base": "./v1", "delta": "./old-delta"}
    shutil.copytree(by_hand["iterative"] / "1-v1-delta", here / "old-delta")
    plan = write_plan(here, first, "./v2", "./v3", method="direct")
    before = models.hashes(here)
    made = hubdiff.recycle(plan, dry_run=True)
    assert [(s["name"], s["started_from"] and s["started_from"]["step"], s["was"],
             s["delta_goes_to"]) for s in made.as_json()["steps"]] == [
        ("1-v1", None, "to do", "./old-delta"),
        ("2-v2-direct", None, "to do", "./runs/2-v2-direct-delta"),
        ("2-v2", "1-v1", "to do", "./runs/2-v2-delta"),
        ("3-v3", "2-v2-direct", "to do", "./runs/3-v3-delta"),
    ]  # fmt: skip
    assert models.hashes(here) == before
    assert {path.name for path in here.iterdir() if path.name.startswith(".")} == set()


def test_the_command_shows_a_table_or_one_json_object(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(write_plan(finished, "./v1", "./v2"))
    assert cli(["recycle", plan, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"2-v2 +\./v2 +base \+ Δ of 1-v1 +\./runs/2-v2-delta +to do\n", shown)
    assert shown.endswith("dry run: nothing was written\n")
    assert cli(["recycle", plan]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"2-v2 +base \+ Δ of 1-v1 +go +[\d.]+ → [\d.]+ +", shown)
    assert re.search(rf"Δ of 2-v2 +./runs/2-v2-delta\nreport +{finished}/runs/report.md\n", shown)
    assert cli(["recycle", plan, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [step["was"] for step in said["steps"]] == ["done", "done"]
    assert said["finished"]


def test_ctrl_c_says_to_run_it_again(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "finetune", stopped)
    assert cli(["recycle", str(write_plan(here, "./v1"))]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_several_processes_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate launch and torchrun start them."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    assert cli(["recycle", str(write_plan(here, "./v1"))]) == 2
    assert "this command runs in one" in capsys.readouterr().err
    assert not (here / "runs").exists()


# --- plans ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bases": None}, "bases is missing"),
        ({"bases": []}, r"bases is \[\]"),
        ({"bases": [{"base": "./v1", "bse": 1}]}, r"bases\[1\] has the key 'bse'; known are base"),
        ({"bases": [{"push": "me/x"}]}, r"bases\[1\]\.base is missing"),
        ({"bases": [5]}, r"bases\[1\] is 5, no mapping"),
        ({"bases": ["a/b/c/d"]}, r"bases\[1\] is wrong: .*neither a repo name nor a folder"),
        ({"bases": ["./nowhere"]}, "there is no folder"),
        ({"bases": ["./v1", "./v2", "./v1"]}, "bases has ./v1 twice, as 1 and 3"),
        ({"bases": ["./v1", {"base": "./v2", "tuned": "./v1"}]}, r"bases\[2\] has a fine-tune"),
        ({"bases": [{"base": "./v1", "delta": "a/b"}]}, "there is nothing to do"),
        (
            {"bases": [{"base": "./v1", "delta": "a/b", "push": "a/c"}, "./v2"]},
            "Leave push|push it",
        ),
        ({"bases": [{"base": "./v1", "delta": "a/b", "tuned": "a/c"}]}, "both tuned and delta"),
        ({"basis": []}, "the plan has the key 'basis'; known are method"),
        ({"method": "both"}, "method is 'both', not iterative or direct"),
        ({"data": None}, "data is missing"),
        ({"data": "nowhere.jsonl"}, "data is 'nowhere.jsonl', and there is no file"),
        ({"output": None}, "output is missing"),
        ({"output": "train.jsonl/runs"}, "runs"),
        ({"output": "v1/runs"}, "output lies in the base ./v1"),
        ({"output": "v2"}, "is not the output of a recycle"),
        ({"private": "yes"}, "private is 'yes', not true or false"),
        ({"push": "me/{nmae}"}, r"push is 'me/{nmae}'; in braces it takes {name} and {number}"),
        ({"push": "me/delta", "bases": ["./v1", "./v2"]}, "push sends 2 deltas to me/delta"),
        ({"push": "me/a/b"}, "push is wrong"),
        ({"push": "./"}, "push sends a delta to ./., where a tuned model is to be"),
        ({"push": "./runs/1-v1/delta"}, "where a tuned model is to be"),
        ({"recipe": "nowhere.yaml"}, "recipe is wrong: there is no recipe"),
        ({"set": {"stepz": 3}}, "set is wrong: .*has 'stepz'"),
        ({"set": {"lora": {"rank": 0}}}, "set is wrong"),
        ({"set": {"lora": {"rank": 4}}, "bases": ["./v1", "./v2"]}, "asks for an adapter"),
        ({"set": [1]}, r"set is \[1\], no mapping"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    here: Path, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained, with what is wrong and what to do."""
    monkeypatch.setattr(module, "finetune", lambda *_, **__: pytest.fail("trained"))
    bases = changes.get("bases", ["./v1"])
    plan = write_plan(here, **{**changes, "bases": bases})
    before = models.hashes(here)
    with pytest.raises(HubdiffError, match=words) as caught:
        hubdiff.recycle(plan)
    assert caught.value.next_step
    assert models.hashes(here) == before


@pytest.mark.parametrize("text", [None, "[", "- a\n", "a: 2020-99-99"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(HubdiffError, match=r"plan\.yaml"):
        hubdiff.recycle(tmp_path / "plan.yaml")


def test_paths_begin_at_the_plan_whatever_stands_where_the_command_runs(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere/org/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    plan = read_plan(write_plan(here, "org/base", "v1", push="deltas/{number}"))
    assert [version.base for version in plan.versions] == ["hf://org/base", str(here / "v1")]
    assert plan.data == str(here / "train.jsonl")
    assert plan.output == here / "runs"
    assert [step.push for step in steps_of(plan)] == ["hf://deltas/1", "hf://deltas/2"]
    for ref in ("hf://org/base", str(here / "v1"), str(tmp_path)):
        assert plan.resolved(plan.shown(ref)) == ref
