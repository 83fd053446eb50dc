"""eval: a real harness on a real (tiny) model; what it says of target + Δ in memory is what it says
of the folder that apply writes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard

import hubdiff
from hubdiff.cli import run as cli
from hubdiff.devhub import DevHub
from hubdiff.errors import HubdiffError
from hubdiff.jobs.bench import Evaluated
from hubdiff.lab.comparison import recovery_of_scores
from hubdiff.lab.scores import Measured, pooled
from hubdiff.lab.suites import read_suites

lm_eval = pytest.importorskip("lm_eval")

from tiny_tasks import choice_task, make_tuned, sort_task  # noqa: E402


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where answers of a stopped run are kept."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_tuned(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    return [str(sort_task(folder)), str(choice_task(folder))]


def run(model: str | Path, tasks: list[str], **more: Any) -> Evaluated:
    device = "auto" if more.get("backend") == "vllm" else "cpu"
    made = hubdiff.evaluate(model, tasks=tasks, device=device, **more)
    assert made is not None
    return made


def on(base: Path, delta: Path) -> str:
    return f"{base}+{delta}"


# --- what it measures ---


def test_a_delta_in_memory_scores_as_the_folder_that_apply_writes(
    family: tuple[Path, Path, Path],
    tasks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, _, delta = family
    hubdiff.apply(delta, base, output=tmp_path / "result", scale=0.5, force=True)
    monkeypatch.setattr("hubdiff.jobs.load._load_by_folder", _never)
    ours = run(on(base, delta), tasks, scale=0.5)
    theirs = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(tmp_path / "result"), "device": "cpu"},
        tasks=tasks,
        batch_size=8,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    for score, name, metric in zip(
        ours.scores, ("sort_letters", "pick_letters"), ("exact_match", "acc"), strict=True
    ):
        assert score.name == name
        assert score.examples == 40
        assert score.value == theirs["results"][name][f"{metric},none"]
        assert score.stderr == pytest.approx(theirs["results"][name][f"{metric}_stderr,none"])
        said = [line["filtered_resps"] for line in theirs["samples"][name]]
        assert [line["filtered_resps"] for line in ours.samples[name]] == said


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("the result was written")


def test_the_delta_brings_the_skill(family: tuple[Path, Path, Path], tasks: list[str]) -> None:
    base, tuned, delta = family
    without, with_delta, itself = (
        run(model, tasks[:1]).scores[0].value for model in (base, on(base, delta), tuned)
    )
    assert without == 0
    assert with_delta == itself > 0.5


def test_weights_and_scale_multiply(family: tuple[Path, Path, Path], tasks: list[str]) -> None:
    base, _, delta = family
    one = run(f"{base}+{delta}:0.5", tasks)
    other = run(on(base, delta), tasks, scale=0.5)
    assert [s.value for s in one.scores] == [s.value for s in other.scores]
    assert one.model.endswith(":0.5")
    none = run(f"{base}+{delta}:0", tasks)
    assert [s.value for s in none.scores] == [s.value for s in run(base, tasks).scores]


def test_two_processes_say_what_one_says(
    family: tuple[Path, Path, Path], tasks: list[str], tmp_path: Path
) -> None:
    base, _, delta = family
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hubdiff"]
    command += ["eval", on(base, delta), "--tasks", ",".join(tasks), "--scale", "0.6"]
    done = subprocess.run(
        [sys.executable, *command, "--json", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = run(on(base, delta), tasks, scale=0.6)
    found = json.loads(done.stdout)
    assert [s["value"] for s in found["scores"]] == [s.value for s in ours.scores]
    assert [s["examples"] for s in found["scores"]] == [40, 40]


@pytest.mark.parametrize(
    ("sizes", "value", "stderr"),
    [
        ([(10, 0.5, 0.1)], 0.5, 0.1),
        ([(10, 1.0, 0.0), (30, 0.0, 0.0)], 0.25, 0.0),
        ([(10, 0.5, 0.2), (10, 0.7, 0.2)], 0.6, 0.2 / math.sqrt(2)),
        ([(10, 0.5, None), (10, 0.7, 0.2)], 0.6, None),
    ],
)
def test_several_tasks_are_one_score(sizes: Any, value: float, stderr: float | None) -> None:
    measured = [Measured("t", "acc", "none", v, s, True, n) for n, v, s in sizes]
    found = pooled(measured, 1)
    assert found[0] == pytest.approx(value)
    assert found[1] == (stderr if stderr is None else pytest.approx(stderr))
    # Two metrics of the same examples are no more evidence than one.
    twice = pooled([*measured, *measured], 2)
    assert twice == (pytest.approx(found[0]), found[1] and pytest.approx(found[1]))


# --- stopped and run again ---


class Stopping:
    """Progress of a run that is stopped after so many answers."""

    def __init__(self, after: int | None = None) -> None:
        self.asked: list[int] = []
        self.phases: list[tuple[str, int]] = []
        self.answered, self._after = 0, after

    def start(self, what: str, total: int, unit: str = "") -> None:
        self.phases.append((what, total))
        if what == "answering":
            self.asked.append(total)

    def advance(self, count: int) -> None:
        if self.phases[-1][0] != "answering":
            return
        self.answered += count
        if self._after is not None and self.answered >= self._after:
            raise KeyboardInterrupt

    def finish(self) -> None: ...

    def note(self, text: str) -> None: ...


@pytest.mark.parametrize("after", [1, 17, 40, 75])
def test_a_stopped_evaluation_goes_on(
    after: int, family: tuple[Path, Path, Path], tasks: list[str], home: Path
) -> None:
    base, _, delta = family
    model = on(base, delta)
    with pytest.raises(KeyboardInterrupt):
        run(model, tasks, scale=0.5, progress=Stopping(after))
    assert list(home.rglob("answers*"))
    again = Stopping()
    resumed = run(model, tasks, scale=0.5, progress=again)
    assert sum(again.asked) == 40 + 80 - after
    assert not list(home.rglob("answers*"))
    whole = Stopping()
    other = run(model, tasks, scale=0.5, progress=whole)
    assert sum(whole.asked) == 40 + 80
    assert whole.phases[0] == ("reading the tasks", len(tasks))
    assert [s.as_json() for s in resumed.scores] == [s.as_json() for s in other.scores]


def test_fewer_at_a_time_go_on_too(family: tuple[Path, Path, Path], tasks: list[str]) -> None:
    """What a full GPU is advised to do."""
    with pytest.raises(KeyboardInterrupt):
        run(family[1], tasks, progress=Stopping(24))
    again = Stopping()
    run(family[1], tasks, progress=again, batch=3)
    assert sum(again.asked) == 40 + 80 - 24


def test_damaged_answers_are_asked_again(
    family: tuple[Path, Path, Path], tasks: list[str], home: Path
) -> None:
    for number, damage in enumerate((b"nothing", b"")):
        with pytest.raises(KeyboardInterrupt):
            run(family[1], tasks, progress=Stopping(24 + number))
        (answers,) = home.rglob("answers*.db")
        answers.write_bytes(damage)
        again = Stopping()
        run(family[1], tasks, progress=again)
        assert sum(again.asked) == 40 + 80


def test_a_full_disk_is_said_and_nothing_lost(
    family: tuple[Path, Path, Path], tasks: list[str], home: Path
) -> None:
    """No file may grow beyond 24,000 bytes: what SQLite meets is what a full disk gives it."""
    line = [sys.executable, "-m", "hubdiff", "eval", str(family[0]), "--tasks", ",".join(tasks)]
    limit = "import resource, runpy, sys; sys.argv = sys.argv[1:]; sys.argv[0] = 'hubdiff'; "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000)); "
    limit += "runpy.run_module('hubdiff', run_name='__main__')"
    run(family[0], tasks)  # the datasets library has its files now
    done = subprocess.run(
        [line[0], "-c", limit, *line[2:], "--device", "cpu"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "can't be kept in" in done.stderr
    assert "HF_HOME" in done.stderr
    assert list(home.rglob("answers*.db"))
    assert run(family[0], tasks).scores[0].examples == 40


def test_a_second_run_keeps_out(family: tuple[Path, Path, Path], tasks: list[str]) -> None:
    class Second(Stopping):
        def start(self, what: str, total: int, unit: str = "") -> None:
            if what == "answering":
                with pytest.raises(HubdiffError, match="another"):
                    run(family[1], tasks)
            super().start(what, total, unit)

    assert run(family[1], tasks, progress=Second()).scores


def test_answers_are_of_one_model_only(
    family: tuple[Path, Path, Path], tasks: list[str], home: Path
) -> None:
    base, _, delta = family
    with pytest.raises(KeyboardInterrupt):
        run(on(base, delta), tasks, scale=0.5, progress=Stopping(30))
    for model, more in ((base, {}), (on(base, delta), {"scale": 0.4}), (base, {"seed": 3})):
        progress = Stopping()
        run(model, tasks, progress=progress, **more)
        assert sum(progress.asked) == 40 + 80


# --- what is refused ---


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tasks": []}, "no task was named"),
        ({"tasks": ["sort_leters.yaml"]}, "no file"),
        ({"tasks": ["paper/gsm9k"]}, "Did you mean paper/gsm8k"),
        ({"suite": "papers"}, "no suite 'papers'"),
        ({"limit": 0}, "one of each task"),
        ({"batch": 0}, "example in each batch"),
        ({"backend": "vllm"}, "pip install vllm"),
        ({"backend": "jax"}, "no backend"),
        ({"scale": 0.5}, "no delta that a scale"),
        ({"chat_template": True}, "no chat template"),
        ({"card": "./nowhere"}, "no folder"),
    ],
)
def test_what_makes_no_sense_is_refused(
    more: dict[str, Any], says: str, family: tuple[Path, Path, Path], tasks: list[str]
) -> None:
    with pytest.raises(HubdiffError) as caught:
        hubdiff.evaluate(family[0], **{"tasks": tasks, "device": "cpu", **more})
    assert says in f"{caught.value} {caught.value.next_step}"


def test_a_task_that_does_not_exist_is_named_before_the_model_is_read(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(HubdiffError, match="no task 'gsm8k_kot'") as caught:
        hubdiff.evaluate(model, tasks=["gsm8k_kot"])
    assert "gsm8k_cot" in str(caught.value.next_step)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, "can't be used"),
        ({"unsafe_code": True}, "runs code"),
        ({"output_type": "guess"}, "can't be used"),
    ],
)
def test_tasks_that_can_t_be_used_are_named(
    changes: dict[str, Any], says: str, family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    task = sort_task(tmp_path, **changes)
    with pytest.raises(HubdiffError, match=says):
        run(family[0], [str(task)])


def test_a_task_is_not_asked_for_twice(
    family: tuple[Path, Path, Path], tasks: list[str], tmp_path: Path
) -> None:
    with pytest.raises(HubdiffError, match="sort_letters is asked for twice"):
        run(family[0], [tasks[0], str(sort_task(tmp_path))])


def test_vllm_is_given_the_merged_folder(
    family: tuple[Path, Path, Path],
    tasks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In vLLM's place stands the harness's model of transformers."""
    base, _, delta = family
    hubdiff.apply(delta, base, output=tmp_path / "result", scale=0.5, force=True)
    places: list[Path] = []

    def read(place: str, **_: Any) -> Any:
        places.append(Path(place))
        weights = "model.safetensors"
        assert (places[-1] / weights).read_bytes() == (tmp_path / "result" / weights).read_bytes()
        return lm_eval.models.huggingface.HFLM(place, device="cpu", batch_size=8)

    monkeypatch.setattr("hubdiff.jobs.bench.find_spec", lambda name: name)
    known = {"vllm": "0.1"}
    monkeypatch.setattr("hubdiff.jobs.bench.version", lambda name: known.get(name) or version(name))
    stand_in = SimpleNamespace(VLLM=read)
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", stand_in)
    made = run(on(base, delta), tasks, scale=0.5, backend="vllm")
    ours = run(on(base, delta), tasks, scale=0.5)
    assert [s.value for s in made.scores] == [s.value for s in ours.scores]
    assert len(places) == 1
    assert not places[0].exists()
    assert not places[0].parent.exists()


def test_vllm_under_another_name_is_said_in_words(
    family: tuple[Path, Path, Path], tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As builds for other devices have it: the module is there, the distribution is not."""

    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("hubdiff.jobs.bench.find_spec", lambda name: name)
    monkeypatch.setattr("hubdiff.jobs.bench.version", unknown)
    with pytest.raises(HubdiffError, match="under another name"):
        run(family[0], tasks, backend="vllm")


def test_vllm_is_not_given_a_device(
    family: tuple[Path, Path, Path], tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubdiff.jobs.bench.require_extra", lambda backend: None)
    with pytest.raises(HubdiffError, match="vLLM chooses its devices itself"):
        hubdiff.evaluate(family[0], tasks=tasks, device="cpu", backend="vllm")


def test_vllm_itself_says_what_transformers_says(tasks: list[str], tmp_path: Path) -> None:
    """Needs vLLM, and minutes. Its kernels for CPUs want heads of 32."""
    pytest.importorskip("vllm")
    base, _, delta = make_tuned(tmp_path, hidden_size=64, intermediate_size=128)
    ours, theirs = (
        run(on(base, delta), tasks, backend=backend) for backend in ("accelerate", "vllm")
    )
    assert theirs.libraries["vllm"]
    for one, other in zip(ours.scores, theirs.scores, strict=True):
        assert other.value == pytest.approx(one.value, abs=0.05)  # other kernels round otherwise


def test_without_a_word_of_sampling_the_likeliest_is_taken(
    family: tuple[Path, Path, Path], tasks: list[str]
) -> None:
    """The harness's vLLM would draw at a temperature of 1."""
    made = run(family[1], tasks[:1], limit=2)
    assert [line["arguments"][0][1]["do_sample"] for line in made.samples["sort_letters"]] == [
        False,
        False,
    ]


def test_what_a_task_says_of_sampling_stays(
    family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    drawing = {"until": ["\n"], "max_gen_toks": 6, "temperature": 0.7}
    task = sort_task(tmp_path, generation_kwargs=drawing)
    made = run(family[1], [str(task)], limit=1)
    assert made.samples["sort_letters"][0]["arguments"][0][1] == drawing


def test_a_full_gpu_gets_advice(
    family: tuple[Path, Path, Path], tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU here: the error is raised where the library would."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for place in ("hubdiff.jobs.bench.load", "hubdiff.lab.harness.HFLM.generate_until"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(HubdiffError, match="memory of cpu is full") as caught:
                run(on(family[0], family[2]), tasks[:1])
        assert "--batch-size 4" in str(caught.value.next_step)
        assert "--spread" in str(caught.value.next_step)


def test_models_and_deltas_are_told_apart(
    family: tuple[Path, Path, Path], tasks: list[str], tmp_path: Path
) -> None:
    base, _, delta = family
    with pytest.raises(HubdiffError, match="is a delta"):
        run(delta, tasks)
    with pytest.raises(HubdiffError, match="not a delta"):
        run(on(base, base), tasks)
    odd = tmp_path / "a+b:c d"
    shutil.copytree(base, odd)
    assert run(str(odd), tasks[:1], limit=2).scores[0].examples == 2
    assert run(on(odd, delta), tasks[:1], limit=2).scores[0].examples == 2


# --- the suite of the paper ---


def test_the_suites_are_what_the_harness_has() -> None:
    from lm_eval.tasks._index import Kind

    from hubdiff.lab.harness import task_manager

    manager = task_manager(include_defaults=True)

    def leaves(name: str) -> Iterator[dict[str, Any]]:
        entry = manager.task_index[name]
        config = manager._factory._load_full_config(entry, None)
        if entry.kind is Kind.GROUP:
            for child in config["task"]:
                yield from leaves(child)
        elif entry.kind is Kind.TAG:
            for child in sorted(entry.tags):
                yield from leaves(child)
        else:
            yield config

    suites = read_suites()
    assert {name: len(tasks) for name, tasks in suites.items()} == {"paper": 10, "global-mmlu": 42}
    for wanted in (wanted for tasks in suites.values() for wanted in tasks.values()):
        found = list(leaves(wanted.task))
        assert found, wanted.name
        for config in found:
            assert float(config["metadata"]["version"]) == wanted.version, wanted.name
            assert int(config.get("num_fewshot") or 0) == wanted.fewshot, wanted.name
            filters = [one["name"] for one in config.get("filter_list", [])] or ["none"]
            metrics = [one["metric"] for one in config["metric_list"]]
            known = {f"{metric},{picked}" for metric in metrics for picked in filters}
            assert set(wanted.metrics) <= known, wanted.name


def test_another_version_of_a_suite_s_task_is_refused(
    family: tuple[Path, Path, Path], tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubdiff.lab import suites

    pinned = suites.Wanted("own/sort", tasks[0], 1.0, 0, ("exact_match,none",))
    other = suites.Wanted("own/sort", tasks[0], 2.0, 0, ("exact_match,none",))
    for wanted in (pinned, other):
        monkeypatch.setattr(suites, "read_suites", lambda w=wanted: {"own": {"sort": w}})
        if wanted is pinned:
            assert run(family[0], ["own/sort"]).scores[0].name == "own/sort"
        else:
            with pytest.raises(HubdiffError, match="would not compare"):
                run(family[0], [], suite="own")


def test_other_metrics_than_means_have_no_outcomes(
    family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A perplexity is no mean over examples, and small is good: nothing pretends to be."""
    metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity"}
    task = sort_task(
        tmp_path,
        "perplexity",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{completion}}",
        metric_list=[{**metric, "higher_is_better": False}],
    )
    (found,) = run(family[1], [str(task)]).scores
    assert found.outcomes == {}
    assert not found.higher_is_better
    base, tuned, delta = family
    with pytest.raises(HubdiffError, match="no mean over its examples"):
        hubdiff.tune_scale(delta, base, tasks=[str(task)], device="cpu")
    compared = hubdiff.compare(
        delta, base, base=base, tuned_target=tuned, tasks=[str(task)], device="cpu"
    )
    (one,) = compared.tasks
    assert one.change is None
    assert one.recovery is not None
    by_name = dict(zip(compared.models, (s.value for s in one.scores), strict=True))
    assert by_name["target + Δ"] == by_name["tuned target"] == found.value
    learnt = found.value < by_name["target"]
    assert one.recovery.share == (pytest.approx(1.0) if learnt else None)
    assert one.recovery.low is None
    assert recovery_of_scores(8.0, 5.0, 2.0, higher_is_better=False).share == 0.5
    assert recovery_of_scores(8.0, 5.0, 2.0).share is None


PARTS = """\
def parts(doc, results):
    count = 1 + 2 * (doc["prompt"][5] in "jh")
    right = [a == b for a, b in zip(results[0], doc["completion"])][:count]
    return {"parts": right + [False] * (count - len(right))}


def share(items):
    flat = [x for row in items for x in row]
    return sum(flat) / len(flat)
"""


def test_several_numbers_of_an_example_count_alike(
    family: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """As IFEval's instructions: the score is that of all of them, and it has a standard error."""
    (tmp_path / "parts.py").write_text(PARTS)
    metric = {"metric": "parts", "aggregation": "SHARE", "higher_is_better": True}
    task = sort_task(tmp_path, "by_parts", metric_list=[metric], process_results="PARTS")
    text = task.read_text().replace("SHARE", "!function parts.share")
    task.write_text(text.replace("PARTS", "!function parts.parts"))
    base, _, delta = family
    (one,) = run(on(base, delta), [str(task)], scale=0.6).scores
    values = list(one.outcomes.values())
    assert 0 < one.value < 1
    assert sum(values) / len(values) == pytest.approx(one.value)
    assert one.stderr is not None
    assert 0.01 < one.stderr < 0.15


SHUFFLE = """\
import random


def shuffled(docs):
    return docs.map(lambda doc: {"order": random.sample("abcdef", 6)}, new_fingerprint=NAME)
"""


def test_a_seed_is_a_task_s_too(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Some tasks shuffle their choices as they read their data (GPQA)."""
    orders = []
    for number, seed in enumerate((7, 7, 8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        # A name of its own: the datasets library would give back what it made the first time.
        (folder / "shuffle.py").write_text(SHUFFLE.replace("NAME", f"'seed{number}'"))
        task = choice_task(folder, "shuffling", process_docs="DOCS")
        task.write_text(task.read_text().replace("DOCS", "!function shuffle.shuffled"))
        lines = run(family[0], [str(task)], seed=seed).samples["shuffling"]
        orders.append([line["doc"]["order"] for line in lines])
    assert orders[0] == orders[1] != orders[2]


# --- where scores go ---


def test_scores_go_into_a_folder_and_its_card(
    family: tuple[Path, Path, Path], tasks: list[str], tmp_path: Path
) -> None:
    base, _, delta = family
    place = tmp_path / "result"
    hubdiff.apply(delta, base, output=place, force=True)
    before = ModelCard.load(place / "README.md")
    made = run(on(base, delta), tasks, output=tmp_path / "out", card=place)
    after = ModelCard.load(place / "README.md")
    assert after.text == before.text
    old, new = before.data.to_dict(), after.data.to_dict()
    assert {k: v for k, v in new.items() if k != "model-index"} == old
    found = {one.task_name: one for one in after.data.eval_results}
    for one in made.scores:
        assert found[one.name].metric_value == one.value
        assert found[one.name].metric_args["stderr"] == pytest.approx(one.stderr)
        assert f"± {one.stderr:.4f}" in found[one.name].metric_name
    # A second time they take the place of the first.
    run(on(base, delta), tasks, card=place, limit=5)
    again = ModelCard.load(place / "README.md").data.eval_results
    assert len(again) == 2
    assert "the first 5 examples of each task only" in again[0].metric_name

    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["scores"] == [json.loads(json.dumps(s.as_json())) for s in made.scores]
    lines = (tmp_path / "out" / "samples_sort_letters.jsonl").read_text().splitlines()
    assert len(lines) == 40
    hits = [json.loads(line)["exact_match"] for line in lines]
    assert sum(hits) / 40 == made.scores[0].value


# transformers reads where the Hub is once, at import: in a process that begins when there is one.
COMMANDS = """\
import contextlib, io, json, sys

from hubdiff.cli import run

for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = run(json.loads(line))
    if code:
        sys.exit(code)
    print(json.dumps(json.loads(said.getvalue())), flush=True)
"""
Evaluate = Callable[..., Any]


@pytest.fixture
def evaluated(devhub: DevHub) -> Iterator[Evaluate]:
    """What ``hubdiff eval --json`` says of a model, in one process for all of a test's."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMANDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        pipes = process.stdin, process.stdout
        assert pipes[0] is not None
        assert pipes[1] is not None

        def evaluate(*words: str) -> Any:
            pipes[0].write(json.dumps(["eval", *words, "--json"]) + "\n")
            pipes[0].flush()
            return json.loads(pipes[1].readline())

        yield evaluate
        pipes[0].close()
    assert process.returncode == 0


def test_scores_go_into_a_repo_s_card(
    devhub: DevHub,
    family: tuple[Path, Path, Path],
    tasks: list[str],
    put_repo: Callable[..., str],
    evaluated: Evaluate,
) -> None:
    _, tuned, _ = family
    repo = put_repo({p.name: p.read_bytes() for p in tuned.iterdir() if p.is_file()})
    words = [repo, "--tasks", tasks[0], "--limit", "9", "--card", repo]
    assert "discussions" in evaluated(*words, "--create-pr")["card"]
    assert _measured_on_hub(devhub, evaluated, repo, Path(tasks[0]))
    assert "model-index" not in _card(devhub, repo)
    made = evaluated(*words)
    assert made["model"].startswith(f"{repo}@")
    card = ModelCard(_card(devhub, repo))
    assert card.data.eval_results[0].metric_value == made["scores"][0]["value"]


def _measured_on_hub(devhub: DevHub, evaluated: Evaluate, model: str, task: Path) -> bool:
    """The same task with its data in a dataset repo: its commit is what the scores say."""
    api = HfApi(endpoint=devhub.url, token=devhub.token("demo"))
    api.create_repo("org/letters", repo_type="dataset")
    done = api.upload_file(
        path_or_fileobj=task.with_name("held_out.jsonl"),
        path_in_repo="train.jsonl",
        repo_id="org/letters",
        repo_type="dataset",
    )
    config = yaml.safe_load(task.read_text()) | {"dataset_path": "org/letters"}
    del config["dataset_kwargs"]
    file = task.with_name("from_hub.yaml")
    file.write_text(yaml.safe_dump(config))
    found = evaluated(model, "--tasks", str(file))
    return found["scores"][0]["dataset"] == {
        "name": "org/letters",
        "config": None,
        "commit": done.oid,
    }


def _card(devhub: DevHub, repo: str) -> str:
    api = HfApi(endpoint=devhub.url, token=devhub.token("demo"))
    return Path(api.hf_hub_download(repo, "README.md")).read_text()


@pytest.mark.parametrize(
    "text",
    [
        "---\na: [\n---\n",
        "---\nmodel-index: 7\n---\nwords\n",
        "---\n{model-index: [{name: x, results: []}], a: 1}\n---\n",
        "---\nmodel-index:\n- {name: x, results: []}\n- {name: y, results: []}\n---\n",
        "---\njust words\n---\n",
    ],
)
def test_a_card_that_can_t_take_scores_is_left_alone_and_named_first(
    text: str, family: tuple[Path, Path, Path], tasks: list[str], tmp_path: Path
) -> None:
    place, progress = tmp_path / "place", Stopping()
    place.mkdir()
    (place / "README.md").write_text(text)
    with pytest.raises(HubdiffError, match="card can't take scores"):
        run(family[0], tasks[:1], card=place, limit=2, progress=progress)
    assert not progress.asked
    assert (place / "README.md").read_text() == text


def test_a_page_and_a_document(
    family: tuple[Path, Path, Path], tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base, _, delta = family
    command = ["eval", on(base, delta), "--tasks", ",".join(tasks), "--limit", "6"]
    assert cli(command) == 0
    assert "sort_letters" in capsys.readouterr().out
    assert cli([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [s["examples"] for s in document["scores"]] == [6, 6]
    assert cli([*command, "--create-pr"]) == 2
    assert "--card" in capsys.readouterr().err
