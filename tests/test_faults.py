"""A network and a server that fail: what passes is healed by asking again, what stays is an error
that says so, and either way nothing wrong or half done is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models
import on_hub
import pytest
from on_hub import Family, NewName, PutRepo, listing

from hubdiff.devhub import DevHub
from hubdiff.errors import HubConflict, HubError, HubUnavailable
from hubdiff.hub import retry
from hubdiff.jobs.apply import apply
from hubdiff.jobs.push import push_delta

ONE_OFF = ("hubdiff-result.json", "README.md")  # they name the place of the result


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def family(put_repo: PutRepo, tmp_path: Path) -> Family:
    return on_hub.family(put_repo, tmp_path)


@pytest.fixture
def delta_repo(devhub: DevHub, family: Family, new_name: NewName) -> str:
    name = new_name()
    push_delta(family.tuned_repo, name, base=family.base_repo)
    return name


def result_of(folder: Path) -> dict[str, str]:
    return {k: v for k, v in models.hashes(folder).items() if k not in ONE_OFF}


# What goes wrong, where, how often, after how many bytes of an answer.
PASSING = [
    ("500", "cdn-files", 4, 0),
    ("502", "/resolve/", 3, 0),
    ("503", "/revision/", 2, 0),
    ("504", "/api/models/", 1, 0),
    ("reset", "cdn-files", 4, 5000),
    ("reset", "cdn-files", 3, 0),
    ("reset", "/resolve/", 2, 10),
    ("short", "cdn-files", 4, 1000),
    ("short", "/resolve/", 2, 10),
]


def test_what_passes_is_healed(
    devhub: DevHub, family: Family, delta_repo: str, tmp_path: Path
) -> None:
    apply(delta_repo, family.target_repo, output=tmp_path / "right")
    expected = result_of(tmp_path / "right")
    for number, (kind, match, times, after) in enumerate(PASSING):
        devhub.faults.clear()
        fault = devhub.faults.add(kind, match, times, after_bytes=after)
        apply(delta_repo, family.target_repo, output=tmp_path / str(number))
        assert fault.fired >= times, (kind, match)
        assert result_of(tmp_path / str(number)) == expected, (kind, match)


def test_all_of_it_at_once(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName
) -> None:
    for kind, match in (("500", "cdn-files"), ("short", "cdn-files"), ("reset", "cdn-files")):
        devhub.faults.add(kind, match, 2, after_bytes=2000)
    devhub.faults.add("503", "/resolve/", 1)
    again = new_name()
    push_delta(family.tuned_repo, again, base=family.base_repo)
    one, other = listing(devhub, delta_repo), listing(devhub, again)
    assert {k: v for k, v in one.items() if k not in ONE_OFF} == {
        k: v for k, v in other.items() if k not in ONE_OFF
    }


def test_a_server_that_asks_for_patience_gets_it(
    devhub: DevHub, family: Family, delta_repo: str, tmp_path: Path
) -> None:
    devhub.faults.add("429", "*cdn-files*model-00002*", 1, retry_after=1)
    devhub.log.clear()
    apply(delta_repo, family.target_repo, output=tmp_path / "result")
    refused = devhub.log.select(status=429)
    after = [
        record.time
        for record in devhub.log.select(kind="data", file="model-00002*", status=206)
        if record.time > refused[0].time
    ]
    assert len(refused) == 1
    assert min(after) - refused[0].time >= 1


def test_an_address_that_expires_is_asked_for_again(
    devhub: DevHub, family: Family, delta_repo: str, tmp_path: Path
) -> None:
    apply(delta_repo, family.target_repo, output=tmp_path / "right")
    expiring = Acting(devhub.expire_urls)
    apply(delta_repo, family.target_repo, output=tmp_path / "result", progress=expiring)
    assert devhub.log.count(kind="data", status=403) > 0
    assert result_of(tmp_path / "result") == result_of(tmp_path / "right")


class Acting:
    """Does something when the work begins: the plan is made, no weights are read."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def start(self, what: str, total: int) -> None:
        self._act()

    def advance(self, count: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass


ALWAYS = 10_000


@pytest.mark.parametrize("kind", ["500", "reset", "short"])
def test_what_stays_is_said_and_nothing_is_left(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName, tmp_path: Path, kind: str
) -> None:
    output, result = tmp_path / "result", new_name()
    fault = devhub.faults.add(kind, "*cdn-files*model-00002*", ALWAYS)
    with pytest.raises(HubUnavailable) as caught:
        apply(delta_repo, family.target_repo, output=output)
    assert "model-00002-of-00003.safetensors" in str(caught.value)
    assert family.target_repo in str(caught.value)
    assert caught.value.next_step
    assert retry.RETRIES < fault.fired < ALWAYS / 100  # and then it was given up
    assert not output.exists()
    with pytest.raises(HubUnavailable):
        apply(delta_repo, family.target_repo, push_to=result)
    assert not on_hub.exists(devhub, result) or not listing(devhub, result)

    # The network is back: what was finished stays, the rest is made.
    devhub.faults.clear()
    apply(delta_repo, family.target_repo, output=output)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("side", ["tuned", "base"])
def test_no_delta_is_published_of_half_a_model(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName, side: str
) -> None:
    repo, before = getattr(family, f"{side}_repo"), on_hub.head(devhub, delta_repo)
    devhub.faults.add("500", f"*cdn-files/{repo}/*model.safetensors*", ALWAYS)
    for destination in (new_name(), delta_repo):
        with pytest.raises(HubUnavailable, match=repo):
            push_delta(family.tuned_repo, destination, base=family.base_repo)
    assert on_hub.head(devhub, delta_repo) == before


@pytest.mark.parametrize("match", ["/commit/", "/preupload/"], ids=["commit", "preupload"])
def test_an_upload_that_fails_makes_no_commit(
    devhub: DevHub, family: Family, delta_repo: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_patience_in_the_client(monkeypatch)
    before = on_hub.head(devhub, delta_repo)
    fault = devhub.faults.add("500", match, ALWAYS)
    with pytest.raises(HubError) as caught:
        push_delta(family.target_repo, delta_repo, base=family.base_repo)
    assert fault.fired
    assert caught.value.next_step
    assert on_hub.head(devhub, delta_repo) == before


def no_patience_in_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client waits seconds between its own tries."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


PUSH = """
import sys
from hubdiff.errors import HubdiffError
from hubdiff.jobs.push import push_delta

try:
    push_delta(sys.argv[1], sys.argv[2], base=sys.argv[3])
except HubdiffError as error:
    print(type(error).__name__, error, error.next_step)
"""


def test_content_that_is_not_accepted_makes_no_commit(
    devhub: DevHub, family: Family, delta_repo: str
) -> None:
    """In a process of its own: the xet client reads its patience from the environment once."""
    before = on_hub.head(devhub, delta_repo)
    fault = devhub.faults.add("500", "/xorbs/", ALWAYS)
    said = on_hub.run_script(
        PUSH,
        *(family.target_repo, delta_repo, family.base_repo),
        **devhub.environment(),
        HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1",
        HF_XET_CLIENT_RETRY_MAX_DURATION="1s",
    )
    assert fault.fired
    assert "500" in said, said
    assert said.startswith("Hub"), said
    assert on_hub.head(devhub, delta_repo) == before


@pytest.mark.parametrize("kind", ["503", "reset"], ids=["refused", "answer lost"])
def test_a_commit_that_fails_at_first_is_made_once(
    devhub: DevHub, family: Family, new_name: NewName, kind: str
) -> None:
    name = new_name()
    fault = devhub.faults.add(kind, "/commit/", 1, method="POST")
    pushed = push_delta(family.tuned_repo, name, base=family.base_repo)
    assert fault.fired >= 1
    assert pushed.commit == on_hub.head(devhub, name)
    assert len(on_hub.api(devhub).list_repo_commits(name)) == 2  # the first made the repo


def test_another_ones_commit_is_not_taken_for_ours(
    devhub: DevHub, family: Family, delta_repo: str, put_repo: PutRepo
) -> None:
    """The first try fails, and what stands there at the second is somebody else's."""

    def meddle() -> None:
        put_repo({"notes.txt": b"theirs"}, delta_repo)
        devhub.faults.add("503", "/commit/", 1, method="POST")

    meddler = Acting(meddle)
    with pytest.raises(HubConflict):
        push_delta(family.target_repo, delta_repo, base=family.base_repo, progress=meddler)
    assert set(listing(devhub, delta_repo)) >= {"notes.txt"}
