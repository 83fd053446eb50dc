"""Foreign errors end at one boundary: every one of them, as the right type, with advice."""

from __future__ import annotations

import errno
import inspect

import pytest
from huggingface_hub import errors as client
from huggingface_hub.errors import Response  # the HTTP library the client is built on
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hubdiff import errors
from hubdiff.errors import HubdiffError
from hubdiff.hub.translate import FOREIGN, Subject, translate, translated

SUBJECT = Subject("org/name", "https://hub/org/name", "v1", "config.json")

CLIENT_ERRORS = [
    value
    for value in vars(client).values()
    if inspect.isclass(value)
    and issubclass(value, Exception)
    and value.__module__ == client.__name__
]

# Everything else in huggingface_hub.errors is a plain HubError.
EXPECTED = {
    "RepositoryNotFoundError": errors.RepoNotFound,
    "GatedRepoError": errors.GatedRepo,
    "RevisionNotFoundError": errors.RevisionNotFound,
    "EntryNotFoundError": errors.RemoteFileNotFound,
    "RemoteEntryNotFoundError": errors.RemoteFileNotFound,
    "LocalEntryNotFoundError": errors.HubUnavailable,
    "IncompleteSnapshotError": errors.HubUnavailable,
    "OfflineModeIsEnabled": errors.HubUnavailable,
    "XetDownloadError": errors.HubUnavailable,
    "LocalTokenNotFoundError": errors.AuthError,
    "OIDCError": errors.AuthError,
    "DeviceCodeError": errors.AuthError,
    "HFValidationError": errors.RefError,
    "HfUriError": errors.RefError,
}


def answer(
    status: int, code: str | None = None, message: str | None = None, token: bool = False
) -> Response:
    """A response as the Hub sends it, without a Hub."""
    session = get_session()
    request = session.build_request("GET", "http://hub/api/models/org/name")
    if token:
        request.headers["authorization"] = "Bearer hf_x"
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return Response(
        status, headers={k: v for k, v in headers.items() if v}, request=request, content=b""
    )


def raised(
    status: int, code: str | None = None, message: str | None = None, token: bool = False
) -> client.HfHubHTTPError:
    """The client's own error for that response."""
    with pytest.raises(client.HfHubHTTPError) as caught:
        hf_raise_for_status(answer(status, code, message, token))
    return caught.value


def make(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind, "it failed")
    if isinstance(error, client.HfHubHTTPError):
        error.response = answer(418)
        error.server_message = None
    return error


def test_the_list_of_client_errors_is_not_empty() -> None:
    assert len(CLIENT_ERRORS) > 30
    assert set(EXPECTED) <= {kind.__name__ for kind in CLIENT_ERRORS}


@pytest.mark.parametrize("kind", CLIENT_ERRORS, ids=lambda kind: kind.__name__)
def test_every_client_error_is_translated(kind: type[Exception]) -> None:
    with pytest.raises(HubdiffError) as caught, translated(SUBJECT):
        raise make(kind)
    inherited = next(
        (EXPECTED[base.__name__] for base in kind.__mro__ if base.__name__ in EXPECTED), None
    )
    if issubclass(kind, client.HTTPError) and not issubclass(kind, client.HfHubHTTPError):
        inherited = errors.HubUnavailable  # a transport error, whatever its name
    assert type(caught.value) is (inherited or errors.HubError)
    assert caught.value.next_step
    assert "org/name" in str(caught.value) or "it failed" in str(caught.value)
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("kind", [OSError, RuntimeError, ValueError, ConnectionResetError])
def test_what_the_client_lets_through_is_translated(kind: type[Exception]) -> None:
    with pytest.raises(errors.HubError), translated(SUBJECT):
        raise kind("it failed")


def test_our_own_errors_pass_unchanged() -> None:
    own = errors.IntegrityError("bad bytes")
    with pytest.raises(errors.IntegrityError) as caught, translated(SUBJECT):
        raise own
    assert caught.value is own
    assert not issubclass(HubdiffError, FOREIGN)


@pytest.mark.parametrize(
    ("status", "code", "message", "kind", "says"),
    [
        (401, "RepoNotFound", None, errors.RepoNotFound, "no repo org/name"),
        (404, "RepoNotFound", None, errors.RepoNotFound, "no repo org/name"),
        (403, "GatedRepo", None, errors.GatedRepo, "gated"),
        (404, "RevisionNotFound", None, errors.RevisionNotFound, "'v1'"),
        (404, "EntryNotFound", None, errors.RemoteFileNotFound, "no config.json in org/name@v1"),
        (401, None, "Invalid credentials in Authorization header", errors.AuthError, "Invalid"),
        (403, None, "no write access", errors.AuthError, "no write access"),
        (409, None, "You already created it", errors.HubConflict, "already created"),
        (412, None, "stale", errors.HubConflict, "someone committed meanwhile"),
        (408, None, None, errors.HubUnavailable, "408"),
        (429, None, None, errors.HubUnavailable, "429"),
        (500, None, None, errors.HubUnavailable, "500"),
        (503, None, None, errors.HubUnavailable, "503"),
        (400, None, "bad field", errors.HubError, "bad field"),
        (404, None, "nothing here", errors.HubError, "nothing here"),
    ],
)
def test_answers_of_the_hub(
    status: int, code: str | None, message: str | None, kind: type[HubdiffError], says: str
) -> None:
    found = translate(raised(status, code, message), SUBJECT)
    assert type(found) is kind
    assert says in str(found)
    assert found.next_step


def test_advice_names_the_next_command_or_page() -> None:
    def advice(*args: object) -> str:
        return translate(raised(*args), SUBJECT).next_step or ""  # type: ignore[arg-type]

    assert "https://hub/org/name" in advice(403, "GatedRepo")
    assert "accept the terms" in advice(403, "GatedRepo")
    assert "hf auth login" in advice(401, "RepoNotFound")
    assert "hf auth login" in advice(401, None, "Invalid credentials in Authorization header")
    assert "Run the same again" in advice(412)


def test_a_missing_repo_says_whether_a_token_was_sent() -> None:
    assert "no token was sent" in str(translate(raised(401, "RepoNotFound"), SUBJECT))
    with_token = raised(404, "RepoNotFound", token=True)
    assert "may not see it" in str(translate(with_token, SUBJECT))


def test_the_cause_is_what_counts() -> None:
    outer = client.LocalEntryNotFoundError("check your connection")
    outer.__cause__ = client.OfflineModeIsEnabled("offline")
    assert "HF_HUB_OFFLINE" in str(translate(outer, SUBJECT))
    outer.__cause__ = raised(503)
    assert "503" in str(translate(outer, SUBJECT))
    upload = RuntimeError("Error while uploading")
    upload.__cause__ = raised(403, None, "quota")
    assert type(translate(upload, SUBJECT)) is errors.AuthError


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("IO error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_called_that(error: Exception) -> None:
    found = translate(error, SUBJECT)
    assert type(found) is errors.DiskFull
    assert "HF_HOME" in (found.next_step or "")


def test_a_file_that_may_not_be_read_is_no_matter_of_tokens() -> None:
    local = PermissionError(errno.EACCES, "Permission denied", "/cache/x")
    assert type(translate(local, SUBJECT)) is errors.HubError
    assert type(translate(PermissionError("xet token refused"), SUBJECT)) is errors.AuthError


def test_what_the_xet_client_was_refused_is_a_matter_of_tokens() -> None:
    said = "Network error: Request error: HTTP status client error ({}), domain: http://hub/x"
    for status in ("401 Unauthorized", "403 Forbidden"):
        refused = ConnectionError(said.format(status))
        assert type(translate(refused, SUBJECT)) is errors.AuthError
    other = ConnectionError(said.format("404 Not Found"))
    assert type(translate(other, SUBJECT)) is errors.HubUnavailable


def test_headers_of_the_client_carry_no_secret_into_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" in str(build_hf_headers())
    found = translate(raised(403, None, "no"), SUBJECT)
    assert "hf_secret" not in f"{found} {found.next_step}"
