"""A ``send`` that breaks the response on its way out: reset, short or corrupted body.

Resets need the socket itself. The HTTP protocol class below remembers each connection's transport,
by the client's address, for as long as it is open.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .faults import Fault

_transports: dict[tuple[Any, Any], asyncio.Transport] = {}


class TrackedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, with its open connections on record."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._ends = _ends(transport)
        _transports[self._ends] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        _transports.pop(self._ends, None)
        super().connection_lost(exc)


def _ends(transport: asyncio.Transport) -> tuple[Any, Any]:
    return transport.get_extra_info("sockname"), transport.get_extra_info("peername")


def broken_send(send: Send, fault: Fault, scope: Scope, fires: Callable[[], bool]) -> Send:
    """``fires`` is asked once, when the body reaches the point where it should break."""
    transport = _transports[tuple(scope["server"]), tuple(scope["client"])]
    sent = 0

    async def broken(message: Message) -> None:
        nonlocal sent
        body = message.get("body", b"")
        keep = fault.after_bytes - sent
        sent += len(body)
        if not 0 <= keep < len(body) or not fires():
            await send(message)
            return
        if fault.kind == "corrupt":
            flipped = bytes([body[keep] ^ 0xFF])
            await send({**message, "body": body[:keep] + flipped + body[keep + 1 :]})
            return
        await send({"type": "http.response.body", "body": body[:keep], "more_body": True})
        await _cut(transport, abruptly=fault.kind == "reset")
        raise ConnectionError(f"injected fault: {fault.kind}")

    return broken


async def _cut(transport: asyncio.Transport, *, abruptly: bool) -> None:
    while transport.get_write_buffer_size() and not transport.is_closing():
        await asyncio.sleep(0.001)
    if abruptly:
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    else:
        transport.close()
