"""Repos as a whole: who am I, create, delete, move, settings, access."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from .endpoint import BAD_TOKEN, Call
from .listing import iso
from .refusal import Refusal, bad_request
from .repo import Repo, Settings
from .store import KINDS

VISIBILITIES = ("public", "private", "protected")
GATES = ("auto", "manual", False)


def whoami(call: Call) -> Any:
    if call.user is None:
        raise Refusal(401, BAD_TOKEN)
    orgs = call.hub.store.orgs_of(call.user)
    return {
        "type": "user",
        "id": call.user,
        "name": call.user,
        "fullname": call.user,
        "email": f"{call.user}@localhost",
        "emailVerified": True,
        "isPro": False,
        "canPay": False,
        "avatarUrl": "",
        "orgs": [
            {"type": "org", "id": o, "name": o, "fullname": o, "isEnterprise": False} for o in orgs
        ],
        "auth": {
            "type": "access_token",
            "accessToken": {"displayName": "devhub", "role": "write", "createdAt": iso(0)},
        },
    }


def create(call: Call) -> Any:
    body, user = call.json(), call.need_user()
    kind = str(body.get("type") or "model")
    if kind not in KINDS:
        raise bad_request(f"Unknown repo type {kind!r}")
    namespace = str(body.get("organization") or user)
    name = f"{namespace}/{body.get('name', '')}"
    call.record.repo = name
    call.hub.store.check_namespace(namespace, user)
    private = body.get("private") is True
    visibility = body.get("visibility") or ("private" if private else "public")
    settings = Settings(visibility=_one_of(visibility, VISIBILITIES))
    prefix = "" if kind == "model" else f"{kind}s/"
    answer = {"url": f"{call.hub.url}/{prefix}{name}", "name": name, "id": name}
    try:
        call.hub.store.create(kind, name, user, settings)
    except Refusal as refusal:
        if refusal.status != 409:
            raise
        headers = {"X-Error-Message": refusal.message}
        return JSONResponse({"error": refusal.message, **answer}, 409, headers)
    return answer


def delete(call: Call) -> Any:
    call.hub.store.delete(_named_in_body(call, "name"))
    return Response("OK")


def _named_in_body(call: Call, field: str) -> Repo:
    """The repo that a JSON body names, for whom may write to it."""
    body, user = call.json(), call.need_user()
    name = str(body.get(field))
    if "organization" in body:
        name = f"{body['organization'] or user}/{name}"
    call.record.repo = name
    return call.hub.store.open_for_write(str(body.get("type") or "model"), name, user)


def move(call: Call) -> Any:
    repo = _named_in_body(call, "fromRepo")
    name = str(call.json().get("toRepo"))
    call.hub.store.check_namespace(name.partition("/")[0], call.user)
    call.hub.store.move(repo, name)
    return Response("OK")


def settings(call: Call) -> Any:
    repo, body = call.repo_for_write(), call.json()
    with repo.lock:
        if "private" in body:
            repo.settings.visibility = "private" if body["private"] else "public"
        if "visibility" in body:
            repo.settings.visibility = _one_of(body["visibility"], VISIBILITIES)
        if "gated" in body:
            repo.settings.gated = _one_of(body["gated"], GATES)
        repo.save_settings()
    return {"private": repo.settings.visibility != "public", "gated": repo.settings.gated}


def _one_of(value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise bad_request(f"{value!r} is not one of {allowed}")
    return value


def grant_access(call: Call) -> Any:
    repo, user = call.repo_for_write(), str(call.json().get("user"))
    if not repo.settings.gated:
        raise bad_request("The repo is not gated")
    if user not in call.hub.store.users:
        raise Refusal(404, f"User {user} does not exist")
    if user in repo.settings.allowed:
        raise bad_request(f"{user} already has access")
    with repo.lock:
        repo.settings.allowed.append(user)
        repo.save_settings()
    return {}


def auth_check(call: Call) -> Any:
    if call.record.path.endswith("/write"):
        call.repo_for_write()
    call.repo_files()
    return {}
