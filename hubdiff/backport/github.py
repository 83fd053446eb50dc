"""The issues of one GitHub repository, through GitHub's REST API.

``GITHUB_TOKEN`` and ``GITHUB_API_URL`` of the environment say as whom and where, as a job of GitHub
Actions has them. The token is sent to that one address only: no redirect is followed.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from hubdiff._version import __version__
from hubdiff.errors import HubdiffError

API = "https://api.github.com"
PAGE, MOST_PAGES = 100, 20
RETRIES = 4
WAIT_SECONDS = 1.0
_MOST_WAIT = 120.0
_TIMEOUT = 30.0
_MOST_BYTES = 32 << 20
_REPOSITORY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,38})/[A-Za-z0-9._-]{1,100}")
_HOME = ("127.0.0.1", "localhost", "::1")


class Unavailable(HubdiffError):
    """GitHub failed, or did not answer, also after the retries."""


@dataclass(frozen=True)
class Issue:
    """``trusted``: opened by a bot, or by somebody who may write to the repository."""

    number: int
    body: str
    state: str
    url: str
    trusted: bool


class GitHub:
    """Raises ``HubdiffError`` with what to do, ``Unavailable`` where it may be otherwise later."""

    def __init__(self, repository: str) -> None:
        if not _REPOSITORY.fullmatch(repository) or ".." in repository:
            raise HubdiffError(
                f"{repository!r} is no repository of GitHub", next_step="Write OWNER/REPO."
            )
        self.repository = repository
        self._token = os.environ.get("GITHUB_TOKEN") or ""
        self._api = (os.environ.get("GITHUB_API_URL") or API).rstrip("/")
        parts = urlsplit(self._api)
        if parts.scheme != "https" and parts.hostname not in _HOME:
            raise HubdiffError(
                f"GITHUB_API_URL is {self._api}, where a token would go unencrypted",
                next_step=f"Set it to {API}, or to your server's https address.",
            )
        if not self._token:
            raise HubdiffError(
                "GITHUB_TOKEN is not set",
                next_step="In a workflow: env: GITHUB_TOKEN: ${{ github.token }}.",
            )
        self._opener = urllib.request.build_opener(_NoRedirect())

    def issues(self, *, label: str | None = None) -> Iterator[Issue]:
        """The newest first, open and closed; at most 2,000. No pull requests."""
        query = {"state": "all", "per_page": str(PAGE), **({"labels": label} if label else {})}
        for page in range(1, MOST_PAGES + 1):
            path = f"issues?{urlencode({**query, 'page': page})}"
            found, more = self._ask("GET", path)
            if not isinstance(found, list):
                raise Unavailable(f"GitHub did not answer with the issues of {self.repository}")
            yield from (_issue(one) for one in found if "pull_request" not in one)
            if not more:
                return

    def create(self, title: str, body: str, labels: list[str]) -> Issue:
        """Not tried again by itself: an answer that is lost is no issue that is not there."""
        content = {"title": title, "body": body, "labels": labels}
        return _issue(self._ask("POST", "issues", content, retries=0)[0])

    def change(self, number: int, **fields: str) -> Issue:
        return _issue(self._ask("PATCH", f"issues/{number}", fields)[0])

    def _ask(
        self, method: str, path: str, body: Any = None, *, retries: int = RETRIES
    ) -> tuple[Any, bool]:
        """The answer, and whether another page follows."""
        for attempt in range(retries + 1):
            try:
                return self._once(method, path, body)
            except urllib.error.HTTPError as error:
                with error:
                    wait = _wait(error, attempt)
                    if wait is None:
                        raise self._refused(error) from None
                    what = f"GitHub answered {error.code}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                wait, what = _backoff(attempt), f"GitHub did not answer: {error}"
            if attempt < retries:
                time.sleep(wait)
        raise Unavailable(
            f"{what} ({method} {path.partition('?')[0]})", next_step="Run it again later."
        )

    def _once(self, method: str, path: str, body: Any) -> tuple[Any, bool]:
        request = urllib.request.Request(
            f"{self._api}/repos/{self.repository}/{path}",
            None if body is None else json.dumps(body).encode(),
            {
                "Accept": "application/vnd.github+json",
                "Authorization": f"Bearer {self._token}",
                "Content-Type": "application/json",
                "User-Agent": f"hubdiff/{__version__}",
                "X-GitHub-Api-Version": "2022-11-28",
            },
            method=method,
        )
        with self._opener.open(request, timeout=_TIMEOUT) as answer:
            data = answer.read(_MOST_BYTES)
            return json.loads(data), 'rel="next"' in (answer.headers.get("Link") or "")

    def _refused(self, error: urllib.error.HTTPError) -> HubdiffError:
        said = _message(error)
        return HubdiffError(
            f"GitHub refuses to let the issues of {self.repository} be read or written: "
            f"{error.code}{f' {said}' if said else ''}",
            next_step=_ADVICE.get(error.code, "Look at what GitHub says."),
        )


_ADVICE = {
    301: "The repository has another name now: write that one.",
    307: "The repository has another name now: write that one.",
    308: "The repository has another name now: write that one.",
    401: "GITHUB_TOKEN is not accepted: give a token that is valid, such as ${{ github.token }}.",
    403: "The token may not: the job needs permissions: issues: write.",
    404: "Check OWNER/REPO; a private repository is not found by a token that may not see it, and "
    "the job needs permissions: issues: write.",
    410: "Issues are turned off: turn them on in the repository's settings, or leave --issue out.",
    422: "GitHub does not take what was sent; please report it.",
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _wait(error: urllib.error.HTTPError, attempt: int) -> float | None:
    """Seconds until it is worth asking again; None: it is not."""
    asked = (error.headers.get("Retry-After") or "").strip()
    limited = error.code == 403 and (asked or error.headers.get("X-RateLimit-Remaining") == "0")
    if error.code not in (408, 429) and error.code < 500 and not limited:
        return None
    if asked.isdigit():
        return min(float(asked), _MOST_WAIT)
    reset = (error.headers.get("X-RateLimit-Reset") or "").strip()
    if limited and reset.isdigit():
        return min(max(float(reset) - time.time(), 0.0), _MOST_WAIT)
    return _backoff(attempt)


def _backoff(attempt: int) -> float:
    return float(WAIT_SECONDS * 2**attempt * random.uniform(0.5, 1.5))


def _message(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read(1 << 16))
    except (OSError, http.client.HTTPException, ValueError):
        return ""
    text = said.get("message") if isinstance(said, dict) else None
    return text[:300] if isinstance(text, str) else ""


def _issue(value: Any) -> Issue:
    try:
        user = value.get("user") or {}
        member = value.get("author_association") in ("OWNER", "MEMBER", "COLLABORATOR")
        return Issue(
            int(value["number"]),
            str(value.get("body") or ""),
            str(value["state"]),
            str(value["html_url"]),
            member or user.get("type") == "Bot",
        )
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise Unavailable(f"GitHub answered with something that is no issue: {error!r}") from None
