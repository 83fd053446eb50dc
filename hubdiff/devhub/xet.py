"""The xet content store: tokens, xorb and shard uploads, reconstruction plans for downloads.

A write token is bound to one repo, so the files of a shard join the objects of that repo only.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import JSONResponse, Response

from .download import FileSlice, parse_range
from .http import Call, bearer
from .refusal import Refusal
from .xet_format import Chunk
from .xet_store import XetFile

TOKEN_SECONDS = 3600


def read_token(call: Call) -> Response:
    return _token(call, "read", call.repo_files().name)


def write_token(call: Call) -> Response:
    """``?create_pr=1`` needs the right to read only: a pull request is open to everyone."""
    opens_pr = call.flag("create_pr") or call.params["rev"].startswith("refs/pr/")
    call.need_user()
    repo = call.repo() if opens_pr else call.repo_for_write()
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
    fetches: dict[str, list[dict[str, Any]]] = {}
    offset_in_first, position = 0, 0
    for segment in file.segments:
        wanted: list[tuple[int, Chunk]] = []
        for index in range(segment.start, segment.end):
            chunk = call.hub.xet.chunks(segment.xorb)[index]
            if position < end and position + chunk.size > start:
                if not terms and not wanted:
                    offset_in_first = start - position
                wanted.append((index, chunk))
            position += chunk.size
        if wanted:
            chunks = {"start": wanted[0][0], "end": wanted[-1][0] + 1}
            length = sum(chunk.size for _, chunk in wanted)
            terms.append({"hash": segment.xorb, "unpacked_length": length, "range": chunks})
            fetches.setdefault(segment.xorb, []).append(
                {
                    "range": chunks,
                    "url": _xorb_url(call, segment.xorb, repo),
                    "url_range": {"start": wanted[0][1].offset, "end": wanted[-1][1].end - 1},
                }
            )
    return {"offset_into_first_range": offset_in_first, "terms": terms, "fetch_info": fetches}


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
