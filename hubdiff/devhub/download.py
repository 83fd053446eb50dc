"""Downloads: ``resolve`` says where a file is, the CDN sends it.

Small files come straight from git. A large file is a redirect to a signed address on another
origin (another port), as on the Hub: a client resolves once, then reads ranges from the CDN without
its token. Nothing is held in memory: ranges are read from disk as they are sent.
"""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .endpoint import Call
from .git import TreeEntry
from .refusal import Refusal, entry_not_found
from .repo import Repo

SEND_BYTES = 256 << 10


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Half-open bounds of a single byte range; None: send everything (no range, or several)."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
    if start >= size or end <= start:
        raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


class FileSlice(Response):
    """Part of a file on disk, or all of it."""

    def __init__(
        self, path: Path, start: int, end: int, status: int, headers: dict[str, str]
    ) -> None:
        super().__init__(None, status, headers, media_type="application/octet-stream")
        self.headers["Content-Length"] = str(end - start)
        self._path, self._start, self._end = path, start, end

    @classmethod
    def of(cls, request: Request, path: Path, headers: dict[str, str]) -> FileSlice:
        size = path.stat().st_size
        headers = {"Accept-Ranges": "bytes", **headers}
        bounds = parse_range(request.headers.get("range"), size)
        if bounds is None:
            return cls(path, 0, size, 200, headers)
        start, end = bounds
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return cls(path, start, end, 206, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        position = self._end if scope["method"] == "HEAD" else self._start
        # Without this, a file would be read to its end, and counted, for a client that has gone.
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            with self._path.open("rb") as file:
                while position < self._end and not gone.done():
                    piece = os.pread(file.fileno(), min(SEND_BYTES, self._end - position), position)
                    position += len(piece)
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    await asyncio.sleep(0)  # send returns at once when the connection is lost
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def bytes_response(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    bounds = parse_range(request.headers.get("range"), len(content))
    headers = {"Accept-Ranges": "bytes", **headers}
    if bounds is None:
        return Response(content, 200, headers, media_type="text/plain")
    start, end = bounds
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return Response(content[start:end], 206, headers, media_type="text/plain")


def resolve(call: Call) -> Response:
    repo = call.repo_files()
    commit = repo.commit_of(call.params["rev"])
    entry = _file(repo, commit, call.params["path"])
    headers = {"X-Repo-Commit": commit}
    if entry.lfs is None:
        headers["ETag"] = f'"{entry.oid}"'
        return bytes_response(call.request, repo.git.read_blob(entry.oid), headers)
    headers |= {
        "X-Linked-Etag": f'"{entry.lfs.sha256}"',
        "X-Linked-Size": str(entry.lfs.size),
        "ETag": f'"{entry.lfs.sha256}"',
        "Accept-Ranges": "bytes",
        "Location": _cdn_url(call, repo, entry),
        **_xet_headers(call, repo, commit, entry.lfs.sha256),
    }
    return Response(None, 302, headers)


def raw(call: Call) -> Response:
    """The blob as git holds it: for a large file, its pointer."""
    repo = call.repo_files()
    commit = repo.commit_of(call.params["rev"])
    entry = _file(repo, commit, call.params["path"])
    headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.oid}"'}
    return bytes_response(call.request, repo.git.read_blob(entry.oid), headers)


def cdn(call: Call) -> Response:
    claim = call.hub.signer.read("file", call.query("token"))
    if claim["sha256"] != call.params["sha256"]:
        raise Refusal(403, "The signature does not match")
    call.record.repo, call.record.file = claim["repo"], claim["path"]
    headers = {"ETag": f'"{claim["sha256"]}"'}
    return FileSlice.of(call.request, call.hub.objects.path(claim["sha256"]), headers)


def _file(repo: Repo, commit: str, path: str) -> TreeEntry:
    entry = repo.entry(commit, path)
    if not entry.is_file:
        raise entry_not_found(path, commit)
    return entry


def _cdn_url(call: Call, repo: Repo, entry: TreeEntry) -> str:
    assert entry.lfs is not None
    token = call.hub.signer.sign(
        "file",
        call.hub.options.url_seconds,
        sha256=entry.lfs.sha256,
        repo=repo.name,
        path=entry.path,
    )
    place = f"{quote(repo.name)}/{entry.lfs.sha256}/{quote(entry.path)}"
    return f"{call.hub.cdn_url}/cdn-files/{place}?token={token}"


def _xet_headers(call: Call, repo: Repo, commit: str, sha256: str) -> dict[str, str]:
    xet_hash = call.hub.xet.hash_of(sha256) if call.hub.options.xet_downloads else None
    if xet_hash is None:
        return {}
    route = f"{call.hub.url}/api/{repo.kind}s/{repo.name}/xet-read-token/{commit}"
    return {"X-Xet-Hash": xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
