from __future__ import annotations

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from hubdiff.devhub import DevHub

DATA = b"\0" + bytes(range(256)) * 8000


REPO = "alice/faults"


@pytest.fixture(scope="module")
def _uploaded(_hub: DevHub) -> None:
    api = HfApi(endpoint=_hub.url, token="hf_alice")
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=DATA, path_in_repo="w.bin", repo_id=REPO)


@pytest.fixture
def file(_uploaded: None, hub: DevHub, http: httpx2.Client) -> str:
    """The CDN address of a large file of ``REPO``."""
    hub.log.clear()
    return http.head(f"/{REPO}/resolve/main/w.bin").headers["Location"]


@pytest.mark.parametrize("kind", ["500", "502", "503", "504", "429"])
def test_statuses_come_n_times_then_stop(
    hub: DevHub, http: httpx2.Client, file: str, kind: str
) -> None:
    hub.faults.add(kind, "w.bin", times=2, retry_after=0.5)
    answers = [http.get(file) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [int(kind), int(kind), 200]
    assert answers[0].headers.get("Retry-After") == ("0.5" if kind == "429" else None)
    assert [record.fault for record in hub.log.select(kind="data")] == [kind, kind, None]


def read(http: httpx2.Client, url: str) -> bytes:
    received = b""
    with http.stream("GET", url) as answer:
        assert answer.headers["Content-Length"] == str(len(DATA))
        try:
            for piece in answer.iter_raw():
                received += piece
        except httpx2.TransportError as error:
            return received + type(error).__name__.encode()
    return received


def test_short_body_ends_early_where_asked(hub: DevHub, http: httpx2.Client, file: str) -> None:
    hub.faults.add("short", "w.bin", after_bytes=700_000)
    assert read(http, file) == DATA[:700_000] + b"RemoteProtocolError"
    assert hub.log.bytes_served() == 700_000
    assert read(http, file) == DATA


def test_reset(hub: DevHub, http: httpx2.Client, file: str) -> None:
    hub.faults.add("reset", "w.bin", after_bytes=300_000)
    received = read(http, file)
    assert received.endswith(b"ReadError")
    assert DATA.startswith(received.removesuffix(b"ReadError"))
    assert read(http, file) == DATA


def test_corrupt_changes_one_byte(hub: DevHub, http: httpx2.Client, file: str) -> None:
    hub.faults.add("corrupt", "w.bin", after_bytes=1_000_000)
    received = read(http, file)
    wrong = [index for index in range(len(DATA)) if received[index] != DATA[index]]
    assert wrong == [1_000_000]
    assert read(http, file) == DATA


def test_matching_by_glob_and_method(hub: DevHub, http: httpx2.Client, file: str) -> None:
    hub.faults.add("500", "/cdn-files/*/other.bin*")
    hub.faults.add("500", "/cdn-files/*/w.bin*", method="HEAD")
    assert http.get(file).status_code == 200
    assert http.head(file).status_code == 500


def test_redirects_and_heads_do_not_use_up_a_broken_body(
    hub: DevHub, http: httpx2.Client, file: str
) -> None:
    fault = hub.faults.add("short", "w.bin")
    assert http.get(f"/{REPO}/resolve/main/w.bin").status_code == 302
    assert http.head(file).status_code == 200
    assert fault.fired == 0
    assert read(http, file) == b"RemoteProtocolError"


def test_clear_and_unknown_kinds(hub: DevHub, http: httpx2.Client, file: str) -> None:
    hub.faults.add("500", times=100)
    hub.faults.clear()
    assert http.get(file).status_code == 200
    with pytest.raises(ValueError, match="unknown fault"):
        hub.faults.add("418")


def test_the_official_client_retries_what_it_says_it_retries(
    hub: DevHub, alice: HfApi, repo: str
) -> None:
    hub.faults.add("503", "/preupload/", times=1)
    alice.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo)
    assert hub.log.count(status=503) == 1
    hub.faults.add("500", "/commit/")
    with pytest.raises(HfHubHTTPError):
        alice.upload_file(path_or_fileobj=b"y", path_in_repo="y", repo_id=repo)
    assert "y" not in alice.list_repo_files(repo)


def test_the_official_client_recovers_from_a_short_body_only(
    hub: DevHub, alice: HfApi, file: str
) -> None:
    hub.faults.add("reset", "w.bin", after_bytes=1_500_000)
    with pytest.raises(httpx2.ReadError):
        alice.hf_hub_download(REPO, "w.bin")
    hub.faults.add("short", "w.bin", after_bytes=1_500_000)
    with open(alice.hf_hub_download(REPO, "w.bin"), "rb") as opened:
        assert opened.read() == DATA
