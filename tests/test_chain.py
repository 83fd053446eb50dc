"""Chains: a delta whose base is a result of hubdiff, whose target is a result too."""

from __future__ import annotations

import json
from pathlib import Path

import models
import on_hub
import pytest
from huggingface_hub import CommitOperationAdd
from on_hub import NewName, PutRepo, contents

import hubdiff
from hubdiff.devhub import DevHub
from hubdiff.errors import HubError, IntegrityError
from hubdiff.jobs.chain import Link


@pytest.fixture
def chain(devhub: DevHub, put_repo: PutRepo, new_name: NewName, tmp_path: Path) -> dict[str, str]:
    """base + first → middle; middle tuned → second; the delta of that, on base: three links."""
    base = models.weights()
    tensors = {
        "base": base,
        "tuned": models.moved(base),
        "other": models.moved(base, 1e-3, 5),
    }
    repos = {
        name: put_repo(contents(models.save(tmp_path / name, weights)))
        for name, weights in tensors.items()
    }
    repos |= {name: new_name() for name in ("first", "middle", "second")}
    hubdiff.push_delta(repos["tuned"], repos["first"], base=repos["base"])
    hubdiff.apply(repos["first"], repos["other"], push_to=repos["middle"])
    hubdiff.apply(repos["first"], repos["other"], output=tmp_path / "middle")
    from safetensors.torch import load_file

    middle = load_file(tmp_path / "middle" / "model.safetensors")
    repos["last"] = put_repo(contents(models.save(tmp_path / "last", models.moved(middle, seed=9))))
    hubdiff.push_delta(repos["last"], repos["second"], base=repos["middle"])
    return repos


def links(delta: str) -> dict[tuple[str, str], Link]:
    found = hubdiff.verify(delta, chain=True).chain
    assert found is not None
    return {(link.made.partition("@")[0], link.origin.partition("@")[0]): link for link in found}


def test_every_link_is_walked_and_checked(chain: dict[str, str]) -> None:
    found = links(chain["second"])
    assert set(found) == {
        (chain["second"], chain["middle"]),
        (chain["middle"], chain["other"]),
        (chain["middle"], chain["first"]),
        (chain["first"], chain["base"]),
    }
    assert found[chain["second"], chain["middle"]].end is None
    assert found[chain["first"], chain["base"]].end == "no result of hubdiff"
    assert all(link.files for link in found.values())


def test_a_short_chain_ends_at_a_model_or_a_folder(chain: dict[str, str], tmp_path: Path) -> None:
    (link,) = hubdiff.verify(chain["first"], chain=True).chain or ()
    assert link.origin.startswith(f"{chain['base']}@")
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "local", base=tmp_path / "base")
    (link,) = hubdiff.verify(tmp_path / "local", chain=True).chain or ()
    assert "local folder" in (link.end or "")
    assert hubdiff.verify(tmp_path / "local").chain is None


def rewrite(hub: DevHub, repo: str, **changes: object) -> str:
    """The record of a result, changed by a commit; the commit."""
    api = on_hub.api(hub)
    path = api.hf_hub_download(repo, "hubdiff-result.json")
    record = json.loads(Path(path).read_text()) | changes
    done = api.create_commit(
        repo,
        [CommitOperationAdd("hubdiff-result.json", json.dumps(record).encode())],
        commit_message="change",
    )
    return str(done.oid)


@pytest.mark.parametrize("part", ["delta", "target", "file"])
def test_a_link_that_was_forged_is_found(
    devhub: DevHub, chain: dict[str, str], new_name: NewName, part: str
) -> None:
    api = on_hub.api(devhub)
    path = api.hf_hub_download(chain["middle"], "hubdiff-result.json")
    record = json.loads(Path(path).read_text())
    if part == "delta":
        record["deltas"][0]["manifest_sha256"] = "0" * 64
    elif part == "target":
        record["target"]["files"][0]["sha256"] = "0" * 64
    else:
        made = next(f for f in record["files"] if f["path"].endswith(".safetensors"))
        made[next(k for k in ("blake3", "sha256") if k in made)] = "0" * 64
    commit = rewrite(devhub, chain["middle"], **record)
    name = new_name()
    hubdiff.push_delta(chain["last"], name, base=f"{chain['middle']}@{commit}")
    hubdiff.verify(name)
    with pytest.raises(IntegrityError):
        hubdiff.verify(name, chain=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": None},
        {"deltas": "x"},
        {"deltas": [1]},
        {"files": [{}]},
        {"target": {"files": []}},
    ],
    ids=str,
)
def test_a_record_that_says_nonsense_is_an_error_in_words(
    devhub: DevHub, chain: dict[str, str], new_name: NewName, changes: dict[str, object]
) -> None:
    commit = rewrite(devhub, chain["middle"], **changes)
    name = new_name()
    hubdiff.push_delta(chain["last"], name, base=f"{chain['middle']}@{commit}")
    with pytest.raises(hubdiff.HubdiffError, match=r"hubdiff-result\.json"):
        hubdiff.verify(name, chain=True)


def test_a_repo_that_is_gone_breaks_the_chain(devhub: DevHub, chain: dict[str, str]) -> None:
    on_hub.api(devhub).delete_repo(chain["first"])
    with pytest.raises(HubError, match=chain["first"]):
        hubdiff.verify(chain["second"], chain=True)
