"""``DevHub``: the server in a background thread, and the switches tests need.

Two loopback ports are opened: the Hub, and its storage (the CDN and the presigned uploads), so that
a client sees two origins as it does in real life. Nothing listens on any other address.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import uvicorn

from .app import build_app
from .broken import TrackedProtocol
from .faults import Faults
from .log import RequestLog
from .repo import Repo, Settings
from .state import Hub, Options

HOST = "127.0.0.1"
START_SECONDS = 30


class DevHub:
    """A loopback Hub on a folder (its own temporary one unless given), as a context manager.

    ``users`` maps names to tokens, ``orgs`` names to members. ``large_file_bytes`` and
    ``part_bytes`` are where large-file storage and multipart uploads start; ``page_size`` how many
    items a list answers at once; ``url_seconds`` how long a CDN address is good for;
    ``xet_downloads`` offers xet to downloading clients too.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        users: Mapping[str, str] | None = None,
        orgs: Mapping[str, Sequence[str]] | None = None,
        port: int = 0,
        large_file_bytes: int = Options.large_file_bytes,
        part_bytes: int = Options.part_bytes,
        page_size: int = Options.page_size,
        url_seconds: float = Options.url_seconds,
        xet_downloads: bool = Options.xet_downloads,
    ) -> None:
        self._folder = folder
        self._users = dict(users) if users is not None else {"demo": "hf_demo"}
        self._orgs = dict(orgs or {})
        self._port = port
        self._options = Options(large_file_bytes, part_bytes, page_size, url_seconds, xet_downloads)

    def __enter__(self) -> DevHub:
        self._temporary = tempfile.TemporaryDirectory(prefix="devhub-", ignore_cleanup_errors=True)
        folder = self._folder or Path(self._temporary.name) / "hub"
        sockets = [_listen(self._port), _listen(0)]
        self.url, cdn_url = (f"http://{HOST}:{s.getsockname()[1]}" for s in sockets)
        self._hub = Hub(folder, self._users, self._orgs, self._options, self.url, cdn_url)
        self._server = _server(self._hub)
        self._thread = threading.Thread(
            target=self._server.run, args=[sockets], name="devhub", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise RuntimeError("the loopback Hub did not start")
            time.sleep(0.005)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join()
        self._temporary.cleanup()

    @property
    def log(self) -> RequestLog:
        return self._hub.log

    @property
    def faults(self) -> Faults:
        return self._hub.faults

    @property
    def folder(self) -> Path:
        return self._hub.folder

    @property
    def cdn_url(self) -> str:
        return self._hub.cdn_url

    def token(self, user: str | None = None) -> str:
        """The token of a user, by default the first."""
        return self._users[user or next(iter(self._users))]

    def environment(
        self, user: str | None = None, *, xet: bool = True, home: Path | None = None
    ) -> dict[str, str]:
        """Variables for a client process that talks to this Hub and shares no cache with others.

        hf_xet's cache remembers what each server has, so every call gives a fresh one.
        """
        home = home or Path(tempfile.mkdtemp(prefix="home-", dir=self._temporary.name))
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token(user),
            "HF_HOME": str(home),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "NO_PROXY": HOST,
        }

    def create_repo(self, name: str, *, kind: str = "model", private: bool = False) -> None:
        """A repo in any namespace, also one that no user owns (``org/base``, ``gpt2``)."""
        settings = Settings(visibility="private" if private else "public")
        self._hub.store.create(kind, name, "devhub", settings)

    def set_gated(self, name: str, gated: str | bool = True, *, kind: str = "model") -> None:
        repo = self._repo(kind, name)
        repo.settings.gated = "manual" if gated is True else gated
        repo.save_settings()

    def allow(self, user: str, name: str, *, kind: str = "model") -> None:
        """Grant a user access to a gated repo."""
        repo = self._repo(kind, name)
        repo.settings.allowed.append(user)
        repo.save_settings()

    def trust(
        self,
        name: str,
        *,
        repository: str,
        workflow: str | None = None,
        branch: str | None = None,
        pull_requests: bool = True,
        kind: str = "model",
    ) -> None:
        """Make a GitHub repository a trusted publisher of a repo: with ``workflow`` (a file name)
        and ``branch`` that one only. ``pull_requests``: whether its tokens may open them."""
        repo = self._repo(kind, name)
        with repo.lock:
            repo.settings.publishers.append(
                {
                    "repository": repository,
                    "workflow": workflow,
                    "branch": branch,
                    "pull_requests": pull_requests,
                }
            )
            repo.save_settings()

    def expire_urls(self) -> None:
        """Every CDN address, storage token and publisher's token given so far is refused from now
        on."""
        self._hub.signer.expire_all()

    def _repo(self, kind: str, name: str) -> Repo:
        repo = self._hub.store.find(kind, name)
        if repo is None:
            raise KeyError(f"no {kind} {name}")
        return repo


def _listen(port: int) -> socket.socket:
    # The protocol is named so that asyncio sets TCP_NODELAY: without it each answer waits 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    return listener


def _server(hub: Hub) -> uvicorn.Server:
    config = uvicorn.Config(
        build_app(hub),
        http=TrackedProtocol,
        lifespan="off",
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=30,
    )
    return uvicorn.Server(config)
