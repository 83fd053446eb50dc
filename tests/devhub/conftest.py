"""The loopback Hub that these tests judge, and three ways to talk to it.

``alice``, ``bob``, ``stranger`` are official clients in this process; ``run_client`` runs a script
with the official client in a process of its own, where the transport (xet or not) can be chosen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import count

import httpx2
import pytest
from huggingface_hub import HfApi

from hubdiff.devhub import DevHub

USERS = {"alice": "hf_alice", "bob": "hf_bob"}
PART_BYTES = 300_000
PAGE_SIZE = 4

RunClient = Callable[..., str]

_numbers = count()


@pytest.fixture(scope="session")
def _hub() -> Iterator[DevHub]:
    orgs = {"team": ["alice"]}
    with DevHub(users=USERS, orgs=orgs, part_bytes=PART_BYTES, page_size=PAGE_SIZE) as hub:
        yield hub


@pytest.fixture
def hub(_hub: DevHub) -> DevHub:
    _hub.log.clear()
    _hub.faults.clear()
    return _hub


@pytest.fixture
def alice(hub: DevHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_alice")


@pytest.fixture
def bob(hub: DevHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_bob")


@pytest.fixture
def stranger(hub: DevHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def repo(alice: HfApi) -> str:
    """A fresh, empty repo of alice's."""
    name = f"alice/judged-{next(_numbers)}"
    alice.create_repo(name)
    return name


@pytest.fixture
def http(hub: DevHub) -> Iterator[httpx2.Client]:
    """Requests as no official client would send them. Redirects are not followed."""
    with httpx2.Client(base_url=hub.url, trust_env=False) as client:
        yield client


@pytest.fixture
def run_client() -> RunClient:
    def run(hub: DevHub, script: str, *arguments: object, user: str = "alice", xet: bool) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            env=os.environ | hub.environment(user, xet=xet),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
