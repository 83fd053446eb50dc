"""When to ask the Hub again, and how long to wait before.

Asked again: 408, 429, 5xx, connections that fail or break, answers that are not what was asked. The
wait doubles each time, with jitter so that several readers don't come back at the same moment; a
server that says how long to wait is obeyed. After ``RETRIES`` repeats the error goes up.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import parse_ratelimit_headers

from hubdiff.errors import HubUnavailable
from hubdiff.hub.translate import TRY_LATER

RETRIES = 5
BACKOFF_SECONDS = 0.5
# The Hub counts requests in windows of five minutes: nothing it may ask for is longer.
MAX_WAIT_SECONDS = 300.0

_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}

T = TypeVar("T")


class BrokenAnswer(HubUnavailable):
    """An answer that is not what was asked: another range, too few bytes, too many."""

    def __init__(self, message: str) -> None:
        super().__init__(message, next_step=TRY_LATER)


def retrying(action: Callable[[], T]) -> T:
    """The result of ``action``, tried up to ``1 + RETRIES`` times. It must be safe to repeat."""
    for attempt in range(RETRIES):
        try:
            return action()
        except (HTTPError, RuntimeError, BrokenAnswer) as error:
            if not _is_transient(error):
                raise
            time.sleep(_wait_seconds(attempt, error))
    return action()


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUS
    if isinstance(error, RuntimeError):
        # Another thread met a connection error, and the client closed the session they share.
        return "client has been closed" in str(error)
    return True


def _wait_seconds(attempt: int, error: Exception) -> float:
    asked = _asked_wait(error)
    if asked is not None:
        return min(asked, MAX_WAIT_SECONDS)
    return float(BACKOFF_SECONDS * 2**attempt * random.uniform(0.5, 1.5))


def _asked_wait(error: Exception) -> float | None:
    """Seconds the server asked to wait for, if it did."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    after = headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    limit = parse_ratelimit_headers(headers) if error.response.status_code == 429 else None
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None
