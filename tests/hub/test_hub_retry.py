"""What is asked again, how often, and after how long."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, Response
from huggingface_hub.utils import get_session

from hubdiff.hub import retry
from hubdiff.hub.retry import BrokenAnswer, retrying


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept."""
    found: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    return found


def status(code: int, **headers: str) -> HfHubHTTPError:
    request = get_session().build_request("GET", "http://hub/x")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HfHubHTTPError("no", response=Response(code, headers=named, request=request))


class Failing:
    """Raises each error once, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


CLOSED = RuntimeError("Cannot send a request, as the client has been closed.")


@pytest.mark.parametrize(
    "error",
    [*map(status, [408, 429, 500, 502, 503, 504]), HTTPError("reset"), BrokenAnswer("x"), CLOSED],
    ids=str,
)
def test_what_may_pass_is_tried_again(error: Exception, waits: list[float]) -> None:
    action = Failing(error, error)
    assert retrying(action) == "done"
    assert action.calls == 3
    assert len(waits) == 2


@pytest.mark.parametrize(
    "error",
    [
        *map(status, [400, 401, 403, 404, 409, 412, 416]),
        OfflineModeIsEnabled("x"),
        RuntimeError("x"),
    ],
    ids=repr,
)
def test_what_will_not_pass_goes_up_at_once(error: Exception, waits: list[float]) -> None:
    action = Failing(error)
    with pytest.raises(type(error)):
        retrying(action)
    assert action.calls == 1
    assert waits == []


def test_the_last_error_goes_up_when_the_tries_are_used_up(waits: list[float]) -> None:
    action = Failing(*[status(503)] * 99)
    with pytest.raises(HfHubHTTPError):
        retrying(action)
    assert action.calls == 1 + retry.RETRIES


def test_waits_double_with_jitter(waits: list[float]) -> None:
    retrying(Failing(*[status(500)] * retry.RETRIES))
    for attempt, wait in enumerate(waits):
        middle = retry.BACKOFF_SECONDS * 2**attempt
        assert middle / 2 <= wait <= middle * 1.5
    assert len(set(waits)) == retry.RETRIES


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (status(429, Retry_After="7"), 7),
        (status(503, Retry_After="3"), 3),
        (status(429, RateLimit='"resolvers";r=0;t=55'), 55),
        (status(429, Retry_After="86400"), retry.MAX_WAIT_SECONDS),
    ],
)
def test_a_server_that_names_the_wait_is_obeyed(
    error: Exception, seconds: float, waits: list[float]
) -> None:
    retrying(Failing(error))
    assert waits == [seconds]
