"""A stand-in for GitHub over HTTP: the issues of repositories, dispatches, and ID tokens for jobs.

It answers as the REST API does for what hubdiff asks of it, in pages, and keeps every request.
``fail`` makes the next requests fail; ``claims`` are what the next ID token says.

    with GitHubFake() as github:
        subprocess.run([...], env=os.environ | github.environment())
        assert github.issues["me/models"][0]["state"] == "open"
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN, JOB_TOKEN = "gh_token", "job_token"
BOT = {"login": "github-actions[bot]", "type": "Bot"}
ISSUER = "https://token.actions.githubusercontent.com"


@dataclass
class Asked:
    method: str
    path: str
    query: dict[str, str]
    body: Any
    headers: dict[str, str]
    status: int = 0


@dataclass
class Failure:
    """The next ``times`` requests that match get this answer. ``body`` may be no JSON. ``done``:
    what was asked for is done all the same."""

    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    method: str | None = None
    path: str = ""
    body: bytes = b'{"message": "made to fail"}'
    done: bool = False


class GitHubFake:
    """``issues`` by ``owner/repo``, in the order they were opened. Creating a label is allowed, as
    it is for a token with ``issues: write``; ``drops_labels`` plays one that may not."""

    def __init__(self) -> None:
        self.issues: dict[str, list[dict[str, Any]]] = {}
        self.dispatches: list[tuple[str, Any]] = []
        self.asked: list[Asked] = []
        self.failures: list[Failure] = []
        self.claims: dict[str, Any] = {}
        self.issues_disabled = False
        self.drops_labels = False
        self._lock = threading.Lock()

    def __enter__(self) -> GitHubFake:
        handler = type("Handler", (_Handler,), {"github": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, **claims: Any) -> dict[str, str]:
        """What a job on GitHub has in its environment, with ``claims`` in its ID token."""
        self.claims = claims
        return {
            "GITHUB_ACTIONS": "true",
            "GITHUB_API_URL": self.url,
            "GITHUB_TOKEN": TOKEN,
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url}/idtoken",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": JOB_TOKEN,
        }

    def fail(self, status: int, **options: Any) -> None:
        self.failures.append(Failure(status, **options))

    def add_issue(self, repository: str, **fields: Any) -> dict[str, Any]:
        with self._lock:
            known = self.issues.setdefault(repository, [])
            number = len(known) + 1
            issue = {
                "number": number,
                "title": "",
                "body": "",
                "state": "open",
                "labels": [],
                "user": BOT,
                "author_association": "NONE",
                "html_url": f"https://github.com/{repository}/issues/{number}",
                **fields,
            }
            known.append(issue)
        return issue

    def count(self, method: str) -> int:
        return sum(asked.method == method for asked in self.asked)

    def answer(self, asked: Asked) -> tuple[int, Any, dict[str, str]]:
        for failure in self.failures:
            matches = failure.method in (None, asked.method) and failure.path in asked.path
            if failure.times and matches:
                failure.times -= 1
                if failure.done:
                    self._answer(asked)
                return failure.status, failure.body, failure.headers
        return self._answer(asked)

    def _answer(self, asked: Asked) -> tuple[int, Any, dict[str, str]]:
        if asked.path == "/idtoken":
            return self._id_token(asked)
        found = re.fullmatch(r"/repos/([^/]+/[^/]+)/(issues|dispatches)(?:/(\d+))?", asked.path)
        if found is None:
            return 404, {"message": "Not Found"}, {}
        if asked.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"message": "Bad credentials"}, {}
        repository, what, number = found.groups()
        if what == "dispatches":
            self.dispatches.append((repository, asked.body))
            return 204, None, {}
        if self.issues_disabled:
            return 410, {"message": "Issues has been disabled in this repository."}, {}
        if asked.method == "GET":
            return self._list(repository, asked)
        if asked.method == "POST":
            return self._create(repository, asked.body)
        return self._change(repository, int(number), asked.body)

    def _list(self, repository: str, asked: Asked) -> tuple[int, Any, dict[str, str]]:
        state, label = asked.query.get("state", "open"), asked.query.get("labels")
        found = [
            issue
            for issue in reversed(self.issues.get(repository, []))
            if state in ("all", issue["state"])
            and (label is None or label in [one["name"] for one in issue["labels"]])
        ]
        size, page = int(asked.query.get("per_page", 30)), int(asked.query.get("page", 1))
        headers = {}
        if page * size < len(found):
            query = "&".join(f"{k}={v}" for k, v in {**asked.query, "page": page + 1}.items())
            headers["Link"] = f'<{self.url}{asked.path}?{query}>; rel="next"'
        return 200, found[(page - 1) * size : page * size], headers

    def _create(self, repository: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        if problem := _too_long(body):
            return problem
        names = [] if self.drops_labels else body.get("labels", [])
        labels = [{"name": name} for name in names]
        issue = self.add_issue(
            repository, title=body["title"], body=body.get("body"), labels=labels
        )
        return 201, issue, {}

    def _change(self, repository: str, number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
        if problem := _too_long(body):
            return problem
        issue = self.issues[repository][number - 1]
        issue.update({key: body[key] for key in ("title", "body", "state") if key in body})
        return 200, issue, {}

    def _id_token(self, asked: Asked) -> tuple[int, Any, dict[str, str]]:
        if asked.headers.get("authorization") != f"Bearer {JOB_TOKEN}":
            return 401, {"message": "no id-token: write"}, {}
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": asked.query.get("audience"), "iat": now, "exp": now + 300}
        return 200, {"value": id_token({**claims, **self.claims})}, {}


def id_token(claims: dict[str, Any]) -> str:
    """A JWT signed with a key that nobody checks."""
    head = _base64(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    text = f"{head}.{_base64(json.dumps(claims).encode())}"
    return f"{text}.{_base64(hmac.new(b'test', text.encode(), hashlib.sha256).digest())}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _too_long(body: Any) -> tuple[int, Any, dict[str, str]] | None:
    if len(body.get("body") or "") > 65_536:
        return 422, {"message": "body is too long (maximum is 65536 characters)"}, {}
    return None


class _Handler(BaseHTTPRequestHandler):
    github: GitHubFake
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(
            self.command,
            parts.path,
            {key: values[-1] for key, values in parse_qs(parts.query).items()},
            json.loads(data) if data else None,
            {key.lower(): value for key, value in self.headers.items()},
        )
        status, body, headers = self.github.answer(asked)
        asked.status = status
        self.github.asked.append(asked)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        content = b"" if status == 204 else content
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = _serve  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass
