"""Git LFS uploads: the batch call, single and multipart PUTs, verification.

The PUT addresses are signed and on the storage origin; they take no token, like real presigned
ones. An object exists only once its bytes have the announced sha256 and size.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.responses import Response

from .endpoint import Call
from .objects import SHA256, pieces_of
from .refusal import Refusal, bad_request
from .repo import Repo
from .store import Publisher

UPLOAD_SECONDS = 3600


def batch(call: Call) -> Any:
    body = call.json()
    if body.get("operation") != "upload":
        raise bad_request("Only uploads go through this server's LFS batch call")
    # Anyone may upload what a pull request will carry; the commit checks the right to write.
    user, repo = call.need_user(), call.repo()
    if isinstance(user, Publisher):
        call.hub.store.check_write(repo, user)
    transfers = body.get("transfers", ["basic"])
    transfer = next(name for name in ("xet", "multipart", "basic") if name in (*transfers, "basic"))
    branch = (body.get("ref") or {}).get("name", "main")
    objects = [_object(call, repo, item, transfer, branch) for item in body.get("objects", [])]
    return {"transfer": transfer, "objects": objects}


def _object(
    call: Call, repo: Repo, item: dict[str, Any], transfer: str, branch: str
) -> dict[str, Any]:
    oid, size = item.get("oid"), item.get("size")
    if not isinstance(oid, str) or SHA256.fullmatch(oid) is None or not isinstance(size, int):
        error = {"code": 422, "message": "An object needs a sha256 oid and a size"}
        return {"oid": oid, "size": size, "error": error}
    if repo.owns_object(oid):
        return {"oid": oid, "size": size}
    if transfer == "xet":
        # The JavaScript client asks here first; the Python client goes to xet by itself.
        href = (
            f"{call.hub.url}/api/{repo.kind}s/{repo.name}/xet-write-token/{quote(branch, safe='')}"
        )
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href}}}
    claim = {"kind": repo.kind, "repo": repo.name, "oid": oid, "size": size}
    verify = f"{call.hub.url}/{repo.url_path}.git/info/lfs/objects/verify"
    part_bytes = call.hub.options.part_bytes
    large = transfer == "multipart" and size > part_bytes
    upload = _multipart_action(call, claim, part_bytes) if large else _basic_action(call, claim)
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": verify}}}


def _basic_action(call: Call, claim: dict[str, Any]) -> dict[str, Any]:
    token = call.hub.signer.sign("lfs-object", UPLOAD_SECONDS, **claim)
    return {"href": f"{call.hub.cdn_url}/lfs-object?token={token}"}


def _multipart_action(call: Call, claim: dict[str, Any], part_bytes: int) -> dict[str, Any]:
    claim = {**claim, "id": uuid.uuid4().hex}
    header = {"chunk_size": str(part_bytes)}
    parts = -(-claim["size"] // part_bytes)
    for number in range(1, parts + 1):
        token = call.hub.signer.sign("lfs-part", UPLOAD_SECONDS, part=number, **claim)
        header[str(number)] = f"{call.hub.cdn_url}/lfs-part?token={token}"
    token = call.hub.signer.sign("lfs-complete", UPLOAD_SECONDS, parts=parts, **claim)
    return {"href": f"{call.hub.url}/lfs-complete?token={token}", "header": header}


def _claim(call: Call, purpose: str) -> dict[str, Any]:
    claim = call.hub.signer.read(purpose, call.query("token"))
    call.record.repo = claim["repo"]
    return claim


def put_object(call: Call) -> Response:
    claim = _claim(call, "lfs-object")
    assert call.upload is not None
    _store(call, claim, [call.upload])
    return Response(None, 200, {"ETag": f'"{claim["oid"]}"'})


def put_part(call: Call) -> Response:
    claim = _claim(call, "lfs-part")
    assert call.upload is not None
    place = _parts_folder(call, claim) / str(claim["part"])
    place.parent.mkdir(parents=True, exist_ok=True)
    call.upload.replace(place)
    return Response(None, 200, {"ETag": _etag(place)})


def complete(call: Call) -> Any:
    claim = _claim(call, "lfs-complete")
    sent = [(part.get("partNumber"), part.get("etag")) for part in call.json().get("parts", [])]
    folder = _parts_folder(call, claim)
    places = [folder / str(number) for number in range(1, claim["parts"] + 1)]
    stored = [(int(place.name), _etag(place)) for place in places if place.exists()]
    if len(stored) != claim["parts"] or sent != stored:
        raise bad_request("The parts that were completed are not the parts that were sent")
    _store(call, claim, places)
    shutil.rmtree(folder)
    return {"success": True}


def _etag(part: Path) -> str:
    return f'"{hashlib.md5(part.read_bytes()).hexdigest()}"'


def _parts_folder(call: Call, claim: dict[str, Any]) -> Path:
    return call.hub.folder / "tmp" / f"{claim['id']}.parts"


def verify(call: Call) -> Any:
    body = call.json()
    repo, oid = call.repo(), str(body.get("oid"))
    if not repo.owns_object(oid):
        raise Refusal(404, f"Object {oid} does not exist")
    if call.hub.objects.size(oid) != body.get("size"):
        raise bad_request(f"Object {oid} has {call.hub.objects.size(oid)} bytes")
    return {"success": True}


def _store(call: Call, claim: dict[str, Any], paths: list[Path]) -> None:
    size = sum(path.stat().st_size for path in paths)
    if size != claim["size"]:
        raise bad_request(f"{claim['size']} bytes announced, {size} received")
    repo = call.hub.store.find(claim["kind"], claim["repo"])
    if repo is None:
        raise Refusal(404, f"The repo {claim['repo']} is gone")
    call.hub.objects.write(pieces_of(*paths), claim["oid"])
    repo.add_object(claim["oid"])
