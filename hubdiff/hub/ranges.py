"""Byte ranges of one file on the Hub, straight into the caller's memory.

A large file is resolved once, whatever the number of ranges and threads: the Hub limits the rate
of ``/resolve`` and not that of the storage behind it. The resolved URL is signed and expires; when
storage refuses it, it is resolved anew. A range that breaks off is continued where it stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hubdiff._version import __version__
from hubdiff.errors import CheckpointError, HubError, IntegrityError
from hubdiff.files import FileInfo
from hubdiff.hub.client import subject
from hubdiff.hub.retry import BrokenAnswer, retrying
from hubdiff.hub.translate import translated
from hubdiff.refs import PinnedRef

# Seconds without one byte before a connection counts as broken.
TIMEOUT_SECONDS = 30.0

# A server that ignores ranges sends the file from its start; up to here that is tolerable.
MAX_UNRANGED = 16 << 20


class RemoteFile:
    """One file at one commit, and the URL that serves it. Shared by all its readers."""

    def __init__(self, pin: PinnedRef, info: FileInfo, endpoint: str) -> None:
        assert pin.repo is not None
        self.info = info
        self.subject = subject(pin.repo, pin.commit, info.path)
        self._endpoint = endpoint
        self._page = hf_hub_url(pin.repo, info.path, revision=pin.commit, endpoint=endpoint)
        self._location: str | None = None
        self._lock = threading.Lock()

    def location(self) -> str:
        """The URL to read ranges from."""
        with self._lock:
            if self._location is None:
                # Small files are served by the Hub itself: looking first would double the requests.
                self._location = self._resolve() if self.info.sha256 else self._page
            return self._location

    def expire(self, location: str) -> bool:
        """Forget a signed URL that storage no longer accepts; False when there is none to renew.
        Of many threads that were refused, one resolves anew."""
        with self._lock:
            if location == self._page:
                return False
            if self._location == location:
                self._location = None
            return True

    def headers(self, location: str) -> dict[str, str]:
        """A token is for the Hub alone, never for the storage it redirects to."""
        here, there = urlsplit(self._endpoint), urlsplit(location)
        return _headers(with_token=here[:2] == there[:2])

    def _resolve(self) -> str:
        found = get_hf_file_metadata(
            self._page, headers=_headers(with_token=True), endpoint=self._endpoint
        )
        if found.size != self.info.size:
            raise IntegrityError(
                f"{self.subject} has {found.size} bytes where it is served and "
                f"{self.info.size} in the listing",
                next_step="Run again; if it stays, tell the repo's owner.",
            )
        return found.location


def _headers(*, with_token: bool) -> dict[str, str]:
    return build_hf_headers(
        token=None if with_token else False,
        library_name="hubdiff",
        library_version=__version__,
    )


@dataclass
class _Gap:
    """The part of a range that has not arrived yet."""

    offset: int
    view: memoryview
    renewed: bool = False

    def fill(self, chunk: bytes | memoryview) -> None:
        if len(chunk) > len(self.view):
            raise BrokenAnswer("more bytes came than were asked for")
        self.view[: len(chunk)] = chunk
        self.view = self.view[len(chunk) :]
        self.offset += len(chunk)


class RemoteReader:
    """Reads ranges of one remote file; holds no connection between reads."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.size = file.info.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        gap = _Gap(offset, buffer.cast("B"))
        end = offset + len(gap.view)
        if end > self.size:
            raise CheckpointError(
                f"{self._file.subject} ends at byte {self.size}, {end - self.size} bytes too early",
                next_step="The file is cut short: its owner must upload it again.",
            )
        if len(gap.view):
            with translated(self._file.subject):
                retrying(lambda: self._fetch(gap))

    def close(self) -> None:
        """Nothing to do: connections belong to the session that all readers share."""

    def _fetch(self, gap: _Gap) -> None:
        """One request for all of the gap; what arrives before an error stays."""
        location = self._file.location()
        last = gap.offset + len(gap.view) - 1
        headers = self._file.headers(location)
        headers |= {"Range": f"bytes={gap.offset}-{last}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", location, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True
        ) as answer:
            refused = answer.status_code in (401, 403)
            if not refused or gap.renewed or not self._file.expire(location):
                hf_raise_for_status(answer)
                self._check(answer.status_code, answer.headers, gap.offset, last)
                if answer.status_code == 206:
                    self._drain(answer.iter_raw(), gap)
                else:
                    self._drain_whole(answer.iter_raw(), gap)
                return
        gap.renewed = True
        self._fetch(gap)

    def _check(self, status: int, headers: Mapping[str, str], first: int, last: int) -> None:
        """Refuse an answer whose body can't be the range, before reading any of it."""
        if headers.get("Content-Encoding", "identity") != "identity":
            raise BrokenAnswer(f"{self._file.subject} came compressed")
        expected = f"bytes {first}-{last}/{self.size}"
        if status == 206 and headers.get("Content-Range") != expected:
            raise BrokenAnswer(
                f"{self._file.subject}: asked for {expected!r}, "
                f"got {headers.get('Content-Range')!r}"
            )
        if status != 206 and last >= MAX_UNRANGED:
            raise HubError(
                f"{self._file.subject}: the server ignores byte ranges and would send all of it",
                next_step="Run again with --cache, which downloads whole files.",
            )

    def _drain(self, chunks: Iterable[bytes], gap: _Gap) -> None:
        for chunk in chunks:
            gap.fill(chunk)
        if gap.view:
            raise BrokenAnswer(f"{self._file.subject}: the body ends {len(gap.view)} bytes early")

    def _drain_whole(self, chunks: Iterable[bytes], gap: _Gap) -> None:
        """The gap out of a body that starts at the file's first byte."""
        at = 0
        for chunk in chunks:
            body = memoryview(chunk)[max(0, gap.offset - at) :]
            at += len(chunk)
            gap.fill(body[: len(gap.view)])
            if not gap.view:
                return
        raise BrokenAnswer(f"{self._file.subject}: the body ends {len(gap.view)} bytes early")
