"""Uploads that the real Hub refuses: by LFS and by xet, made by hand."""

from __future__ import annotations

import hashlib
import os
import struct
from typing import Any

import httpx2
import lz4.frame
import pytest
from huggingface_hub import HfApi

from hubdiff.devhub import DevHub
from hubdiff.devhub.xet_format import Chunk, file_hash, leaf, merkle_root, unpack

from .conftest import PART_BYTES

AUTH = {"Authorization": "Bearer hf_alice"}


def lfs_batch(http: httpx2.Client, repo: str, data: bytes, **changes: Any) -> dict[str, Any]:
    item = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), **changes}
    body = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": [item]}
    answer = http.post(f"/{repo}.git/info/lfs/objects/batch", json=body, headers=AUTH)
    return dict(answer.json()["objects"][0])


def lfs_verify(http: httpx2.Client, repo: str, data: bytes) -> int:
    body = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    url = f"/{repo}.git/info/lfs/objects/verify"
    return int(http.post(url, json=body, headers=AUTH).status_code)


def test_lfs_takes_only_the_announced_bytes(http: httpx2.Client, repo: str) -> None:
    data = os.urandom(1000)
    href = lfs_batch(http, repo, data)["actions"]["upload"]["href"]
    assert http.put(href, content=data[:-1] + b"?").status_code == 400
    assert http.put(href, content=data[:-1]).status_code == 400
    assert lfs_verify(http, repo, data) == 404
    assert http.put(href, content=data).status_code == 200
    assert lfs_verify(http, repo, data) == 200
    assert "actions" not in lfs_batch(http, repo, data)


def test_lfs_objects_belong_to_a_repo(http: httpx2.Client, alice: HfApi, repo: str) -> None:
    data = os.urandom(1000)
    http.put(lfs_batch(http, repo, data)["actions"]["upload"]["href"], content=data)
    alice.create_repo("alice/no-objects")
    assert "actions" in lfs_batch(http, "alice/no-objects", data)


def test_lfs_multipart_needs_every_part(http: httpx2.Client, repo: str) -> None:
    data = os.urandom(PART_BYTES + 10)
    upload = lfs_batch(http, repo, data)["actions"]["upload"]
    oid = hashlib.sha256(data).hexdigest()
    first = http.put(upload["header"]["1"], content=data[:PART_BYTES]).headers["ETag"]
    parts = [{"partNumber": 1, "etag": first}]
    assert http.post(upload["href"], json={"oid": oid, "parts": parts}).status_code == 400
    second = http.put(upload["header"]["2"], content=data[PART_BYTES:]).headers["ETag"]
    swapped = [{"partNumber": 1, "etag": second}, {"partNumber": 2, "etag": first}]
    assert http.post(upload["href"], json={"oid": oid, "parts": swapped}).status_code == 400
    parts.append({"partNumber": 2, "etag": second})
    assert http.post(upload["href"], json={"oid": oid, "parts": parts}).status_code == 200
    assert lfs_verify(http, repo, data) == 200


def test_lfs_refuses_bad_requests(hub: DevHub, http: httpx2.Client, repo: str) -> None:
    assert "error" in lfs_batch(http, repo, b"x", oid="../../etc/passwd")
    assert "error" in lfs_batch(http, repo, b"x", size="large")
    assert http.put(f"{hub.cdn_url}/lfs-object?token=made.up", content=b"x").status_code == 403
    url = f"/{repo}.git/info/lfs/objects/batch"
    assert http.post(url, json={"operation": "upload"}).status_code == 401
    assert http.post(url, content=b"not json", headers=AUTH).status_code == 400


def raw_hash(name: str) -> bytes:
    """The bytes of a printed xet hash."""
    return b"".join(bytes.fromhex(name[i : i + 16])[::-1] for i in range(0, 64, 16))


def hex_hash(raw: bytes) -> str:
    return "".join(raw[i : i + 8][::-1].hex() for i in range(0, 32, 8))


def chunk_of(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(3, "little") + b"\0" + len(data).to_bytes(3, "little") + data


class Xet:
    """A xet upload of two chunks, one part at a time, each of which can be made wrong."""

    def __init__(self, http: httpx2.Client, repo: str, right: str = "write") -> None:
        self.http = http
        token = http.get(f"/api/models/{repo}/xet-{right}-token/main", headers=AUTH).json()
        self.headers = {"Authorization": f"Bearer {token['accessToken']}"}
        self.chunks = [os.urandom(500), os.urandom(700)]
        self.data = b"".join(self.chunks)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        nodes = [leaf(chunk) for chunk in self.chunks]
        self.xorb = hex_hash(merkle_root(nodes))
        self.file = file_hash(nodes)

    def put_xorb(self, name: str | None = None, body: bytes | None = None) -> int:
        content = body if body is not None else b"".join(map(chunk_of, self.chunks))
        url = f"/v1/xorbs/default/{name or self.xorb}"
        return int(self.http.post(url, content=content, headers=self.headers).status_code)

    def shard(
        self, *, end: int = 2, size: int = 1200, sha256: str | None = None, file: str | None = None
    ) -> bytes:
        header = b"HFRepoMetaData\0".ljust(32, b"\x55") + struct.pack("<QQ", 2, 0)
        head = raw_hash(file or self.file) + struct.pack("<IIQ", 1 << 30, 1, 0)
        segment = raw_hash(self.xorb) + struct.pack("<IIII", 0, size, 0, end)
        trailer = raw_hash(sha256 or self.sha256) + bytes(16)
        bookend = b"\xff" * 32 + bytes(16)
        return header + head + segment + trailer + bookend + bookend

    def put_shard(self, body: bytes) -> int:
        return int(self.http.post("/v1/shards", content=body, headers=self.headers).status_code)


@pytest.fixture
def xet(http: httpx2.Client, repo: str) -> Xet:
    return Xet(http, repo)


def test_a_good_xet_upload_by_hand(http: httpx2.Client, repo: str, xet: Xet) -> None:
    assert xet.put_xorb() == 200
    assert xet.put_shard(xet.shard()) == 200
    assert lfs_verify(http, repo, xet.data) == 200


def test_a_shard_that_names_an_unknown_xorb_is_refused(
    http: httpx2.Client, repo: str, xet: Xet
) -> None:
    assert xet.put_shard(xet.shard()) == 400
    assert lfs_verify(http, repo, xet.data) == 404


@pytest.mark.parametrize(
    "wrong", [{"end": 3}, {"end": 1}, {"size": 1201}, {"sha256": "1" * 64}, {"file": "2" * 64}]
)
def test_a_shard_that_lies_is_refused(
    http: httpx2.Client, repo: str, xet: Xet, wrong: dict[str, Any]
) -> None:
    xet.put_xorb()
    assert xet.put_shard(xet.shard(**wrong)) == 400
    assert lfs_verify(http, repo, xet.data) == 404


def test_a_shard_cannot_claim_the_object_of_another_repo(
    http: httpx2.Client, alice: HfApi, repo: str, xet: Xet
) -> None:
    secret = os.urandom(1000)
    alice.create_repo("alice/holds-a-secret", exist_ok=True)
    href = lfs_batch(http, "alice/holds-a-secret", secret)["actions"]["upload"]["href"]
    http.put(href, content=secret)
    xet.put_xorb()
    assert xet.put_shard(xet.shard(sha256=hashlib.sha256(secret).hexdigest())) == 400
    assert lfs_verify(http, repo, secret) == 404


@pytest.mark.parametrize("cut", [1, 47, 48, 96, 150])
def test_a_truncated_shard_is_refused(xet: Xet, cut: int) -> None:
    xet.put_xorb()
    assert xet.put_shard(xet.shard()[:cut]) == 400


def test_a_xorb_must_be_what_its_name_says(xet: Xet) -> None:
    assert xet.put_xorb(name="3" * 64) == 400
    assert xet.put_xorb(name="not-a-hash") == 400
    assert xet.put_xorb(body=chunk_of(b"other")) == 400
    assert xet.put_xorb(body=chunk_of(xet.data)[:-1]) == 400
    broken_lz4 = b"\0" + (4).to_bytes(3, "little") + b"\1" + (9).to_bytes(3, "little") + b"oops"
    assert xet.put_xorb(body=broken_lz4) == 400
    assert xet.put_shard(xet.shard()) == 400
    assert xet.put_xorb() == 200


def test_xet_needs_the_right_token(http: httpx2.Client, repo: str) -> None:
    assert Xet(http, repo, right="read").put_xorb() == 403
    anonymous = http.post("/v1/shards", content=b"")
    assert anonymous.status_code == 401
    bob = {"Authorization": "Bearer hf_bob"}
    url = f"/api/models/{repo}/xet-write-token"
    assert http.get(f"{url}/main", headers=bob).status_code == 403
    assert http.get(f"{url}/None?create_pr=1", headers=bob).status_code == 200
    assert http.get(f"{url}/main").status_code == 401


def test_reconstruction_is_trimmed_to_chunks(http: httpx2.Client, repo: str, xet: Xet) -> None:
    xet.put_xorb()
    xet.put_shard(xet.shard())
    url = f"/v1/reconstructions/{xet.file}"
    plan = http.get(url, headers={**xet.headers, "Range": "bytes=600-650"}).json()
    assert plan["offset_into_first_range"] == 100
    (term,) = plan["terms"]
    assert term == {"hash": xet.xorb, "unpacked_length": 700, "range": {"start": 1, "end": 2}}
    (fetch,) = plan["fetch_info"][xet.xorb]
    first, last = fetch["url_range"]["start"], fetch["url_range"]["end"]
    stored = http.get(fetch["url"], headers={"Range": f"bytes={first}-{last}"}).content
    assert stored == chunk_of(xet.chunks[1])
    assert http.get(url, headers={**xet.headers, "Range": "bytes=1200-"}).status_code == 416
    assert http.get(url).status_code == 401


def test_reconstruction_is_for_repos_that_have_the_file(
    http: httpx2.Client, alice: HfApi, xet: Xet
) -> None:
    xet.put_xorb()
    xet.put_shard(xet.shard())
    alice.create_repo("alice/has-nothing", exist_ok=True)
    other = Xet(http, "alice/has-nothing", right="read")
    answer = http.get(f"/v1/reconstructions/{xet.file}", headers=other.headers)
    assert answer.status_code == 404


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 1001])
def test_every_compression_scheme_unpacks(size: int) -> None:
    data = os.urandom(size)
    grouped = b"".join(data[lane::4] for lane in range(4))
    packed = {0: data, 1: lz4.frame.compress(data), 2: lz4.frame.compress(grouped)}
    for scheme, stored in packed.items():
        assert unpack(Chunk(0, len(stored), scheme, size), stored) == data
