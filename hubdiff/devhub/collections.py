"""Collections: lists of repos with a title and notes, kept in one file beside the repos."""

from __future__ import annotations

import json
import re
import secrets
import time
from typing import Any

from starlette.responses import JSONResponse

from .endpoint import Call
from .listing import iso
from .refusal import Refusal, bad_request
from .store import KINDS


def create(call: Call) -> Any:
    """The Hub has one collection of a title in a namespace; a second one is a conflict that names
    the first."""
    body, user = call.json(), call.need_user()
    title, namespace = str(body.get("title") or ""), str(body.get("namespace") or user)
    if not title:
        raise bad_request("A collection needs a title")
    call.hub.store.check_namespace(namespace, user)
    with call.hub.collections_lock:
        known = _read(call)
        for slug, value in known.items():
            if (value["title"], value["owner"]) == (title, namespace):
                answer = {"error": f"You already have a collection {title!r}", "slug": slug}
                return JSONResponse(answer, 409, {"X-Error-Message": answer["error"]})
        words = "-".join(re.findall(r"[a-z0-9]+", title.lower()))
        slug = f"{namespace}/{words}-{secrets.token_hex(12)}"
        known[slug] = {
            "slug": slug,
            "title": title,
            "description": body.get("description"),
            "owner": namespace,
            "private": body.get("private") is True,
            "updated": time.time(),
            "items": [],
        }
        _write(call, known)
        return _shown(call, known[slug])


def get(call: Call) -> Any:
    return _shown(call, _find(call, _read(call)))


def add_item(call: Call) -> Any:
    body = call.json()
    item = body.get("item") or {}
    kind, name = str(item.get("type")), str(item.get("id"))
    if kind not in KINDS:
        raise bad_request(f"This server's collections hold {', '.join(KINDS)}, not {kind!r}")
    with call.hub.collections_lock:
        known = _read(call)
        value = _find(call, known)
        call.need_user()
        call.hub.store.check_namespace(value["owner"], call.user)
        call.hub.store.open(kind, name, call.user)
        if any((one["type"], one["id"]) == (kind, name) for one in value["items"]):
            raise Refusal(409, f"{name} is already in this collection")
        note = body.get("note")
        value["items"].append(
            {"_id": secrets.token_hex(12), "id": name, "type": kind, "note": note and str(note)}
        )
        value["updated"] = time.time()
        _write(call, known)
        return _shown(call, value)


def _find(call: Call, known: dict[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] | None = known.get(f"{call.params['owner']}/{call.params['slug']}")
    if value is None or (
        value["private"] and not call.hub.store.is_member(call.user, value["owner"])
    ):
        raise Refusal(404, "Collection not found")
    return value


def _shown(call: Call, value: dict[str, Any]) -> dict[str, Any]:
    """What a caller sees: without the repos that are gone or hidden from them."""
    items: list[dict[str, Any]] = []
    for item in value["items"]:
        try:
            repo = call.hub.store.open(item["type"], item["id"], call.user)
        except Refusal:
            continue
        note = item["note"] and {"html": item["note"], "text": item["note"]}
        extra = {"note": note} if note else {}
        items.append(
            {
                "_id": item["_id"],
                "id": item["id"],
                "type": item["type"],
                "author": repo.namespace,
                "position": len(items),
                **extra,
            }
        )
    return {
        "slug": value["slug"],
        "title": value["title"],
        "description": value["description"],
        "owner": {"name": value["owner"], "type": "user"},
        "items": items,
        "lastUpdated": iso(value["updated"]),
        "position": 0,
        "private": value["private"],
        "theme": "green",
        "upvotes": 0,
        "shareUrl": f"{call.hub.url}/collections/{value['slug']}",
    }


def _read(call: Call) -> dict[str, Any]:
    place = call.hub.folder / "collections.json"
    known: dict[str, Any] = json.loads(place.read_text()) if place.is_file() else {}
    return known


def _write(call: Call, known: dict[str, Any]) -> None:
    place = call.hub.folder / "collections.json"
    part = place.with_suffix(".tmp")
    part.write_text(json.dumps(known))
    part.replace(place)
