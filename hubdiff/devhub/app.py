"""The table of routes, and the ASGI application made of it.

Routes match the raw path: a revision is quoted whole (``refs%2Fpr%2F1``) and must stay one segment
until a handler unquotes it. Order matters: the bare repo address comes after everything below it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import (
    collections,
    commits,
    discussions,
    download,
    history,
    info,
    lfs,
    publishers,
    repos,
    xet,
)
from .endpoint import Call, Endpoint, Handler
from .refusal import Refusal
from .state import Hub


class _Pattern(Convertor[str]):
    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _Repo(_Pattern):
    """``org/name``, or the one-word name of the Hub's oldest repos."""

    regex = r"[^/]+(?:/[^/]+)?"


class _Kind(_Pattern):
    regex = r"models|datasets|spaces"


class _OtherKind(_Pattern):
    """Models have no prefix outside ``/api``."""

    regex = r"datasets|spaces"


register_url_convertor("repo", _Repo())
register_url_convertor("kind", _Kind())
register_url_convertor("other", _OtherKind())

API = "/api/{kind:kind}/{repo:repo}"

ROUTES: list[tuple[str, str, Handler, str]] = [
    ("GET", "/api/whoami-v2", repos.whoami, "api"),
    ("POST", "/api/repos/create", repos.create, "api"),
    ("DELETE", "/api/repos/delete", repos.delete, "api"),
    ("POST", "/api/repos/move", repos.move, "api"),
    ("POST", "/api/validate-yaml", info.validate_yaml, "api"),
    ("POST", "/api/collections", collections.create, "api"),
    ("GET", "/api/collections/{owner}/{slug}", collections.get, "api"),
    ("POST", "/api/collections/{owner}/{slug}/items", collections.add_item, "api"),
    ("PUT", API + "/settings", repos.settings, "api"),
    ("POST", API + "/user-access-request/grant", repos.grant_access, "api"),
    ("GET", API + "/auth-check", repos.auth_check, "api"),
    ("GET", API + "/auth-check/write", repos.auth_check, "api"),
    ("GET", API + "/safetensors-metadata/{path:path}", info.safetensors_metadata, "api"),
    ("GET", API + "/tree/{rev}", history.tree, "api"),
    ("GET", API + "/tree/{rev}/{path:path}", history.tree, "api"),
    ("POST", API + "/paths-info/{rev}", history.paths_info, "api"),
    ("GET", API + "/refs", history.refs, "api"),
    ("GET", API + "/commits/{rev}", history.commits, "api"),
    ("POST", API + "/branch/{rev}", history.create_branch, "api"),
    ("DELETE", API + "/branch/{rev}", history.delete_branch, "api"),
    ("POST", API + "/tag/{rev}", history.create_tag, "api"),
    ("DELETE", API + "/tag/{rev}", history.delete_tag, "api"),
    ("POST", API + "/super-squash/{rev}", history.super_squash, "api"),
    ("POST", API + "/preupload/{rev}", commits.preupload, "api"),
    ("POST", API + "/commit/{rev}", commits.commit, "commit"),
    ("POST", API + "/lfs-files/duplicate", commits.duplicate, "copy"),
    ("GET", API + "/discussions", discussions.list_all, "api"),
    ("POST", API + "/discussions", discussions.create, "api"),
    ("GET", API + "/discussions/{num}", discussions.details, "api"),
    ("POST", API + "/discussions/{num}/merge", discussions.merge, "api"),
    ("POST", API + "/discussions/{num}/comment", discussions.comment, "api"),
    ("POST", API + "/discussions/{num}/status", discussions.set_status, "api"),
    ("POST", API + "/discussions/{num}/title", discussions.set_title, "api"),
    ("GET", API + "/xet-read-token/{rev}", xet.read_token, "xet"),
    ("GET", API + "/xet-write-token/{rev}", xet.write_token, "xet"),
    ("GET", API + "/revision/{rev}", info.info, "api"),
    ("GET", API, info.info, "api"),
    ("GET", "/api/{kind:kind}", info.search, "api"),
    ("POST", "/{kind:other}/{repo:repo}.git/info/lfs/objects/batch", lfs.batch, "lfs"),
    ("POST", "/{repo:repo}.git/info/lfs/objects/batch", lfs.batch, "lfs"),
    ("POST", "/{kind:other}/{repo:repo}.git/info/lfs/objects/verify", lfs.verify, "lfs"),
    ("POST", "/{repo:repo}.git/info/lfs/objects/verify", lfs.verify, "lfs"),
    ("GET", "/{kind:other}/{repo:repo}/resolve/{rev}/{path:path}", download.resolve, "resolve"),
    ("GET", "/{repo:repo}/resolve/{rev}/{path:path}", download.resolve, "resolve"),
    ("GET", "/{kind:other}/{repo:repo}/raw/{rev}/{path:path}", download.raw, "raw"),
    ("GET", "/{repo:repo}/raw/{rev}/{path:path}", download.raw, "raw"),
]

# These check a token of their own instead of a user's.
STORAGE_ROUTES: list[tuple[str, str, Handler, str]] = [
    ("GET", "/cdn-files/{repo:repo}/{sha256}/{path:path}", download.cdn, "data"),
    ("GET", "/cdn-xorbs/{hash}", xet.get_xorb, "data"),
    ("POST", "/lfs-complete", lfs.complete, "lfs"),
    ("POST", "/oauth/token", publishers.exchange, "api"),
    ("GET", "/v1/chunks/{path:path}", xet.not_offered, "xet"),
    ("POST", "/v1/xorb-grants/{path:path}", xet.not_offered, "xet"),
    ("GET", "/v2/{path:path}", xet.not_offered, "xet"),
    ("POST", "/v2/{path:path}", xet.not_offered, "xet"),
    ("GET", "/v1/reconstructions/{hash}", xet.reconstruction, "xet"),
]
UPLOAD_ROUTES: list[tuple[str, str, Handler, str]] = [
    ("PUT", "/lfs-object", lfs.put_object, "lfs"),
    ("PUT", "/lfs-part", lfs.put_part, "lfs"),
    ("POST", "/v1/xorbs/default/{hash}", xet.put_xorb, "xet"),
    ("POST", "/v1/shards", xet.put_shard, "xet"),
]


def build_app(hub: Hub) -> ASGIApp:
    routes = [
        *_routes(hub, STORAGE_ROUTES, storage=True),
        *_routes(hub, UPLOAD_ROUTES, storage=True, upload=True),
        *_routes(hub, ROUTES),
        Route("/{path:path}", Endpoint(hub, _unknown, "unknown", storage=True)),
    ]
    starlette = Starlette(routes=routes)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        await starlette(scope, receive, send)

    return app


def _routes(
    hub: Hub, table: Iterable[tuple[str, str, Handler, str]], **options: bool
) -> Iterable[Route]:
    for method, pattern, handler, kind in table:
        yield Route(pattern, Endpoint(hub, handler, kind, **options), methods=[method])


def _unknown(call: Call) -> Any:
    raise Refusal(404, f"This server has no {call.request.method} {call.record.path}")
