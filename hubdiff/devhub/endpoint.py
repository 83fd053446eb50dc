"""Between ASGI and the handlers: who asks, the body, the log, the faults, refusals as responses.

A handler is a plain function of a ``Call`` that returns a response or something JSON can hold. It
runs in a worker thread, so it may block on git and on the disk.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from .broken import broken_send
from .faults import BODY_FAULTS, STATUSES, Fault
from .log import LogRecord
from .refusal import Refusal, bad_request
from .repo import Repo
from .state import Hub
from .store import Publisher

logger = logging.getLogger("hubdiff.devhub")

BAD_TOKEN = "Invalid credentials in Authorization header"
PUBLISHER_TOKEN = "hf_jwt_"


@dataclass
class Call:
    """One request. ``body`` is a file on disk for upload routes, bytes for all others."""

    hub: Hub
    request: Request
    params: dict[str, str]
    user: str | None
    record: LogRecord
    body: bytes = b""
    upload: Path | None = None

    @property
    def kind(self) -> str:
        return self.params.get("kind", "models").removesuffix("s")

    def query(self, name: str, default: str = "") -> str:
        return self.request.query_params.get(name, default)

    def flag(self, name: str) -> bool:
        return self.query(name).lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        return _json_object(self.body or b"{}")

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.decode(), keep_blank_values=True)

    def need_user(self) -> str:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return self.user

    def repo(self) -> Repo:
        return self.hub.store.open(self.kind, self.params["repo"], self.user)

    def repo_files(self) -> Repo:
        return self.hub.store.open_files(self.kind, self.params["repo"], self.user)

    def repo_to_contribute(self) -> Repo:
        return self.hub.store.open_to_contribute(self.kind, self.params["repo"], self.user)

    def repo_for_write(self) -> Repo:
        return self.hub.store.open_for_write(self.kind, self.params["repo"], self.user)


Handler = Callable[[Call], Any]


class Endpoint:
    """A handler as an ASGI application. ``storage`` routes check tokens of their own."""

    def __init__(
        self, hub: Hub, handler: Handler, kind: str, *, upload: bool = False, storage: bool = False
    ) -> None:
        self.hub = hub
        self.handler = handler
        self.kind = kind
        self.upload = upload
        self.storage = storage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        params = {name: unquote(value) for name, value in request.path_params.items()}
        record = LogRecord(
            request.method,
            scope["path"],
            self.kind,
            repo=params.get("repo"),
            file=params.get("path") if "repo" in params else None,
            range=request.headers.get("range"),
        )
        self.hub.log.add(record)
        send = _recording(send, record)
        fault = self.hub.faults.find(BODY_FAULTS, request.method, _target(scope))
        if fault is not None and request.method != "HEAD":
            send = broken_send(send, fault, scope, partial(self._fires, fault, record))
        call = Call(self.hub, request, params, None, record)
        try:
            response = await self._respond(call)
            response.headers["X-Request-Id"] = uuid.uuid4().hex
            await response(scope, receive, send)
        except (ClientDisconnect, ConnectionError):
            pass
        finally:
            if call.upload is not None:
                call.upload.unlink(missing_ok=True)

    def _fires(self, fault: Fault, record: LogRecord) -> bool:
        if fires := self.hub.faults.fire(fault):
            record.fault = fault.kind
        return fires

    async def _respond(self, call: Call) -> Response:
        try:
            await self._read(call)
            fault = self.hub.faults.find(STATUSES, call.request.method, _target(call.request.scope))
            if fault is not None and self._fires(fault, call.record):
                raise _status_fault(fault)
            answer = await run_in_threadpool(self._handle, call)
        except Refusal as refusal:
            return _refused(refusal)
        except ClientDisconnect:
            raise
        except Exception as error:
            # Whatever went wrong, a client must get an answer and the developer the traceback.
            logger.exception("%s %s", call.request.method, call.record.path)
            return _refused(Refusal(500, f"{type(error).__name__}: {error}"))
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    async def _read(self, call: Call) -> None:
        if not self.upload:
            call.body = await call.request.body()
            return
        call.upload = self.hub.objects.temporary_file()
        with call.upload.open("wb") as file:
            async for piece in call.request.stream():
                file.write(piece)

    def _handle(self, call: Call) -> Any:
        if not self.storage:
            call.user = call.record.user = authenticate(self.hub, call.request)
        return self.handler(call)


def bearer(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def authenticate(hub: Hub, request: Request) -> str | None:
    token = bearer(request)
    if token is None:
        return None
    user = publisher_of(hub, token) or hub.store.user_of(token)
    if user is None:
        raise Refusal(401, BAD_TOKEN)
    return user


def publisher_of(hub: Hub, token: str) -> Publisher | None:
    """Whose token it is that ``publishers.exchange`` gave, while it is good."""
    if not token.startswith(PUBLISHER_TOKEN):
        return None
    try:
        claim = hub.signer.read("publisher", token.removeprefix(PUBLISHER_TOKEN), status=401)
    except Refusal:
        raise Refusal(401, BAD_TOKEN) from None
    return Publisher.of(claim)


def _refused(refusal: Refusal) -> Response:
    one_line = " ".join(refusal.message.split())
    message = one_line.encode("ascii", "replace").decode()
    headers = {**refusal.headers, "X-Error-Message": message}
    if refusal.code is not None:
        headers["X-Error-Code"] = refusal.code
    return JSONResponse({"error": refusal.message}, refusal.status, headers)


def _status_fault(fault: Fault) -> Refusal:
    headers = {"Retry-After": f"{fault.retry_after:g}"} if fault.kind == "429" else {}
    return Refusal(int(fault.kind), "Injected fault", headers=headers)


def _recording(send: Send, record: LogRecord) -> Send:
    async def recording(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
        elif record.method != "HEAD":
            record.bytes_sent += len(message.get("body", b""))
        await send(message)

    return recording


def _target(scope: Scope) -> str:
    query = scope["query_string"].decode()
    return f"{scope['path']}?{query}" if query else str(scope["path"])


def read_lines(body: bytes) -> Iterator[dict[str, Any]]:
    """The objects of an ndjson body."""
    for line in body.splitlines():
        if line.strip():
            yield _json_object(line)


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise bad_request(f"The body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object")
    return value
