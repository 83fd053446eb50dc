"""How hubdiff asks the Hub: endpoint, client, one-call questions about a repo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from hubdiff._version import __version__
from hubdiff.facts import RepoFacts, facts_from
from hubdiff.hub.retry import retrying
from hubdiff.hub.translate import Subject, translated
from hubdiff.refs import PinnedRef


def endpoint() -> str:
    """The Hub's address. ``huggingface_hub`` reads ``HF_ENDPOINT`` once, on import; here it counts
    at the time of the call."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def api() -> HfApi:
    """A client for the current endpoint; it looks the token up at each call."""
    return HfApi(endpoint=endpoint(), library_name="hubdiff", library_version=__version__)


def subject(repo: str, revision: str | None = None, path: str | None = None) -> Subject:
    return Subject(repo=repo, url=f"{endpoint()}/{repo}", revision=revision, path=path)


def model_info(repo: str, revision: str | None) -> ModelInfo:
    with translated(subject(repo, revision)):
        return retrying(lambda: api().model_info(repo, revision=revision))


def repo_facts(pin: PinnedRef) -> RepoFacts:
    """Licence, gating, base model and tags of a Hub repo, from the card at the pinned commit."""
    assert pin.repo is not None, "a folder's facts are read from its card"
    info = model_info(pin.repo, pin.commit)
    return facts_from(
        info.card_data.to_dict() if info.card_data else {},
        gated=bool(info.gated),
        private=bool(info.private),
        tags=tuple(info.tags or ()),
    )


def home() -> Path:
    """The folder in which the Hub client keeps what it has on this machine."""
    return Path(os.environ.get("HF_HOME", constants.HF_HOME))


def require_token() -> None:
    """Raise ``AuthError`` now when there is no token, or a bad one, not after hours of work."""
    with translated(subject("")):
        retrying(lambda: api().whoami())


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the client's own: what is printed is the command line's business."""
    if are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
