"""Several deltas on one target, weights, scales by tensor: plans, records, side files, refusals.

The numbers are test_methods.py's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from huggingface_hub import hf_hub_download
from models import hashes
from on_hub import NewName, PutRepo, card, contents, head, ids, listing
from safetensors.torch import load_file
from test_delta_battery import segments_of

import hubdiff
from hubdiff import merge, trimming
from hubdiff.delta import Delta
from hubdiff.devhub import DevHub
from hubdiff.errors import CannotApply, CorruptPayload, IntegrityError, NotPortable, RefError
from hubdiff.plan import Method
from hubdiff.writer import FolderSink

UP = "model.layers.0.mlp.up_proj.weight"
ONE_OFF = ("hubdiff-result.json", "README.md")  # they name the output folder
METHODS = [
    {"method": "linear"},
    {"method": "ties"},
    {"method": "dare", "density": 0.3, "seed": 5},
]


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubdiff.jobs.making.layer_picture", lambda *_: None)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """base, the tunes a and b with their deltas, and a target in two shards."""
    base = models.weights()
    models.save(tmp_path / "base", base)
    tune(tmp_path, "a", models.moved(base, seed=1))
    tune(tmp_path, "b", models.moved(base, seed=2, frozen="embed"))
    models.save(tmp_path / "target", models.moved(base, 1e-3, seed=5), shards=2)
    return tmp_path


def tune(folder: Path, name: str, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    models.save(folder / name, tensors, **options)
    delta = folder / f"{name}-delta"
    hubdiff.push_delta(folder / name, delta, base=folder / "base")
    return delta


def both(folder: Path) -> list[Any]:
    return [(folder / "a-delta", 0.7), f"{folder}/b-delta:0.5"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def result(folder: Path) -> dict[str, str]:
    return {path: digest for path, digest in hashes(folder).items() if path not in ONE_OFF}


def plan(made: Path, deltas: Any = None, **options: Any) -> dict[str, Any]:
    deltas = deltas or both(made)
    return hubdiff.apply(deltas, made / "target", output=made / "x", dry_run=True, **options).plan


# --- plan, record, card ---


def test_the_record_lists_every_delta(made: Path) -> None:
    out = made / "out"
    applied = hubdiff.apply(both(made), made / "target", output=out, method="ties", density=0.4)
    assert applied.plan == plan(made, method="ties", density=0.4)
    assert applied.plan["case"] == "transfer"
    assert applied.plan["method"] == {"name": "ties", "density": 0.4}
    assert [item["weight"] for item in applied.plan["deltas"]] == [0.7, 0.5]
    record = json.loads((out / "hubdiff-result.json").read_text())
    assert record["method"] == {"name": "ties", "density": 0.4}
    assert not {"delta", "base", "tuned"} & set(record)
    for item, name in zip(record["deltas"], "ab", strict=True):
        assert item["name"] == f"{name}-delta"
        assert item["tuned"]["name"] == name
        assert item["base"]["name"] == "base"
        manifest = hashes(made / f"{name}-delta")["hubdiff.json"]
        assert item["manifest_sha256"] == manifest
    text = (out / "README.md").read_text()
    for words in ("`a-delta`", "`b-delta`", "| Weight | 0.7 |", "| Method | ties |", "TIES"):
        assert words in text


def test_one_delta_stays_as_it_was(made: Path) -> None:
    """A list of one, a weight and a scale are the same thing, exact and not in float32."""
    delta = made / "a-delta"
    for deltas, scale in (([(delta, 0.5)], 1.0), (f"{delta}:0.5", 1.0), ([(delta, 2.0)], 0.25)):
        hubdiff.apply(deltas, made / "target", output=made / "out", scale=scale, force=True)
        record = json.loads((made / "out/hubdiff-result.json").read_text())
        assert record["method"] is None
        hubdiff.apply(delta, made / "target", output=made / "half", scale=0.5, force=True)
        assert result(made / "out") == result(made / "half")
    own = hubdiff.apply([delta], made / "base", output=made / "own", method="linear")
    assert own.plan["case"] == "own base"
    weighted = plan(made, [(delta, 0.5)])
    assert weighted["reason"].endswith("the weight is 0.5")


def test_the_settings_are_said_as_they_are():
    assert str(Method("dare", 0.1234567, 12345678)) == "dare, density 0.1234567, seed 12345678"


def test_dare_takes_one_delta_too(made: Path) -> None:
    delta, base = made / "a-delta", weights(made / "base")
    hubdiff.apply(delta, made / "base", output=made / "out", method="dare", density=0.1)
    moved = (weights(made / "a")[UP] != base[UP]).double().mean()
    found = (weights(made / "out")[UP] != base[UP]).double().mean()
    assert 0.08 * moved < found < 0.12 * moved


def test_both_own_bases_are_one_target_like_any_other(made: Path) -> None:
    applied = hubdiff.apply(both(made), made / "base", output=made / "out")
    assert applied.plan["case"] == "transfer"
    assert "2 deltas are merged" in applied.plan["reason"]


def test_notes_say_whose_they_are(made: Path) -> None:
    (made / "target/tokenizer.json").write_text("{}")
    notes = plan(made)["notes"]
    assert [note.partition(":")[0] for note in notes] == ["a-delta", "b-delta"]


# --- the same whatever the order of the work ---


@pytest.mark.parametrize("options", METHODS, ids=lambda options: str(options["method"]))
def test_the_bytes_depend_on_nothing_but_the_inputs(
    made: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    found = []
    for workers, segment, block in ((1, 512, 4096), (5, 512, 1024), (5, 512, 1024)):
        monkeypatch.setattr(merge, "workers_for", lambda *, remote, gpu=False, n=workers: n)
        with segments_of(segment, block):
            for name in "ab":
                hubdiff.push_delta(
                    made / name, made / f"{name}-delta", base=made / "base", force=True
                )
            hubdiff.apply(both(made), made / "target", output=made / "out", force=True, **options)
        found.append(result(made / "out"))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: str(options["method"]))
def test_a_stopped_run_goes_on_and_another_does_not_take_its_files(
    made: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    hubdiff.apply(both(made), made / "target", output=made / "right", **options)
    finish, out, partial = FolderSink.finish, made / "out", made / ".out.hubdiff-partial"

    def stopping(self: FolderSink, record: Any) -> None:
        finish(self, record)
        raise KeyboardInterrupt

    def stopped(deltas: list[Any], **settings: Any) -> Path:
        with monkeypatch.context() as patched:
            patched.setattr(FolderSink, "finish", stopping)
            with pytest.raises(KeyboardInterrupt):
                hubdiff.apply(deltas, made / "target", output=out, **settings)
        return next(partial.glob("*.safetensors"))

    first = stopped(both(made), **options)
    written = first.stat().st_ino
    hubdiff.apply(both(made), made / "target", output=out, **options)
    assert (out / first.name).stat().st_ino == written
    assert result(out) == result(made / "right")

    # Another weight, scale or setting is another run.
    heavier = [both(made)[0], (made / "b-delta", 0.6)]
    others = [(heavier, options), (both(made), {**options, "scale": {"*.mlp.*": 0.5}})]
    if "seed" in options:
        others.append((both(made), {**options, "seed": 6}))
    for deltas, settings in others:
        os.rename(out, made / "done")
        stopped(deltas, **settings)
        hubdiff.apply(both(made), made / "target", output=out, **options)
        assert result(out) == result(made / "right")
        for file in (made / "done").iterdir():
            file.unlink()
        (made / "done").rmdir()


# --- scales by tensor ---


def test_scales_by_glob(made: Path) -> None:
    scale = {"*": 0.5, "model.layers.{0..7}.mlp.*": 2.0, "model.layers.1.*": 0.0}
    hubdiff.apply(made / "a-delta", made / "target", output=made / "out", scale=scale)
    uniform = {}
    for value in (0.5, 2.0, 0.0):
        hubdiff.apply(made / "a-delta", made / "target", output=made / f"{value}", scale=value)
        uniform[value] = weights(made / f"{value}")
    for name, tensor in weights(made / "out").items():
        value = 0.0 if ".1." in name else 2.0 if ".mlp." in name else 0.5
        assert torch.equal(tensor, uniform[value][name]), name
    assert (
        hashes(made / "0.0")["model-00001-of-00002.safetensors"]
        == (hashes(made / "target")["model-00001-of-00002.safetensors"])
    )
    record = json.loads((made / "out/hubdiff-result.json").read_text())
    assert record["scale"] == scale
    assert "2.0 for model.layers" in (made / "out/README.md").read_text().replace("\\", "")


def test_a_tensor_at_scale_0_is_not_read(made: Path) -> None:
    some, none = plan(made, scale={"*.mlp.*": 0.0}), plan(made, scale=0.0)
    assert none["read"]["delta"] == 0
    assert 0 < some["read"]["delta"] < plan(made)["read"]["delta"]


def test_a_scale_for_some_tensors_is_no_rebuild(made: Path) -> None:
    applied = hubdiff.apply(
        made / "a-delta", made / "base", output=made / "out", scale={"lm_head.*": 0.5}
    )
    assert applied.plan["case"] == "transfer"


def test_a_glob_without_a_tensor_is_refused(made: Path) -> None:
    with pytest.raises(CannotApply, match=r"model\.layers\.0\.mlp"):
        plan(made, scale={"model.layer.0.mlp.up_proj.weight": 0.5})


# --- side files ---


def test_side_files_are_replayed_one_after_the_other(tmp_path: Path) -> None:
    base = models.weights()
    models.save(tmp_path / "base", base, files={"chat_template.jinja": "old", "notes.txt": "old"})
    a = tune(
        tmp_path, "a", models.moved(base, seed=1), from_a=1, from_both="a",
        files={"chat_template.jinja": "a", "notes.txt": "a", "a.txt": "a"},
    )  # fmt: skip
    b = tune(
        tmp_path, "b", models.moved(base, seed=2), from_b=2, from_both="b",
        files={"chat_template.jinja": "b", "notes.txt": "old", "b.txt": "b"},
    )  # fmt: skip
    models.save(
        tmp_path / "target", models.weights(seed=3), own=3,
        files={"chat_template.jinja": "old", "notes.txt": "old"},
    )  # fmt: skip
    applied = hubdiff.apply([a, b], tmp_path / "target", output=tmp_path / "out", force=True)
    texts = {
        p.name: p.read_text() for p in (tmp_path / "out").glob("*.*") if p.suffix != ".safetensors"
    }
    assert (texts["chat_template.jinja"], texts["notes.txt"]) == ("b", "a")
    assert (texts["a.txt"], texts["b.txt"]) == ("a", "b")
    config = json.loads(texts["config.json"])
    assert [config[key] for key in ("own", "from_a", "from_b", "from_both")] == [3, 1, 2, "b"]
    # What both changed is never silent.
    notes = {file["path"]: file.get("note", "") for file in applied.plan["files"]}
    assert "b-delta after a-delta: an earlier delta changed it too" in notes["chat_template.jinja"]
    assert any(
        note.startswith("b-delta after a-delta: config.json: from_both: tuned value kept")
        for note in applied.plan["notes"]
    )
    record = json.loads(texts["hubdiff-result.json"])
    sources = {file["path"]: file["source"] for file in record["side_files"]}
    assert sources["notes.txt"] == "tuned (a-delta)"
    assert sources["chat_template.jinja"] == "tuned (b-delta)"
    assert sources["config.json"] == "merged"


# --- tensors that only a tuned model has ---


def with_head(folder: Path, name: str, head: torch.Tensor, seed: int) -> Path:
    return tune(folder, name, models.moved(models.weights(), seed=seed) | {"score.weight": head})


def test_a_tensor_that_both_add_must_be_the_same(made: Path) -> None:
    head = torch.ones(3, models.HIDDEN)
    one, same = with_head(made, "one", head, 1), with_head(made, "same", head, 2)
    other = with_head(made, "other", head + 1, 3)
    hubdiff.apply([one, same, made / "a-delta"], made / "target", output=made / "out")
    assert torch.equal(weights(made / "out")["score.weight"], head)
    with pytest.raises(CannotApply, match="one-delta and other-delta both add score"):
        plan(made, [one, made / "a-delta", other])
    plan(made, [one, other], exclude="score.*")


def test_a_tensor_that_one_adds_and_another_changes_is_refused(made: Path) -> None:
    small = {n: t for n, t in models.weights().items() if n != "lm_head.weight"}
    models.save(made / "headless", small)
    models.save(made / "c", models.moved(small) | {"lm_head.weight": torch.ones(96, 64)})
    hubdiff.push_delta(made / "c", made / "c-delta", base=made / "headless")
    with pytest.raises(CannotApply, match=r"c-delta brings a lm_head\.weight of its own and a-del"):
        plan(made, [made / "a-delta", made / "c-delta"])


# --- refusals ---


def test_what_can_not_be_added_is_refused_among_several(made: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "gptq"}}
    models.save(made / "q", models.moved(models.weights()), **quantised)
    hubdiff.push_delta(made / "q", made / "q-delta", base=made / "base")
    with pytest.raises(NotPortable, match="gptq"):
        plan(made, [made / "a-delta", made / "q-delta"])


@pytest.mark.parametrize(
    ("deltas", "options", "about"),
    [
        ("both", {"method": "slerp"}, "no method 'slerp'"),
        ("both", {"density": 0.5}, "linear takes no density"),
        ("both", {"method": "ties", "seed": 1}, "ties takes no seed"),
        ("both", {"method": "dare"}, "needs a density"),
        ("both", {"method": "dare", "density": 0.0}, "not a share"),
        ("both", {"method": "ties", "density": 1.5}, "not a share"),
        ("both", {"method": "ties", "density": float("nan")}, "not a share"),
        ("one", {"method": "ties"}, "cancels out"),
        ("huge", {}, "float32"),
        ("product", {"scale": 1e30}, "float32"),
        ("none", {}, "no delta was given"),
        ("number", {}, "neither a ref nor a pair"),
        ("text", {}, "neither a ref nor a pair"),
        ("both", {"scale": {"*": "a"}}, "float32"),
        ("both", {"method": "ties", "density": "a"}, "not a share"),
        ("both", {"method": "dare", "density": 0.5, "seed": -1}, "whole number"),
        ("both", {"method": "dare", "density": 0.5, "seed": 0.5}, "whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(
    made: Path, deltas: str, options: dict[str, Any], about: str
) -> None:
    a = made / "a-delta"
    given = {
        "both": both(made), "one": [(a, 0.5)], "huge": [(a, 1e39)], "product": [(a, 1e30)],
        "none": [], "number": (a, 0.5), "text": [(a, "x")],
    }[deltas]  # fmt: skip
    with pytest.raises((CannotApply, RefError), match=about) as caught:
        hubdiff.apply(given, made / "target", output=made / "out", **options)
    assert caught.value.next_step
    assert not (made / "out").exists()


def test_a_damaged_delta_is_noticed_when_thresholds_are_made(made: Path) -> None:
    """The first of two readings decides what is kept: it is checked like the second."""
    read, seen = Delta.read, []

    def damaged(self: Delta, steps: Any) -> Any:
        found = read(self, steps)
        if not seen:
            seen.append(1)
            view = next(iter(found.values()))[0].view
            view[-1] ^= 1
        return found

    with pytest.MonkeyPatch.context() as patched:
        measure = trimming._measure

        def measured(*arguments: Any) -> Any:
            patched.setattr(Delta, "read", damaged)
            try:
                return measure(*arguments)
            finally:
                patched.setattr(Delta, "read", read)

        patched.setattr(trimming, "_measure", measured)
        patched.setattr(merge, "workers_for", lambda **_: 1)
        with pytest.raises((IntegrityError, CorruptPayload)):
            hubdiff.apply(both(made), made / "target", output=made / "out", method="ties")
    assert seen
    assert not (made / "out").exists()


# --- on the Hub ---


@pytest.mark.parametrize("options", METHODS, ids=lambda options: str(options["method"]))
def test_two_deltas_from_the_hub_read_what_is_planned(
    devhub: DevHub, put_repo: PutRepo, new_name: NewName, made: Path, options: dict[str, Any]
) -> None:
    with segments_of(1024, 4096):
        repos = {}
        readme = card(license="mit")
        (made / "base/README.md").write_text(readme)
        (made / "target/README.md").write_text(readme)
        for name, licence in (("a", "mit"), ("b", "cc-by-nc-4.0")):
            (made / name / "README.md").write_text(card(license=licence))
            repos[name] = put_repo(contents(made / name))
        base, target = put_repo(contents(made / "base")), put_repo(contents(made / "target"))
        deltas = {name: new_name() for name in repos}
        for name, repo in repos.items():
            hubdiff.push_delta(repo, deltas[name], base=base)
        given = [f"{deltas['a']}:0.7", f"hf://{deltas['b']}@main:0.5"]

        def served() -> int:
            return sum(devhub.log.bytes_served(repo, "*.safetensors") for repo in deltas.values())

        devhub.log.clear()
        planned = hubdiff.apply(given, target, output=made / "x", dry_run=True, **options)
        headers = served()
        devhub.log.clear()
        applied = hubdiff.apply(given, target, push_to=new_name(), **options, force=True)
        assert applied.plan == planned.plan
        side = sum(f["bytes"] for f in planned.plan["files"] if f["action"] == "copy from delta")
        assert served() - headers + side == planned.plan["read"]["delta"]
        once = hubdiff.apply(given, target, output=made / "x", dry_run=True).plan["read"]["delta"]
        share = planned.plan["read"]["delta"] / once
        assert 1.5 < share < 2 if options["method"] == "ties" else share == 1

        for name in repos:
            delta = made / f"{name}-delta"
            hubdiff.push_delta(made / name, delta, base=made / "base", force=True)
        hubdiff.apply(both(made), made / "target", output=made / "local", **options)
        found = listing(devhub, applied.where)
        local = ids(made / "local", found)
        assert {p: i for p, i in found.items() if p not in ONE_OFF} == {
            p: i for p, i in local.items() if p not in ONE_OFF
        }
    file = hf_hub_download(applied.where, "hubdiff-result.json", endpoint=devhub.url)
    record = json.loads(Path(file).read_text())
    assert [d["commit"] for d in record["deltas"]] == [head(devhub, d) for d in deltas.values()]
    text = Path(hf_hub_download(applied.where, "README.md", endpoint=devhub.url)).read_text()
    assert "\nlicense: cc-by-nc-4.0\n" in text
    for name, licence in (("a", "mit"), ("b", "cc-by-nc-4.0")):
        assert f"the tuned model of {deltas[name]} is under {licence}" in text
        assert f"- {deltas[name]}\n" in text.split("---")[1]
