from __future__ import annotations

import hashlib

import httpx2
import pytest
from huggingface_hub import HfApi

from hubdiff.devhub import DevHub

LARGE = b"\0" + bytes(range(256)) * 40
SMALL = b"some text\n"


@pytest.fixture(scope="module")
def _files(_hub: DevHub) -> str:
    api = HfApi(endpoint=_hub.url, token="hf_alice")
    api.create_repo("alice/files")
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="sub/w.bin", repo_id="alice/files")
    api.upload_file(path_or_fileobj=SMALL, path_in_repo="a.txt", repo_id="alice/files")
    return "alice/files"


@pytest.fixture
def files(_files: str, hub: DevHub) -> str:
    """A repo with a large file and a small one, and a clean log."""
    hub.log.clear()
    return _files


def location(http: httpx2.Client, repo: str) -> str:
    return http.head(f"/{repo}/resolve/main/sub/w.bin").headers["Location"]


RANGES = [
    ("bytes=0-0", 0, 1),
    ("bytes=5-9", 5, 10),
    ("bytes=5-", 5, None),
    ("bytes=-4", -4, None),
    ("bytes=5-999999", 5, None),
]


@pytest.mark.parametrize(("header", "start", "end"), RANGES)
def test_ranges(http: httpx2.Client, files: str, header: str, start: int, end: int | None) -> None:
    for url, whole in ((location(http, files), LARGE), (f"/{files}/resolve/main/a.txt", SMALL)):
        answer = http.get(url, headers={"Range": header})
        assert answer.status_code == 206
        assert answer.content == whole[start:end]
        first, last, _ = slice(start, end).indices(len(whole))
        assert answer.headers["Content-Range"] == f"bytes {first}-{last - 1}/{len(whole)}"


def test_a_range_past_the_end(http: httpx2.Client, files: str) -> None:
    answer = http.get(location(http, files), headers={"Range": f"bytes={len(LARGE)}-"})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(LARGE)}"


def test_no_range_or_several_send_everything(http: httpx2.Client, files: str) -> None:
    for headers in ({}, {"Range": "bytes=0-1,4-5"}):
        answer = http.get(location(http, files), headers=headers)
        assert (answer.status_code, answer.content) == (200, LARGE)


def test_head_tells_all_and_sends_nothing(
    hub: DevHub, http: httpx2.Client, alice: HfApi, files: str
) -> None:
    answer = http.head(f"/{files}/resolve/main/sub/w.bin")
    assert answer.status_code == 302
    assert answer.headers["X-Linked-Size"] == str(len(LARGE))
    assert answer.headers["X-Linked-Etag"] == f'"{hashlib.sha256(LARGE).hexdigest()}"'
    assert answer.headers["X-Repo-Commit"] == alice.model_info(files).sha
    assert "X-Xet-Hash" not in answer.headers
    small = http.head(f"/{files}/resolve/main/a.txt")
    assert (small.status_code, small.headers["Content-Length"]) == (200, str(len(SMALL)))
    assert hub.log.bytes_served(files) == 0


def test_the_cdn_is_another_origin_and_wants_no_token(
    hub: DevHub, http: httpx2.Client, alice: HfApi, repo: str
) -> None:
    alice.upload_file(path_or_fileobj=LARGE, path_in_repo="sub/w.bin", repo_id=repo)
    alice.update_repo_settings(repo, visibility="private")
    assert http.head(f"/{repo}/resolve/main/sub/w.bin").status_code == 401
    url = http.head(
        f"/{repo}/resolve/main/sub/w.bin", headers={"Authorization": "Bearer hf_alice"}
    ).headers["Location"]
    assert url.startswith(hub.cdn_url)
    assert hub.cdn_url != hub.url
    assert http.get(url).content == LARGE


def test_a_cdn_address_is_for_one_file_and_a_while(
    hub: DevHub, http: httpx2.Client, files: str
) -> None:
    url = location(http, files)
    sha256 = hashlib.sha256(LARGE).hexdigest()
    assert http.get(url.replace(sha256, "0" * 64)).status_code == 403
    assert http.get(url[:-1] + ("0" if url[-1] != "0" else "1")).status_code == 403
    assert http.get(url).status_code == 200
    hub.expire_urls()
    assert http.get(url).status_code == 403
    assert http.get(location(http, files)).status_code == 200


def test_cdn_addresses_expire_by_themselves() -> None:
    with DevHub(users={"alice": "hf_alice"}, url_seconds=-1) as hub:
        api = HfApi(endpoint=hub.url, token="hf_alice")
        api.create_repo("alice/short")
        api.upload_file(path_or_fileobj=LARGE, path_in_repo="sub/w.bin", repo_id="alice/short")
        with httpx2.Client(base_url=hub.url, trust_env=False) as http:
            assert http.get(location(http, "alice/short")).status_code == 403


def test_raw_is_what_git_holds(http: httpx2.Client, files: str) -> None:
    assert http.get(f"/{files}/raw/main/a.txt").content == SMALL
    pointer = http.get(f"/{files}/raw/main/sub/w.bin").text
    assert pointer.splitlines()[1] == f"oid sha256:{hashlib.sha256(LARGE).hexdigest()}"


def test_folders_and_unknown_paths(hub: DevHub, http: httpx2.Client, files: str) -> None:
    for path in ("sub", "nothing", "sub/../a.txt", "..%2f..%2fdevhub.json"):
        answer = http.get(f"/{files}/resolve/main/{path}")
        assert answer.status_code in (200, 404)
        assert answer.status_code == 404 or answer.content == SMALL  # the client folded ".."
    assert http.get("/api/nothing/here").status_code == 404
    assert hub.log.count(kind="unknown", status=404) == 1


def test_the_log_counts_bytes_by_file(hub: DevHub, http: httpx2.Client, files: str) -> None:
    url = location(http, files)
    http.get(url, headers={"Range": "bytes=0-99"})
    http.get(url, headers={"Range": "bytes=200-249"})
    http.get(f"/{files}/resolve/main/a.txt")
    http.get(f"/{files}/resolve/main/missing.txt")
    assert hub.log.bytes_served(files, "sub/w.bin") == 150
    assert hub.log.bytes_served(files, "*.txt") == len(SMALL)
    assert hub.log.bytes_served(files) == 150 + len(SMALL)
    assert hub.log.bytes_served("alice/other") == 0
    assert [record.range for record in hub.log.select(kind="data")] == [
        "bytes=0-99",
        "bytes=200-249",
    ]
    assert hub.log.count(kind="resolve", repo=files, file="sub/w.bin", method="HEAD") == 1
    hub.log.clear()
    assert len(hub.log) == 0


def test_a_client_that_leaves_early_is_not_sent_the_rest(
    hub: DevHub, http: httpx2.Client, alice: HfApi, repo: str
) -> None:
    size = 60_000_000
    alice.upload_file(path_or_fileobj=bytes(size), path_in_repo="zeros.bin", repo_id=repo)
    url = http.head(f"/{repo}/resolve/main/zeros.bin").headers["Location"]
    with http.stream("GET", url) as answer:
        next(answer.iter_raw())
    http.get("/api/whoami-v2")
    assert 0 < hub.log.bytes_served(repo, "zeros.bin") < size / 2
