"""Faults on demand: what a network and a busy server do to a client, when a test asks for it.

A fault is armed with ``add`` and fires ``times`` times, on requests whose raw path (with its
query) contains ``match``, or matches it as a glob. The last three kinds break a body; an answer
that ends before ``after_bytes``, a redirect or the answer to HEAD for one, passes them by.

``500`` ``502`` ``503`` ``504``  that status, before the request is looked at
``429``      the same, with ``Retry-After: retry_after``
``reset``    the connection is reset after ``after_bytes`` bytes of the body
``short``    the connection is closed in good order after ``after_bytes`` bytes: fewer than promised
``corrupt``  the byte at ``after_bytes`` has its bits flipped; the length is right
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

STATUSES = ("429", "500", "502", "503", "504")
BODY_FAULTS = ("reset", "short", "corrupt")


@dataclass
class Fault:
    kind: str
    match: str
    times: int
    after_bytes: int
    retry_after: float
    method: str | None
    fired: int = field(default=0)

    def applies(self, method: str, path: str) -> bool:
        if self.fired >= self.times or (self.method is not None and self.method != method):
            return False
        return self.match in path or fnmatchcase(path, self.match)


class Faults:
    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(
        self,
        kind: str,
        match: str = "*",
        times: int = 1,
        *,
        after_bytes: int = 0,
        retry_after: float = 0,
        method: str | None = None,
    ) -> Fault:
        if kind not in STATUSES + BODY_FAULTS:
            raise ValueError(f"unknown fault {kind!r}: one of {', '.join(STATUSES + BODY_FAULTS)}")
        fault = Fault(kind, match, times, after_bytes, retry_after, method)
        with self._lock:
            self._faults.append(fault)
        return fault

    def find(self, kinds: tuple[str, ...], method: str, path: str) -> Fault | None:
        """The fault of one of these kinds that waits for this request."""
        with self._lock:
            for fault in self._faults:
                if fault.kind in kinds and fault.applies(method, path):
                    return fault
        return None

    def fire(self, fault: Fault) -> bool:
        """Use the fault up by one; False if another request was faster."""
        with self._lock:
            fault.fired += 1
            return fault.fired <= fault.times

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
