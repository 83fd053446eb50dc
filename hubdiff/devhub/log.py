"""The request log: what was asked, and how many body bytes went out.

A record is added when a request arrives and filled while it is answered, always before the bytes
it counts are handed to the socket. So a client that has read an answer finds it in the log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

DOWNLOADS = ("resolve", "data", "raw")


@dataclass
class LogRecord:
    """One request. ``kind`` is one of: resolve, data, raw, api, commit, copy, xet, lfs, unknown."""

    method: str
    path: str
    kind: str
    repo: str | None = None
    file: str | None = None
    user: str | None = None
    range: str | None = None
    status: int = 0
    bytes_sent: int = 0
    fault: str | None = None
    time: float = field(default_factory=time.time)


class RequestLog:
    def __init__(self) -> None:
        self._records: list[LogRecord] = []
        self._lock = threading.Lock()

    def add(self, record: LogRecord) -> None:
        with self._lock:
            self._records.append(record)

    @property
    def records(self) -> list[LogRecord]:
        with self._lock:
            return list(self._records)

    def __iter__(self) -> Iterator[LogRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def clear(self) -> None:
        with self._lock:
            self._records.clear()

    def select(
        self,
        *,
        kind: str | None = None,
        repo: str | None = None,
        file: str | None = None,
        method: str | None = None,
        status: int | None = None,
    ) -> list[LogRecord]:
        """The records that have every given value. ``file`` may be a glob (``*.safetensors``)."""
        return [
            record
            for record in self.records
            if (kind is None or record.kind == kind)
            and (repo is None or record.repo == repo)
            and (file is None or fnmatchcase(record.file or "", file))
            and (method is None or record.method == method)
            and (status is None or record.status == status)
        ]

    def count(
        self,
        *,
        kind: str | None = None,
        repo: str | None = None,
        file: str | None = None,
        method: str | None = None,
        status: int | None = None,
    ) -> int:
        return len(self.select(kind=kind, repo=repo, file=file, method=method, status=status))

    def bytes_served(self, repo: str | None = None, path: str | None = None) -> int:
        """Bytes of repo files sent, by whatever door; ``path`` is one file or a glob."""
        return sum(
            record.bytes_sent
            for record in self.select(repo=repo, file=path)
            if record.kind in DOWNLOADS and record.status in (200, 206)
        )
