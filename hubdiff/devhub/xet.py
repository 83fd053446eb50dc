"""The xet content store: tokens, xorb and shard uploads, reconstruction plans for downloads.

A write token is bound to one repo, so the files of a shard join the objects of that repo only.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import JSONResponse, Response

from .download import FileSlice, parse_range
from .endpoint import Call, bearer
from .refusal import Refusal
from .xet_store import XetFile

TOKEN_SECONDS = 3600


def read_token(call: Call) -> Response:
    return _token(call, "read", call.repo_files().name)


def write_token(call: Call) -> Response:
    """``?create_pr=1`` needs the right to read only: a pull request is open to everyone."""
    opens_pr = call.flag("create_pr") or call.params["rev"].startswith("refs/pr/")
    call.need_user()
    repo = call.repo_to_contribute() if opens_pr else call.repo_for_write()
    return _token(call, "write", repo.name)


def _token(call: Call, right: str, repo: str) -> Response:
    token = call.hub.signer.sign("xet", TOKEN_SECONDS, right=right, kind=call.kind, repo=repo)
    expires = int(time.time() + TOKEN_SECONDS)
    url = call.hub.url
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return JSONResponse({"accessToken": token, "exp": expires, "casUrl": url}, headers=headers)


def _claim(call: Call, right: str) -> dict[str, Any]:
    claim = call.hub.signer.read("xet", bearer(call.request) or "", status=401)
    call.record.repo = claim["repo"]
    if right == "write" and claim["right"] != "write":
        raise Refusal(403, "This token can't write")
    return claim


def put_xorb(call: Call) -> Any:
    _claim(call, "write")
    assert call.upload is not None
    return {"was_inserted": call.hub.xet.add_xorb(call.params["hash"], call.upload)}


def put_shard(call: Call) -> Any:
    claim = _claim(call, "write")
    assert call.upload is not None
    repo = call.hub.store.find(claim["kind"], claim["repo"])
    if repo is None:
        raise Refusal(404, f"The repo {claim['repo']} is gone")
    for file in call.hub.xet.add_shard(call.upload.read_bytes()):
        repo.add_object(file.sha256)
    return {"result": 1}


def not_offered(call: Call) -> Any:
    """Deduplication across repos, direct xorb uploads, version 2: clients do without them."""
    raise Refusal(404, "Not found")


def reconstruction(call: Call) -> Any:
    """Which chunks of which xorbs make the asked range of a file, and where to get them."""
    claim = _claim(call, "read")
    file = call.hub.xet.file(call.params["hash"])
    repo = call.hub.store.find(claim["kind"], claim["repo"])
    if repo is None or not repo.owns_object(file.sha256):
        raise Refusal(404, f"Unknown xet file {file.hash}")
    start, end = parse_range(call.request.headers.get("range"), file.size) or (0, file.size)
    return _plan(call, file, start, end, repo.name)


def _plan(call: Call, file: XetFile, start: int, end: int, repo: str) -> dict[str, Any]:
    terms: list[dict[str, Any]] = []
    wanted: dict[str, list[tuple[int, int]]] = {}
    offset_in_first, position = 0, 0
    for segment in file.segments:
        sizes = [chunk.size for chunk in call.hub.xet.chunks(segment.xorb)]
        inside: list[int] = []
        for index in range(segment.start, segment.end):
            if position < end and position + sizes[index] > start:
                if not terms and not inside:
                    offset_in_first = start - position
                inside.append(index)
            position += sizes[index]
        if inside:
            first, last = inside[0], inside[-1] + 1
            length = sum(sizes[first:last])
            chunks = {"start": first, "end": last}
            terms.append({"hash": segment.xorb, "unpacked_length": length, "range": chunks})
            wanted.setdefault(segment.xorb, []).append((first, last))
    fetches = {xorb: _fetches(call, xorb, ranges, repo) for xorb, ranges in wanted.items()}
    return {"offset_into_first_range": offset_in_first, "terms": terms, "fetch_info": fetches}


def _fetches(
    call: Call, xorb: str, ranges: list[tuple[int, int]], repo: str
) -> list[dict[str, Any]]:
    """Byte ranges of a xorb that hold the wanted chunks. Clients refuse ranges that overlap."""
    chunks, url = call.hub.xet.chunks(xorb), _xorb_url(call, xorb, repo)
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return [
        {
            "range": {"start": first, "end": last},
            "url": url,
            "url_range": {"start": chunks[first].offset, "end": chunks[last - 1].end - 1},
        }
        for first, last in joined
    ]


def _xorb_url(call: Call, xorb: str, repo: str) -> str:
    seconds = call.hub.options.url_seconds
    token = call.hub.signer.sign("xorb", seconds, xorb=xorb, repo=repo)
    return f"{call.hub.cdn_url}/cdn-xorbs/{xorb}?token={token}"


def get_xorb(call: Call) -> Response:
    claim = call.hub.signer.read("xorb", call.query("token"))
    if claim["xorb"] != call.params["hash"]:
        raise Refusal(403, "The signature does not match")
    call.record.repo = claim["repo"]
    return FileSlice.of(call.request, call.hub.xet.xorb_path(claim["xorb"]), {})
