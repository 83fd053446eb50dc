"""The jobs on the Hub: what is in the repos afterwards, and who is refused. Judged with the Hub's
own client."""

from __future__ import annotations

import json
from pathlib import Path

import models
import on_hub
import pytest
from huggingface_hub import hf_hub_download
from on_hub import Family, NewName, PutRepo, contents, ids, listing

from hubdiff import errors
from hubdiff.devhub import DevHub
from hubdiff.hub import HubTree, retry
from hubdiff.jobs.apply import apply
from hubdiff.jobs.push import push_delta
from hubdiff.progress import Silent
from hubdiff.refs import ModelRef


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def family(put_repo: PutRepo, tmp_path: Path) -> Family:
    return on_hub.family(put_repo, tmp_path, only="layers.1.self_attn")


@pytest.fixture
def delta_repo(devhub: DevHub, family: Family, new_name: NewName) -> str:
    name = new_name()
    push_delta(family.tuned_repo, name, base=family.base_repo)
    devhub.log.clear()
    return name


# --- push-delta ---


def test_push_delta_makes_a_repo(devhub: DevHub, family: Family, new_name: NewName) -> None:
    name = new_name()
    pushed = push_delta(family.tuned_repo, name, base=family.base_repo)
    assert pushed.where == name
    assert pushed.commit == on_hub.head(devhub, name)
    assert pushed.url == f"{devhub.url}/{name}/commit/{pushed.commit}"
    assert pushed.pr_url is None
    assert devhub.log.count(kind="commit", repo=name) == 1
    assert set(listing(devhub, name)) == {file.path for file in pushed.files}
    assert not on_hub.api(devhub).model_info(name).private
    assert "model.safetensors" not in listing(devhub, name)
    assert json.loads(json.dumps(pushed.as_json()))["commit"] == pushed.commit


def test_the_card_as_the_hub_sees_it(devhub: DevHub, family: Family, delta_repo: str) -> None:
    info = on_hub.api(devhub).model_info(delta_repo)
    assert info.card_data is not None
    assert info.card_data.library_name == "hubdiff"
    assert info.card_data.license == "mit"
    assert info.card_data.base_model in (family.base_repo, [family.base_repo])
    assert {"hubdiff", "diff-vector"} <= set(info.tags or [])
    assert f"base_model:{family.base_repo}" in (info.tags or [])
    assert f"base_model:adapter:{family.base_repo}" in (info.tags or [])
    found = on_hub.api(devhub).list_models(filter=f"base_model:adapter:{family.base_repo}")
    assert [model.id for model in found] == [delta_repo]


def test_a_second_push_leaves_no_file_of_the_first(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName
) -> None:
    before = listing(devhub, delta_repo)
    assert "tuned/chat_template.jinja" in before
    # The target has no chat template, is in shards, and all of its tensors differ.
    push_delta(family.target_repo, delta_repo, base=family.base_repo, plain=True)
    clean = new_name()
    push_delta(family.target_repo, clean, base=family.base_repo, plain=True)
    after, expected = listing(devhub, delta_repo), listing(devhub, clean)
    assert "tuned/chat_template.jinja" not in after
    assert set(after) == set(expected)
    assert {k for k in after if after[k] != expected[k]} <= {"README.md"}
    assert devhub.log.count(kind="commit", repo=delta_repo) == 1


def test_a_file_of_the_owner_survives_a_second_push(
    devhub: DevHub, family: Family, delta_repo: str, put_repo: PutRepo
) -> None:
    put_repo({"examples.md": b"mine"}, delta_repo)
    push_delta(family.target_repo, delta_repo, base=family.base_repo)
    assert "examples.md" in listing(devhub, delta_repo)


def test_a_pull_request_leaves_main_alone(
    devhub: DevHub, family: Family, delta_repo: str, tmp_path: Path
) -> None:
    before = on_hub.head(devhub, delta_repo)
    pushed = push_delta(family.target_repo, delta_repo, base=family.base_repo, pr=True)
    assert on_hub.head(devhub, delta_repo) == before
    assert pushed.pr_url == f"{devhub.url}/{delta_repo}/discussions/1"
    (opened,) = on_hub.api(devhub).get_repo_discussions(delta_repo)
    assert opened.is_pull_request
    # It can be applied from there, before it is merged.
    apply(f"{delta_repo}@refs/pr/1", family.base_repo, output=tmp_path / "rebuilt")
    expected = listing(devhub, family.target_repo)
    assert ids(tmp_path / "rebuilt", expected) == expected


def test_private_is_private(devhub: DevHub, family: Family, new_name: NewName) -> None:
    delta, result = new_name(), new_name()
    push_delta(family.tuned_repo, delta, base=family.base_repo, private=True)
    apply(delta, family.target_repo, push_to=result, private=True)
    for name in (delta, result):
        assert on_hub.api(devhub).model_info(name).private


def test_a_branch_is_read_and_written(
    devhub: DevHub, family: Family, delta_repo: str, tmp_path: Path
) -> None:
    before = on_hub.head(devhub, delta_repo)
    on_hub.api(devhub).create_branch(delta_repo, branch="dev/plain")
    there = f"{delta_repo}@dev/plain"
    push_delta(family.target_repo, there, base=family.base_repo, plain=True)
    assert on_hub.head(devhub, delta_repo) == before
    apply(there, family.base_repo, output=tmp_path / "rebuilt")
    expected = listing(devhub, family.target_repo)
    assert ids(tmp_path / "rebuilt", expected) == expected


def test_the_base_is_the_one_that_the_card_names(
    devhub: DevHub, family: Family, new_name: NewName, put_repo: PutRepo
) -> None:
    name = new_name()
    with pytest.raises(errors.CannotDiff, match="base_model") as caught:
        push_delta(family.tuned_repo, name)
    assert "--base" in (caught.value.next_step or "")
    assert not on_hub.exists(devhub, name)
    card = on_hub.card(base_model=family.base_repo, license="mit")
    put_repo({"README.md": card.encode()}, family.tuned_repo)
    pushed = push_delta(family.tuned_repo, name)
    assert pushed.base == f"{family.base_repo}@{on_hub.head(devhub, family.base_repo)}"


# --- apply --push-to ---


def test_only_changed_shards_are_uploaded(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    before = listing(devhub, family.target_repo)
    devhub.log.clear()
    applied = apply(delta_repo, family.target_repo, push_to=name)
    after = listing(devhub, name)
    changed = {path for path in after if path in before and after[path] != before[path]}
    weights = {path for path in after if path.endswith(".safetensors")}
    assert weights & changed == {"model-00002-of-00003.safetensors"}
    assert {file.path for file in applied.files} & weights == weights & changed
    # The other two went from repo to repo inside the Hub.
    assert devhub.log.count(kind="copy", repo=family.target_repo) == 1
    apply(delta_repo, family.target_repo, output=tmp_path / "local")
    local = ids(tmp_path / "local", after)
    assert {k: v for k, v in local.items() if k != "README.md"} == {
        k: v for k, v in after.items() if k != "README.md"
    }


def test_the_result_card_as_the_hub_sees_it(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName
) -> None:
    name = new_name()
    command = ["hubdiff", "apply", delta_repo, "--to", family.target_repo, "--push-to", name]
    apply(delta_repo, family.target_repo, push_to=name, scale=0.5, command=command)
    info = on_hub.api(devhub).model_info(name)
    assert info.card_data is not None
    assert set(info.card_data.base_model) == {family.target_repo, delta_repo}
    assert f"base_model:merge:{family.target_repo}" in (info.tags or [])
    assert f"base_model:merge:{delta_repo}" in (info.tags or [])
    text = HubTree(ModelRef.parse(name)).read_bytes("README.md").decode()
    assert "0.5" in text
    assert " ".join(command) in text
    for repo in (delta_repo, family.target_repo):
        assert on_hub.head(devhub, repo) in text


def test_a_rebuild_keeps_the_tuned_models_own_card(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName
) -> None:
    name = new_name()
    apply(delta_repo, family.base_repo, push_to=name)
    assert listing(devhub, name) == listing(devhub, family.tuned_repo)
    assert "hubdiff-result.json" in HubTree(ModelRef.parse(name)).files()


def test_a_second_result_replaces_the_first(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName
) -> None:
    name = new_name()
    apply(delta_repo, family.target_repo, push_to=name)
    assert "model-00003-of-00003.safetensors" in listing(devhub, name)
    apply(delta_repo, family.base_repo, push_to=name)
    assert listing(devhub, name) == listing(devhub, family.tuned_repo)


def test_a_result_without_a_file_of_the_first_deletes_it(
    devhub: DevHub, family: Family, delta_repo: str, put_repo: PutRepo
) -> None:
    """What the first result's record lists goes; what its owner put there stays."""
    name = f"{delta_repo}-result"
    apply(delta_repo, family.target_repo, push_to=name)
    put_repo({"notes.txt": b"mine"}, name)
    before = listing(devhub, name)
    assert "chat_template.jinja" in before
    push_delta(family.target_repo, delta_repo, base=family.base_repo)
    apply(delta_repo, family.base_repo, push_to=name)
    after = listing(devhub, name)
    assert after.pop("notes.txt") == before["notes.txt"]
    assert after == listing(devhub, family.target_repo)


def test_a_damaged_record_of_an_earlier_result_does_no_harm(
    devhub: DevHub, family: Family, delta_repo: str, put_repo: PutRepo
) -> None:
    record = b'{"files": [1, {"path": 2}, {"path": "old.json"}], "side_files": "x"}'
    for data in (record, b"{", b"[]"):
        name = put_repo({"hubdiff-result.json": data, "old.json": b"1", "mine.txt": b"1"})
        apply(delta_repo, family.base_repo, push_to=name)
        assert ("old.json" in listing(devhub, name)) == (data != record)
        assert "mine.txt" in listing(devhub, name)


# --- refusals ---


@pytest.mark.parametrize("weights", ["model.gguf", "model.pt", "model.onnx", "flax_model.msgpack"])
def test_a_foreign_model_of_any_format_is_not_replaced(
    devhub: DevHub, family: Family, delta_repo: str, put_repo: PutRepo, weights: str
) -> None:
    theirs = put_repo({weights: b"\0" * 100, "README.md": b"# mine"})
    before = on_hub.head(devhub, theirs)
    for job in (
        lambda: apply(delta_repo, family.target_repo, push_to=theirs),
        lambda: push_delta(family.tuned_repo, theirs, base=family.base_repo),
    ):
        with pytest.raises(errors.OutputExists, match=weights):
            job()
    assert on_hub.head(devhub, theirs) == before


def test_a_repo_with_nothing_but_a_card_is_filled(
    devhub: DevHub, family: Family, put_repo: PutRepo
) -> None:
    name = put_repo({"README.md": b"# to come"})
    push_delta(family.tuned_repo, name, base=family.base_repo)
    assert "hubdiff.json" in listing(devhub, name)


def _files(devhub: DevHub, repo: str, revision: str | None = None) -> set[str]:
    return set(on_hub.api(devhub).list_repo_files(repo, revision=revision))


@pytest.mark.parametrize("how", ["force", "pr"])
def test_a_delta_over_a_model_leaves_no_hybrid(
    devhub: DevHub, family: Family, delta_repo: str, put_repo: PutRepo, how: str
) -> None:
    model = put_repo({"model.safetensors": b"\0" * 100, "config.json": b"{}"})
    pushed = push_delta(family.tuned_repo, model, base=family.base_repo, **{how: True})
    revision = "refs/pr/1" if how == "pr" else None
    assert _files(devhub, model, revision) == _files(devhub, delta_repo)
    assert pushed.where == model


@pytest.mark.parametrize("how", ["force", "pr"])
def test_a_result_over_a_delta_leaves_no_hybrid(
    devhub: DevHub, family: Family, delta_repo: str, put_repo: PutRepo, how: str
) -> None:
    other = put_repo({"hubdiff.json": b"{}", "delta-x": b"1", "tuned/config.json": b"{}"})
    apply(delta_repo, family.base_repo, push_to=other, **{how: True})
    revision = "refs/pr/1" if how == "pr" else None
    made = _files(devhub, other, revision) - {"hubdiff-result.json", ".gitattributes"}
    assert made == set(listing(devhub, family.tuned_repo))


def test_a_result_as_a_pull_request_on_a_model_keeps_its_other_files(
    devhub: DevHub, family: Family, delta_repo: str, put_repo: PutRepo
) -> None:
    model = put_repo({"model.gguf": b"\0" * 100, "old.safetensors": b"1"})
    apply(delta_repo, family.base_repo, push_to=model, pr=True)
    made = _files(devhub, model, "refs/pr/1")
    assert "model.gguf" in made
    assert "old.safetensors" not in made


def test_a_foreign_model_is_not_replaced(
    devhub: DevHub, family: Family, delta_repo: str, put_repo: PutRepo
) -> None:
    theirs = put_repo({"model.safetensors": b"\0" * 100, "config.json": b"{}"})
    before = on_hub.head(devhub, theirs)
    for job in (
        lambda **how: apply(delta_repo, family.target_repo, push_to=theirs, **how),
        lambda **how: push_delta(family.tuned_repo, theirs, base=family.base_repo, **how),
    ):
        with pytest.raises(errors.OutputExists, match=r"model\.safetensors") as caught:
            job()
        assert "--force" in (caught.value.next_step or "")
        assert on_hub.head(devhub, theirs) == before
    # No more than the sample of it.
    assert devhub.log.bytes_served(family.target_repo, "model-00002*") < 50_000
    apply(delta_repo, family.target_repo, push_to=theirs, force=True)
    assert on_hub.head(devhub, theirs) != before
    assert "model.safetensors" not in listing(devhub, theirs)


class Meddler(Silent):
    """Commits to a repo when the work begins."""

    def __init__(self, put_repo: PutRepo, repo: str) -> None:
        self._put_repo, self._repo = put_repo, repo

    def start(self, what: str, total: int) -> None:
        self._put_repo({"notes.txt": b"theirs"}, self._repo)


def test_someone_who_commits_meanwhile_wins(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName, put_repo: PutRepo
) -> None:
    result = new_name()
    apply(delta_repo, family.base_repo, push_to=result)
    for repo, job in (
        (
            delta_repo,
            lambda **how: push_delta(family.target_repo, delta_repo, **how, base=family.base_repo),
        ),
        (result, lambda **how: apply(delta_repo, family.target_repo, push_to=result, **how)),
    ):
        before = listing(devhub, repo)
        with pytest.raises(errors.HubConflict, match="someone committed meanwhile") as caught:
            job(progress=Meddler(put_repo, repo))
        assert "again" in (caught.value.next_step or "")
        after = listing(devhub, repo)
        assert after.pop("notes.txt")
        assert after == before
        job()  # it starts from the new commit


def test_a_gated_base(
    devhub: DevHub,
    family: Family,
    delta_repo: str,
    tmp_path: Path,
    new_name: NewName,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devhub.set_gated(family.base_repo)
    monkeypatch.setenv("HF_TOKEN", devhub.token("other"))
    with pytest.raises(errors.GatedRepo, match=family.base_repo) as caught:
        apply(delta_repo, family.base_repo, output=tmp_path / "x")
    assert f"{devhub.url}/{family.base_repo}" in (caught.value.next_step or "")
    with pytest.raises(errors.GatedRepo, match=family.base_repo):
        push_delta(family.tuned_repo, tmp_path / "delta", base=family.base_repo)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "target", "tuned"]
    devhub.allow("other", family.base_repo)
    push_delta(family.tuned_repo, tmp_path / "delta", base=family.base_repo)
    apply(delta_repo, family.base_repo, output=tmp_path / "x")

    monkeypatch.setenv("HF_TOKEN", devhub.token("demo"))
    name = new_name()
    push_delta(family.tuned_repo, name, base=family.base_repo)
    assert "gated" in HubTree(ModelRef.parse(name)).read_bytes("README.md").decode()


@pytest.mark.parametrize("token", ["", "hf_wrong"], ids=["none", "wrong"])
def test_no_token_is_said_before_the_work(
    devhub: DevHub,
    family: Family,
    delta_repo: str,
    new_name: NewName,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    name = new_name()
    for job in (
        lambda: push_delta(family.tuned_repo, name, base=family.base_repo),
        lambda: apply(delta_repo, family.target_repo, push_to=name),
    ):
        with pytest.raises(errors.HubError) as caught:
            job()
        assert isinstance(caught.value, (errors.AuthError, errors.RepoNotFound))
        assert "hf auth login" in (caught.value.next_step or "")
    assert not on_hub.exists(devhub, name)
    assert devhub.log.bytes_served(family.target_repo, "*.safetensors") < 10_000


def test_no_token_is_needed_to_read(
    family: Family, delta_repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    apply(delta_repo, family.target_repo, output=tmp_path / "result")


def test_a_namespace_of_someone_else(
    devhub: DevHub, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", devhub.token("other"))
    with pytest.raises(errors.AuthError):
        push_delta(family.tuned_repo, "org/not-mine", base=family.base_repo)


# --- both transports, as users have them ---

ROUND_TRIP = """
import json, sys
from hubdiff.jobs.apply import apply
from hubdiff.jobs.push import push_delta

base, tuned, target, delta, rebuilt, result = sys.argv[1:]
pushed = push_delta(tuned, delta, base=base)
again = apply(delta, base, push_to=rebuilt)
merged = apply(delta, target, push_to=result)
print(json.dumps([job.as_json() for job in (pushed, again, merged)]))
"""


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_both_transports(
    devhub: DevHub, family: Family, new_name: NewName, tmp_path: Path, xet: bool
) -> None:
    names = [new_name() for _ in range(3)]
    repos = [family.base_repo, family.tuned_repo, family.target_repo, *names]
    environment = devhub.environment(xet=xet)
    devhub.log.clear()
    pushed, again, merged = json.loads(on_hub.run_script(ROUND_TRIP, *repos, **environment))
    assert devhub.log.count(kind="xet" if xet else "lfs") > 0
    assert devhub.log.count(kind="lfs" if xet else "xet") == 0
    delta, rebuilt, result = names
    assert pushed["commit"] == on_hub.head(devhub, delta)
    assert again["plan"]["case"] == "own base"
    assert listing(devhub, rebuilt) == listing(devhub, family.tuned_repo)
    assert merged["plan"]["case"] == "transfer"
    assert len([p for p in listing(devhub, result) if p.endswith(".safetensors")]) == 3


def test_a_result_downloads_and_loads(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName, tmp_path: Path
) -> None:
    """A stranger with nothing of hubdiff: the Hub's client and safetensors."""
    name = new_name()
    apply(delta_repo, family.target_repo, push_to=name)
    for path, content in listing(devhub, name).items():
        local = hf_hub_download(name, path, endpoint=devhub.url, local_dir=tmp_path / "got")
        assert ids(tmp_path / "got", {path: content})[path] == content, local
    index = json.loads((tmp_path / "got" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(models.shapes())
    assert set(contents(tmp_path / "got")) >= set(index["weight_map"].values())
