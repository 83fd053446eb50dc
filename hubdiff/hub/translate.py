"""The boundary where foreign errors end: what the Hub's client raises becomes a hubdiff error that
names the repo, the revision or the file, and says what to do next.

``FOREIGN`` holds every exception class of ``huggingface_hub.errors``, the ones it will gain later
too, and the built-in ones its calls let through.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import errors as client

from hubdiff.errors import (
    AuthError,
    DiskFull,
    GatedRepo,
    HubConflict,
    HubdiffError,
    HubError,
    HubUnavailable,
    RefError,
    RemoteFileNotFound,
    RepoNotFound,
    RevisionNotFound,
)

FOREIGN: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    ValueError,
    *(
        value
        for value in vars(client).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ),
)

LOGIN = "Run `hf auth login` with a token of an account that has access, then run again."
TRY_LATER = "Check the connection and https://status.huggingface.co, then run the same again."


@dataclass(frozen=True)
class Subject:
    """What a call is about, for its error message. ``url`` is the repo's page."""

    repo: str
    url: str
    revision: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        repo = f"{self.repo}@{self.revision}" if self.revision else self.repo or "the Hub"
        return f"{self.path} in {repo}" if self.path else repo


@contextmanager
def translated(subject: Subject) -> Iterator[None]:
    """Turn every foreign error of the block into a hubdiff error about ``subject``."""
    try:
        yield
    except FOREIGN as error:
        raise translate(error, subject) from error


def translate(error: Exception, subject: Subject) -> HubdiffError:
    """The hubdiff error for a foreign one; its type comes from the first error along the chain of
    causes that says more than that something went wrong."""
    link: BaseException | None = error
    while link is not None:
        for kind, build in _TABLE:
            if isinstance(link, kind):
                found = build(link, subject)
                if found is not None:
                    return found
        link = link.__cause__
    if isinstance(error, client.LocalEntryNotFoundError):
        return _unreachable(error, subject)
    return _plain(error, subject)


def _plain(error: BaseException, subject: Subject) -> HubdiffError:
    return HubError(
        f"{subject}: {_said(error)}",
        next_step=f"Look at {subject.url}; run again with HF_DEBUG=1 to see the requests.",
    )


def _said(error: BaseException) -> str:
    """What the server said, or the first line of what the client says about it."""
    message = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(str(message).split("\n\n")[0].split())


def _gated(error: BaseException, subject: Subject) -> HubdiffError:
    return GatedRepo(
        f"{subject} is gated: its owner asks you to accept terms before you may read its files",
        next_step=f"Open {subject.url}, accept the terms, run `hf auth login` with a token of the "
        "same account, then run again.",
    )


def _no_repo(error: BaseException, subject: Subject) -> HubdiffError:
    response = getattr(error, "response", None)
    sent = response is not None and "authorization" in response.request.headers
    who = "the token in use may not see it" if sent else "no token was sent"
    return RepoNotFound(
        f"there is no repo {subject.repo}, or it is private and {who}",
        next_step="Check the name. " + LOGIN,
    )


def _no_revision(error: BaseException, subject: Subject) -> HubdiffError:
    return RevisionNotFound(
        f"{subject.repo} has no branch, tag or commit {subject.revision or 'main'!r}",
        next_step=f"Pick one that {subject.url}/tree/main lists.",
    )


def _no_file(error: BaseException, subject: Subject) -> HubdiffError | None:
    if isinstance(error, client.LocalEntryNotFoundError):
        return None  # Not in the cache because the Hub was not reached: the cause says why.
    return RemoteFileNotFound(
        f"there is no {subject}" if subject.path else f"{subject}: {_said(error)}",
        next_step=f"Look at its files: {subject.url}/tree/{subject.revision or 'main'}.",
    )


def _auth(error: BaseException, subject: Subject) -> HubdiffError:
    return AuthError(f"{subject}: {_said(error)}", next_step=LOGIN)


def _no_token(error: BaseException, subject: Subject) -> HubdiffError:
    return AuthError(f"{subject} asks for a token, and there is none here", next_step=LOGIN)


def _denied(error: BaseException, subject: Subject) -> HubdiffError | None:
    # The xet client has no other word for a token that was refused; a local file has a name.
    return None if getattr(error, "filename", None) else _auth(error, subject)


# The xet client is not Python: what the Hub answered it is in the text of a connection error.
_XET_DENIED = re.compile(r"HTTP status client error \((401|403)\b")


def _xet_denied(error: BaseException, subject: Subject) -> HubdiffError | None:
    return _auth(error, subject) if _XET_DENIED.search(str(error)) else None


def _offline(error: BaseException, subject: Subject) -> HubdiffError:
    return HubUnavailable(
        f"{subject} is not in the local cache, and HF_HUB_OFFLINE forbids asking the Hub",
        next_step="Unset HF_HUB_OFFLINE, or give the path of a folder that holds the files.",
    )


def _unreachable(error: BaseException, subject: Subject) -> HubdiffError:
    return HubUnavailable(
        f"{subject}: {subject.url} can't be reached: {_said(error)}", next_step=TRY_LATER
    )


def _bad_name(error: BaseException, subject: Subject) -> HubdiffError:
    return RefError(_said(error), next_step='Write "org/name".')


def _copy_failed(error: BaseException, subject: Subject) -> HubdiffError:
    return HubError(
        f"{subject}: the Hub could not copy a file into it: {_said(error)}",
        next_step="Both repos must be in one storage region; if they are not, write to a folder "
        "with --output and upload that.",
    )


def _disk(error: BaseException, subject: Subject) -> HubdiffError | None:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # The xet client is not Python: it reports the same condition as text.
    if not full and "No space left on device" not in str(error):
        return None
    return DiskFull(
        f"no room left on the disk while fetching {subject}",
        next_step="Free some space, or point HF_HOME at a larger disk; `hf cache` shows what can "
        "go.",
    )


def _status(error: BaseException, subject: Subject) -> HubdiffError:
    assert isinstance(error, client.HfHubHTTPError)
    status = error.response.status_code
    if status in (401, 403):
        return _auth(error, subject)
    if status == 409:
        return HubConflict(
            f"{subject}: {_said(error)}",
            next_step="Something of that name exists, or someone committed at the same moment: "
            f"look at {subject.url}, then run again.",
        )
    if status == 412:
        return HubConflict(
            f"{subject}: someone committed meanwhile; nothing was changed",
            next_step="Run the same again: it starts from the new commit.",
        )
    if status in (408, 429) or status >= 500:
        return HubUnavailable(
            f"{subject}: the Hub still answers {status} after several tries: {_said(error)}",
            next_step=TRY_LATER,
        )
    return HubError(
        f"{subject}: the Hub answers {status}: {_said(error)}",
        next_step=f"Look at {subject.url}.",
    )


_Build = Callable[[BaseException, Subject], "HubdiffError | None"]

# The first match wins: a class stands before the classes it derives from.
_TABLE: list[tuple[Any, _Build]] = [
    (client.GatedRepoError, _gated),
    (client.RepositoryNotFoundError, _no_repo),
    (client.RevisionNotFoundError, _no_revision),
    (client.EntryNotFoundError, _no_file),
    (client.OfflineModeIsEnabled, _offline),
    (client.LocalTokenNotFoundError, _no_token),
    ((client.OIDCError, client.DeviceCodeError), _auth),
    ((client.HFValidationError, client.HfUriError), _bad_name),
    (client.FileDuplicationError, _copy_failed),
    (client.HfHubHTTPError, _status),
    (client.XetDownloadError, _unreachable),
    # Its message names the file at fault; its cause is only the answer behind it.
    (ValueError, _plain),
    (Exception, _disk),
    (PermissionError, _denied),
    (Exception, _xet_denied),
    (client.HTTPError, _unreachable),
    (ConnectionError, _unreachable),
]
