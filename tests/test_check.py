"""check: verdicts, what they rest on, and what looking costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import on_hub
import pytest
import torch
from on_hub import Family, NewName, PutRepo, contents

import hubdiff
from hubdiff.compat import DIFFERS, DOUBT, SAME, STOP, UNKNOWN
from hubdiff.devhub import DevHub
from hubdiff.errors import NotAdvised
from hubdiff.forecast import Forecast, Moments
from hubdiff.jobs.check import Checked, check
from hubdiff.progress import Silent
from hubdiff.verdict import DOUBTFUL, GO, REFUSE, THRESHOLDS, Reason, judge

TOKENS = {token: row for row, token in enumerate(["<pad>", "<s>", "</s>", "a", "b", "c", "d", "e"])}


def tokenizer(tokens: dict[str, int]) -> dict[str, str]:
    return {"tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": tokens}})}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A base, its tune, their delta, and targets: near, far and of another origin."""
    base = models.weights()
    files = {"README.md": on_hub.card(license="mit"), **tokenizer(TOKENS)}
    models.save(tmp_path / "base", base, files=files)
    models.save(tmp_path / "tuned", models.moved(base), files=files)
    models.save(tmp_path / "near", models.moved(base, 1e-3, 7, frozen="no"), files=files)
    models.save(tmp_path / "far", models.moved(base, 7e-3, 7, frozen="no"), files=files)
    models.save(tmp_path / "other", models.weights(5), files=files)
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    return tmp_path


def states(checked: Checked) -> dict[str, str]:
    return {finding.subject: finding.state for finding in checked.findings}


def test_a_near_target_is_go(folders: Path) -> None:
    checked = check(folders / "delta", folders / "near")
    assert checked.verdict.level == GO, checked.verdict.reasons
    assert set(states(checked).values()) == {SAME, DIFFERS}
    assert checked.forecast is not None


def test_a_far_target_is_doubtful(folders: Path) -> None:
    checked = check(folders / "delta", folders / "far")
    assert checked.verdict.level == DOUBTFUL
    assert "moved" in checked.verdict.why


def test_unrelated_weights_of_the_same_shapes_are_refused(folders: Path) -> None:
    checked = check(folders / "delta", folders / "other")
    assert checked.verdict.level == REFUSE
    assert checked.forecast is not None
    assert abs(checked.forecast.total.cosine or 1) < 0.05


def test_the_own_base_is_go_whatever_it_is_called(
    folders: Path, devhub: DevHub, put_repo: PutRepo, new_name: NewName
) -> None:
    checked = check(folders / "delta", folders / "base")
    assert (checked.verdict.level, checked.own_base, checked.forecast) == (GO, True, None)
    mirror = put_repo(contents(folders / "base"))
    found = check(folders / "delta", mirror)
    assert found.own_base
    assert "under another name" in found.findings[0].text

    # Made from a repo: known by its pin, and a mirror of it by content.
    base_repo, tuned_repo, delta = mirror, put_repo(contents(folders / "tuned")), new_name()
    hubdiff.push_delta(tuned_repo, delta, base=base_repo)
    assert "very commit" in check(delta, base_repo).findings[0].text
    again = check(delta, put_repo(contents(folders / "base"))).findings[0].text
    assert "sha256" in again
    assert "under another name" in again
    # Saved anew, so of another sha256: by the tensors.
    models.save(folders / "anew", models.weights(), shards=2)
    (folders / "anew" / "README.md").write_text((folders / "base" / "README.md").read_text())
    (folders / "anew" / "tokenizer.json").write_text(tokenizer(TOKENS)["tokenizer.json"])
    assert "fingerprints" in check(delta, put_repo(contents(folders / "anew"))).findings[0].text


def test_apply_stops_on_refuse_unless_forced(folders: Path) -> None:
    with pytest.raises(NotAdvised, match="cosine") as caught:
        hubdiff.apply(folders / "delta", folders / "other", output=folders / "out")
    assert "--force" in (caught.value.next_step or "")
    assert not (folders / "out").exists()
    hubdiff.apply(folders / "delta", folders / "other", output=folders / "out", force=True)
    record = json.loads((folders / "out" / "hubdiff-result.json").read_text())
    assert record["check"]["verdict"] == REFUSE


def test_apply_says_what_is_doubtful_and_goes_on(folders: Path) -> None:
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    hubdiff.apply(folders / "delta", folders / "far", output=folders / "out", progress=Noting())
    assert any(note.startswith("doubtful: ") for note in notes)
    record = json.loads((folders / "out" / "hubdiff-result.json").read_text())
    assert record["check"]["verdict"] == DOUBTFUL
    hubdiff.apply(folders / "delta", folders / "near", output=folders / "near out")
    record = json.loads((folders / "near out" / "hubdiff-result.json").read_text())
    assert record["check"] == {"verdict": GO, "reasons": []}
    hubdiff.apply(folders / "delta", folders / "base", output=folders / "own")
    assert json.loads((folders / "own" / "hubdiff-result.json").read_text())["check"] is None


@pytest.mark.parametrize(
    ("subject", "state", "options"),
    [
        ("tied weights", DOUBT, {"tie_word_embeddings": True}),
        ("architecture", DOUBT, {"num_attention_heads": 8}),
        ("positions", DIFFERS, {"rope_theta": 500000.0}),
        ("quantisation", STOP, {"quantization_config": {"quant_method": "gptq"}}),
        ("tokens", DOUBT, {"files": tokenizer({**TOKENS, "a": 4, "b": 3})}),
        ("tokens", DOUBT, {"files": tokenizer({**TOKENS, "f": 8})}),
        ("tokens", UNKNOWN, {"files": {"tokenizer.json": "[]"}}),
        ("chat template", DIFFERS, {"files": {"chat_template.jinja": "{{ x }}"}}),
        (
            "special tokens",
            DIFFERS,
            {"files": {"tokenizer_config.json": '{"eos_token": "</s>"}'}},
        ),
        ("licence", DIFFERS, {"files": {"README.md": on_hub.card(license="llama3")}}),
    ],
)
def test_what_differs_is_named(
    folders: Path, subject: str, state: str, options: dict[str, Any]
) -> None:
    files = {"README.md": on_hub.card(license="mit"), **tokenizer(TOKENS)}
    options["files"] = files | options.get("files", {})
    models.save(folders / "target", models.moved(models.weights(), 1e-3, 7), **options)
    checked = check(folders / "delta", folders / "target")
    assert states(checked)[subject] == state, checked.findings
    level = {STOP: REFUSE, DOUBT: DOUBTFUL}.get(state, GO)
    assert checked.verdict.level == level
    # Nothing else is complained of.
    others = {s for name, s in states(checked).items() if name not in (subject, "plan")}
    assert others <= {SAME, DIFFERS}


def test_names_shapes_and_dtypes_are_compared(folders: Path) -> None:
    tensors = models.moved(models.weights(), 1e-3, 7)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.more.weight"] = torch.ones(3)
    models.save(folders / "target", {n: t.float() for n, t in tensors.items()})
    checked = check(folders / "delta", folders / "target")
    assert checked.verdict.level == REFUSE
    found = states(checked)
    assert (found["tensor names"], found["dtypes"]) == (DOUBT, DIFFERS)
    names = next(f.text for f in checked.findings if f.subject == "tensor names")
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert "model.more.weight" in names
    assert checked.next_step

    tensors = models.weights()
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, models.HIDDEN).bfloat16()
    models.save(folders / "wider", tensors)
    checked = check(folders / "delta", folders / "wider")
    assert checked.verdict.level == REFUSE
    assert states(checked)["shapes"] == DOUBT


def test_a_quantised_delta_says_so(tmp_path: Path) -> None:
    base = models.weights()
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    models.save(tmp_path / "base", base, **quantised)
    models.save(tmp_path / "tuned", models.moved(base), **quantised)
    models.save(tmp_path / "target", models.moved(base, 1e-3, 7))
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    checked = check(tmp_path / "delta", tmp_path / "target")
    assert checked.verdict.level == REFUSE
    assert "fp8" in checked.verdict.why


# --- what it costs ---


@pytest.fixture
def family(put_repo: PutRepo, tmp_path: Path) -> Family:
    return on_hub.family(put_repo, tmp_path)


def test_check_reads_a_sample_of_the_target_and_nothing_of_the_base(
    devhub: DevHub, family: Family, new_name: NewName
) -> None:
    delta = new_name()
    hubdiff.push_delta(family.tuned_repo, delta, base=family.base_repo)
    devhub.log.clear()
    checked = check(delta, family.target_repo)
    assert checked.forecast is not None
    for repo in (family.base_repo, family.tuned_repo):
        assert devhub.log.count(repo=repo) == 0
    headers = 4096 + sum(
        16 + int.from_bytes(path.read_bytes()[:8], "little")
        for path in family.target.glob("*.safetensors")
    )
    assert on_hub.served(devhub, family.target_repo) <= checked.forecast.read + headers
    # Of the delta its sample, and no layer.
    assert on_hub.served(devhub, delta, "delta-*.safetensors") == 0
    assert on_hub.served(devhub, delta, "exact-*.safetensors") == 0
    # Neighbours come in one request: one a shard at this size.
    ranges = on_hub.downloads(devhub, family.target_repo, "*.safetensors")
    assert len(ranges) <= 4 * 3


def test_the_verdict_is_the_same_from_the_hub_and_from_folders(
    devhub: DevHub, family: Family, new_name: NewName, tmp_path: Path
) -> None:
    hubdiff.push_delta(family.tuned, tmp_path / "delta", base=family.base)
    delta = new_name()
    hubdiff.push_delta(family.tuned_repo, delta, base=family.base_repo)
    one, other = check(tmp_path / "delta", family.target), check(delta, family.target_repo)
    assert one.forecast == other.forecast
    assert one.verdict == other.verdict


# --- the table of thresholds ---


def forecast_of(**sums: float) -> Forecast:
    usual = {"base": 1.0, "target": 1.0, "delta": 1e-4, "moved": 1e-4, "base_target": 1.0}
    return Forecast(Moments(**{**usual, **sums, "elements": 1.0}), (), 1, 1, 1, ())


def test_every_threshold_has_evidence_and_an_order() -> None:
    assert len({limit.number for limit in THRESHOLDS}) == len(THRESHOLDS)
    for limit in THRESHOLDS:
        assert len(limit.evidence) > 40
        assert "{}" in limit.says
        assert hasattr(Moments, limit.number)
        if limit.refuse is not None:
            assert (limit.refuse < limit.doubtful) == limit.below


@pytest.mark.parametrize("limit", THRESHOLDS, ids=lambda limit: limit.number)
def test_a_threshold_decides_on_its_sides(limit: Any) -> None:
    away = -1e-6 if limit.below else 1e-6
    assert limit.verdict(limit.doubtful - away) == GO
    assert limit.verdict(limit.doubtful + away) == DOUBTFUL
    if limit.refuse is not None:
        assert limit.verdict(limit.refuse + away) == REFUSE


def test_the_worst_reason_decides() -> None:
    assert judge(forecast_of()).level == GO
    assert judge(None).level == DOUBTFUL
    doubt, stop = Reason(DOUBTFUL, "a"), Reason(REFUSE, "b")
    assert judge(forecast_of(), [doubt]).level == DOUBTFUL
    verdict = judge(forecast_of(), [doubt, stop])
    assert (verdict.level, verdict.why) == (REFUSE, "b")
    # A target without a weight has no cosine.
    assert judge(forecast_of(target=0.0, base_target=0.0)).level == DOUBTFUL


# --- what can't be compared is never go ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_target_of_no_numbers_is_not_go(folders: Path, value: float) -> None:
    base = models.weights()
    models.save(folders / "odd", {n: torch.full_like(t, value) for n, t in base.items()})
    assert check(folders / "delta", folders / "odd").verdict.level != GO
    half = {n: torch.full_like(t, value) if "layers.0" in n else t for n, t in base.items()}
    models.save(folders / "half", half)
    assert check(folders / "delta", folders / "half").verdict.level != GO


@pytest.mark.parametrize("factor", [100.0, 1e-3])
def test_a_scaled_model_is_not_go(folders: Path, factor: float) -> None:
    tensors = {n: t.float() * factor for n, t in models.weights().items()}
    models.save(folders / "scaled", tensors)
    checked = check(folders / "delta", folders / "scaled")
    assert checked.verdict.level != GO
    assert "moved" in checked.verdict.why


def test_equal_embeddings_do_not_make_two_models_alike(tmp_path: Path) -> None:
    def loud(seed: int) -> dict[str, torch.Tensor]:
        tables = {n: t * 8 for n, t in models.weights().items() if "embed" in n or "head" in n}
        return {**models.weights(seed), **tables}

    models.save(tmp_path / "base", loud(0))
    models.save(tmp_path / "tuned", models.moved(loud(0)))
    models.save(tmp_path / "target", loud(5))
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    checked = check(tmp_path / "delta", tmp_path / "target")
    assert checked.forecast is not None
    assert (checked.forecast.total.cosine or 0) > 0.9
    assert checked.verdict.level == REFUSE


def test_a_sample_of_nothing_is_no_sample(folders: Path) -> None:
    manifest = folders / "delta" / "hubdiff.json"
    document = json.loads(manifest.read_text())
    document["sample"]["blocks"] = {name: [] for name in document["sample"]["blocks"]}
    manifest.write_text(json.dumps(document))
    checked = check(folders / "delta", folders / "other")
    assert (checked.verdict.level, checked.forecast) == (DOUBTFUL, None)


def test_apply_and_check_say_the_same(folders: Path) -> None:
    files = {"README.md": on_hub.card(license="mit"), **tokenizer(TOKENS)}
    models.save(
        folders / "qwen", models.moved(models.weights(), 1e-3, 7), files=files, model_type="q"
    )
    checked = check(folders / "delta", folders / "qwen")
    hubdiff.apply(folders / "delta", folders / "qwen", output=folders / "out")
    record = json.loads((folders / "out" / "hubdiff-result.json").read_text())
    assert record["check"] == checked.verdict.as_json()
    assert record["check"]["verdict"] == DOUBTFUL


def test_verify_finds_a_sample_that_is_not_the_bases(folders: Path) -> None:
    import hashlib

    import numpy as np

    from hubdiff import sample
    from hubdiff.delta import open_delta
    from hubdiff.errors import IntegrityError

    assert hubdiff.verify(folders / "delta", base=folders / "base").sampled
    with open_delta(folders / "delta") as delta:
        chosen = delta.manifest.sample
    assert chosen is not None
    lies = np.full(chosen.elements, 0x7FC0, np.uint16)
    data = sample.encode(chosen, lies, lies)
    (folders / "delta" / sample.FILE).write_bytes(data)
    manifest = folders / "delta" / "hubdiff.json"
    document = json.loads(manifest.read_text())
    record = next(f for f in document["side_files"] if f["path"] == sample.FILE)
    record |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps(document))
    assert hubdiff.verify(folders / "delta").sampled is None
    with pytest.raises(IntegrityError, match="sample"):
        hubdiff.verify(folders / "delta", base=folders / "base")


@pytest.mark.parametrize(
    "text",
    ['{"model": {"vocab": [[]]}}', '{"model": {"vocab": [""]}}', '{"model": {"vocab": [[1, 2]]}}'],
)
def test_a_crafted_tokenizer_is_one_that_can_t_be_read(folders: Path, text: str) -> None:
    models.save(folders / "odd", models.weights(7), files={"tokenizer.json": text})
    assert states(check(folders / "delta", folders / "odd"))["tokens"] == UNKNOWN
    hubdiff.diff(folders / "base", folders / "odd")
