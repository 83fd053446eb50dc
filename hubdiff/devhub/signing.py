"""Signed, expiring tokens: what a presigned URL or a short-lived storage token carries.

A token is its own proof: base64 of a JSON claim, a dot, an HMAC. ``purpose`` keeps a token made for
one door from opening another.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from typing import Any

from .refusal import Refusal


class Signer:
    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def sign(self, purpose: str, seconds: float, **claim: Any) -> str:
        claim = {"purpose": purpose, "exp": time.time() + seconds, **claim}
        body = base64.urlsafe_b64encode(json.dumps(claim).encode()).rstrip(b"=")
        return f"{body.decode()}.{self._mac(body)}"

    def read(self, purpose: str, token: str, *, status: int = 403) -> dict[str, Any]:
        """The claim of a good token. Otherwise ``status``: storage says 403, an API says 401."""
        body, _, mac = token.partition(".")
        if not hmac.compare_digest(self._mac(body.encode()), mac):
            raise Refusal(status, "The signature does not match")
        claim: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        if claim["purpose"] != purpose:
            raise Refusal(status, f"This token is not for {purpose}")
        if claim["exp"] < time.time():
            raise Refusal(status, "Request has expired")
        return claim

    def expire_all(self) -> None:
        """Every token handed out so far stops working."""
        self._key = secrets.token_bytes(32)

    def _mac(self, body: bytes) -> str:
        return hmac.new(self._key, body, hashlib.sha256).hexdigest()
