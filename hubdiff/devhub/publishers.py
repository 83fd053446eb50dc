"""Trusted publishers: a CI job's ID token in exchange for an hour's right to write to one repo.

As on the Hub, a publisher is a setting of a repo (``DevHub.trust``): the GitHub repository, and
where they are given the branch and the file of the workflow; all must be those of the ID token.
The token given may write to that repo only, creates none, and its pushes are ``[OIDC]``'s. Whether
such a token may open pull requests the Hub's documentation leaves open, so it is a setting too.

**The ID token's signature is not checked**: GitHub's keys are out of reach here, and the issuer is
the test's own. Unsigned and HS256 tokens are taken at their word; the claims are checked.
"""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from .endpoint import PUBLISHER_TOKEN, Call
from .refusal import Refusal
from .repo import Repo

GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"
ISSUER = "https://token.actions.githubusercontent.com"
TOKEN_SECONDS = 3600


def exchange(call: Call) -> Any:
    """RFC 8693, as the official client speaks it. A repo without the right publisher, one that
    nobody may see and one that is not there are refused alike."""
    body = call.json()
    if body.get("grant_type") != GRANT or body.get("subject_token_type") != ID_TOKEN:
        raise Refusal(400, "unsupported_grant_type: only the exchange of an ID token")
    claims = _claims(call, str(body.get("subject_token")))
    kind, name = _resource(str(body.get("resource")))
    call.record.repo = name
    repo = call.hub.store.find(kind, name)
    publisher = None if repo is None else _publisher(repo, claims)
    if publisher is None:
        raise Refusal(400, f"invalid_grant: no trusted publisher of {name} has these claims")
    allowed = publisher["pull_requests"]
    token = call.hub.signer.sign(
        "publisher", TOKEN_SECONDS, kind=kind, repo=name, pull_requests=allowed
    )
    return {
        "access_token": PUBLISHER_TOKEN + token,
        "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "token_type": "bearer",
        "expires_in": TOKEN_SECONDS,
    }


def _claims(call: Call, token: str) -> dict[str, Any]:
    try:
        _, payload, _ = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        expires = float(claims["exp"])
    except (ValueError, KeyError, TypeError):
        raise Refusal(400, "invalid_request: the subject token is no ID token") from None
    if expires < time.time():
        raise Refusal(400, "invalid_grant: the ID token has expired")
    if claims.get("iss") != ISSUER:
        raise Refusal(400, f"invalid_grant: the issuer must be {ISSUER}")
    if claims.get("aud") != call.hub.url:
        raise Refusal(400, f"invalid_grant: the audience must be {call.hub.url}")
    return dict(claims)


def _resource(resource: str) -> tuple[str, str]:
    prefix, _, rest = resource.partition("/")
    return (prefix[:-1], rest) if prefix in ("datasets", "spaces") else ("model", resource)


def _publisher(repo: Repo, claims: dict[str, Any]) -> dict[str, Any] | None:
    """The first publisher of the repo whose every setting is that of the token."""
    shown = {
        "repository": claims.get("repository"),
        "branch": _branch(str(claims.get("ref"))),
        "workflow": _workflow_file(str(claims.get("workflow_ref"))),
    }
    for publisher in repo.settings.publishers:
        if all(publisher[name] in (None, value) for name, value in shown.items()):
            return publisher
    return None


def _branch(ref: str) -> str | None:
    return ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else None


def _workflow_file(ref: str) -> str:
    """``x.yml`` of ``me/repo/.github/workflows/x.yml@refs/heads/main``."""
    return ref.partition("@")[0].rpartition("/")[2]
