# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""A webhook of the Hub, relayed to GitHub: the workflow `hubdiff` looks at a base when it changes.

GitHub takes events only with a token and in a form of its own, so a webhook can't call it. This
script runs as a Job of the Hub, once for each event. The event is a hint and nothing more: only the
name of the repo is sent on, and the workflow looks for itself what is new there.

    hf jobs uv run relay.py                 # once, without an event: says that it is ready
    hf webhooks create --job-id ID --watch org:your-org --domain repo --secret SECRET \\
        --secrets GITHUB_TOKEN --secrets GITHUB_REPOSITORY --secrets HUBDIFF_WEBHOOK_SECRET

GITHUB_REPOSITORY        owner/name of the repository with the workflow
GITHUB_TOKEN             a fine-grained token for that repository alone, with Contents: write
                         (that is what GitHub asks for to send it an event)
HUBDIFF_WEBHOOK_SECRET   SECRET again, to tell the webhook's events from anybody's
WEBHOOK_PAYLOAD, WEBHOOK_SECRET   set by the Hub
"""

from __future__ import annotations

import hmac
import json
import os
import re
import sys
import urllib.error
import urllib.request
from typing import Any

EVENT = "hubdiff"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,96}/[A-Za-z0-9_.-]{1,96}")
_SECONDS = 30


class Refused(Exception):
    """Why nothing was sent."""


def changed_base(payload: str) -> str | None:
    """The model whose files changed, by the JSON of an event; None: it is about something else.
    Raises ``Refused`` for what is no event at all."""
    try:
        event = json.loads(payload)
        repo, what = event["repo"], event["event"]
        kind, name, scope = repo["type"], repo["name"], what["scope"]
        action, refs = what["action"], event.get("updatedRefs")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"the payload is no event of the Hub: {error!r}") from error
    if kind != "model" or action not in ("create", "update") or not _of_files(scope):
        return None
    # Pull requests and tags change nothing that is watched.
    if isinstance(refs, list) and refs and not any(_is_branch(ref) for ref in refs):
        return None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Refused(f"{name!r} is not the name of a repo")
    return name


def _of_files(scope: Any) -> bool:
    return isinstance(scope, str) and (scope == "repo" or scope.startswith("repo.content"))


def _is_branch(ref: Any) -> bool:
    return isinstance(ref, dict) and str(ref.get("ref")).startswith("refs/heads/")


def check_secret(environment: dict[str, str]) -> None:
    """Raises ``Refused`` where the event is not from the webhook that this was set up for."""
    ours, theirs = (
        environment.get(name, "").encode() for name in ("HUBDIFF_WEBHOOK_SECRET", "WEBHOOK_SECRET")
    )
    if not ours:
        raise Refused("HUBDIFF_WEBHOOK_SECRET is not set, and anybody's event would be believed")
    if not hmac.compare_digest(ours, theirs):
        raise Refused("the event does not carry the secret of the webhook")


def request(base: str, environment: dict[str, str]) -> urllib.request.Request:
    """What tells GitHub to look at ``base``. Raises ``Refused`` where a setting is missing."""
    repository, token = (environment.get(f"GITHUB_{n}", "") for n in ("REPOSITORY", "TOKEN"))
    if not _NAME.fullmatch(repository):
        raise Refused("GITHUB_REPOSITORY must be owner/name")
    if not token:
        raise Refused("GITHUB_TOKEN is not set")
    api = environment.get("GITHUB_API_URL", "https://api.github.com").rstrip("/")
    return urllib.request.Request(
        f"{api}/repos/{repository}/dispatches",
        data=json.dumps({"event_type": EVENT, "client_payload": {"base": base}}).encode(),
        headers={
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/json",
            "User-Agent": "hubdiff-relay",
            "X-GitHub-Api-Version": "2022-11-28",
        },
        method="POST",
    )


def relay(environment: dict[str, str]) -> str:
    """Send the event of ``environment`` on; what was done, in words. Raises ``Refused``."""
    payload = environment.get("WEBHOOK_PAYLOAD")
    if payload is None:
        return "ready: make a webhook that starts this job"
    check_secret(environment)
    base = changed_base(payload)
    if base is None:
        return "nothing to do: the event is not about a model's files"
    try:
        with urllib.request.urlopen(request(base, environment), timeout=_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        raise Refused(f"GitHub said {error.code}: {error.reason}") from error
    except OSError as error:
        raise Refused(f"GitHub can't be reached: {error}") from error
    return f"told {environment['GITHUB_REPOSITORY']} to look at {base}"


def main() -> int:
    try:
        print(relay(dict(os.environ)))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
