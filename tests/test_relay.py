"""templates/jobs/relay.py: an event of the Hub becomes a dispatch at GitHub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from github_fake import TOKEN, GitHubFake

SCRIPT = Path(__file__).parents[1] / "templates" / "jobs" / "relay.py"
SECRET = "it is me"


@pytest.fixture
def github() -> Iterator[GitHubFake]:
    with GitHubFake() as running:
        yield running


def event(**changes: Any) -> dict[str, Any]:
    """As the Hub sends it when files of a model change; ``changes`` by path, ``repo__name``."""
    made: dict[str, Any] = {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {
            "type": "model",
            "name": "org/base-2",
            "id": "65a",
            "private": False,
            "headSha": "c" * 40,
            "url": {"web": "https://huggingface.co/org/base-2"},
        },
        "updatedRefs": [{"ref": "refs/heads/main", "oldSha": "b" * 40, "newSha": "c" * 40}],
        "webhook": {"id": "64f", "version": 3},
    }
    for path, value in changes.items():
        *where, last = path.split("__")
        place = made
        for key in where:
            place = place[key]
        place[last] = value
    return made


def run(
    github: GitHubFake, payload: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The script in a process; what is "" is not set."""
    text = payload if isinstance(payload, str) else json.dumps(payload)
    given = {
        "GITHUB_API_URL": github.url,
        "GITHUB_REPOSITORY": "acme/models",
        "GITHUB_TOKEN": TOKEN,
        "HUBDIFF_WEBHOOK_SECRET": SECRET,
        "NO_PROXY": "127.0.0.1",
        "PATH": os.environ["PATH"],
        "WEBHOOK_PAYLOAD": text,
        "WEBHOOK_SECRET": SECRET,
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-I", str(SCRIPT)],
        env={name: value for name, value in given.items() if value},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_changed_model_is_sent_on_by_name_alone(github):
    done = run(github, event())
    assert done.returncode == 0, done.stderr
    assert done.stdout == "told acme/models to look at org/base-2\n"
    assert github.dispatches == [
        ("acme/models", {"event_type": "hubdiff", "client_payload": {"base": "org/base-2"}})
    ]
    (asked,) = github.asked
    assert asked.headers["accept"] == "application/vnd.github+json"


def test_a_new_model_is_sent_on_too(github):
    done = run(github, event(event__action="create", event__scope="repo", updatedRefs=None))
    assert done.returncode == 0, done.stderr
    assert len(github.dispatches) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"repo__type": "dataset"},
        {"event__scope": "discussion"},
        {"event__scope": "discussion.comment"},
        {"event__scope": "repo.config"},
        {"event__action": "delete"},
        {"updatedRefs": [{"ref": "refs/pr/1", "newSha": "c" * 40}]},
        {"updatedRefs": [{"ref": "refs/tags/v1", "newSha": "c" * 40}]},
    ],
)
def test_what_changes_no_model_is_not_sent_on(github, changes):
    done = run(github, event(**changes))
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert github.asked == []


@pytest.mark.parametrize("secret", ["", "it is not me", "it is me "])
def test_without_the_secret_nobody_is_believed(github, secret):
    done = run(github, event(), WEBHOOK_SECRET=secret)
    assert done.returncode == 1
    assert "secret" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert github.asked == []


def test_a_relay_without_a_secret_of_its_own_believes_nobody(github):
    done = run(github, event(), HUBDIFF_WEBHOOK_SECRET="", WEBHOOK_SECRET="")
    assert done.returncode == 1
    assert "HUBDIFF_WEBHOOK_SECRET" in done.stderr
    assert github.asked == []


@pytest.mark.parametrize(
    "payload",
    [
        "no JSON",
        "[]",
        "{}",
        "null",
        "[" * 100_000,
        event(repo="org/base"),
        event(event="update"),
        event(repo__name=None),
        event(repo__name="org/base/../../etc"),
        event(repo__name="org/base\n"),
        event(repo__name="$(touch x)/y"),
        event(repo__name=f"{'o' * 200}/base"),
    ],
)
def test_what_is_no_event_is_refused(github, payload):
    done = run(github, payload)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert github.asked == []


def test_the_first_run_has_no_event_and_is_ready(github):
    done = run(github, "")
    assert done.returncode == 0, done.stderr
    assert "ready" in done.stdout


@pytest.mark.parametrize("name", ["GITHUB_TOKEN", "GITHUB_REPOSITORY"])
def test_a_missing_setting_is_named(github, name):
    done = run(github, event(), **{name: ""})
    assert done.returncode == 1
    assert name in done.stderr


def test_what_github_refuses_fails_the_job_and_shows_no_token(github):
    done = run(github, event(), GITHUB_TOKEN="stolen")
    assert done.returncode == 1
    assert "401" in done.stderr
    assert "stolen" not in done.stderr + done.stdout


def test_a_github_that_cannot_be_reached_fails_the_job(github):
    done = run(github, event(), GITHUB_API_URL="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "can't be reached" in done.stderr


def test_it_needs_nothing_but_python(github):
    head = SCRIPT.read_text().split("# ///")[1]
    assert "dependencies = []" in head
