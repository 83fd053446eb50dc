"""Fixtures every test may use. No test reaches the real Hub, the user's token or the user's cache.

``devhub`` is a loopback Hub with a clean request log, and this process is its user ``demo``;
``put_repo`` uploads files to a fresh repo there with the official client, as a stranger would.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# CI tries the same examples every time: what lands must not depend on luck. Run by hand, each run
# tries new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("by hand", deadline=None)  # no test fails because a machine is busy
settings.load_profile("ci" if os.environ.get("CI") else "by hand")

# torch's threads wait for each other in a loop, which takes the core from the one waited for where
# several processes share the cores. Read when torch is imported, here and by what tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# huggingface_hub reads these once, when it is imported: before anything else here.
_HOME = tempfile.mkdtemp(prefix="hubdiff-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    if _name != "HF_HUB_DISABLE_XET":
        del os.environ[_name]
os.environ["HF_HOME"] = _HOME
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NO_PROXY"] = "127.0.0.1"
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody answers there

from huggingface_hub import CommitOperationAdd, HfApi  # noqa: E402

from hubdiff.devhub import DevHub  # noqa: E402
from hubdiff.picture import layer_picture  # noqa: E402

if TYPE_CHECKING:
    from backport_world import World

PutRepo = Callable[..., str]

_numbers = count()

# A minute and more each: begun last, one of them would keep one process busy alone at the end.
_LONG = (
    "test_act.py",
    "test_evaluate.py",
    "test_promises.py",
    "test_recycle.py",
    "test_ranks.py",
    "test_connectivity.py",
    "test_finetune.py",
    "test_delta_battery.py",
    "test_backport_end.py",
    "test_watch.py",
    "test_publish.py",
    "test_compare.py",
    "test_extras.py",
    "test_record.py",
    "test_hub_jobs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the others in the order they were in."""
    place = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """What was imported by now stays. Garbage is collected after each model, and to look through
    all of torch and transformers takes a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_picture() -> Iterator[None]:
    """No picture on the cards of deltas made in this process: to draw it takes longer than all the
    rest of a small push."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hubdiff.jobs.making.layer_picture", lambda tensors, file: None)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn all the same, for what is compared with another process's."""
    monkeypatch.setattr("hubdiff.jobs.making.layer_picture", layer_picture)


@pytest.fixture(scope="session")
def _server() -> Iterator[DevHub]:
    users = {"demo": "hf_demo", "other": "hf_other"}
    with DevHub(users=users, orgs={"org": ["demo"]}) as hub:
        yield hub


@pytest.fixture
def devhub(_server: DevHub, monkeypatch: pytest.MonkeyPatch) -> DevHub:
    _server.log.clear()
    _server.faults.clear()
    monkeypatch.setenv("HF_ENDPOINT", _server.url)
    monkeypatch.setenv("HF_TOKEN", _server.token("demo"))
    return _server


@pytest.fixture
def new_name(devhub: DevHub) -> Callable[[], str]:
    """Names of repos that don't exist yet, in a namespace that ``demo`` may write to."""
    return lambda: f"org/repo-{next(_numbers)}"


@pytest.fixture
def put_repo(devhub: DevHub, new_name: Callable[[], str]) -> PutRepo:
    """Upload ``{path: bytes}`` to a repo (a fresh one unless named); its name. The log is cleared
    after: what a test finds there is what it did itself."""

    def put(files: Mapping[str, bytes], repo: str | None = None, *, private: bool = False) -> str:
        repo = repo or new_name()
        api = HfApi(endpoint=devhub.url, token=devhub.token("demo"))
        api.create_repo(repo, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(path, data) for path, data in files.items()]
        api.create_commit(repo, operations, commit_message="put")
        devhub.log.clear()
        return repo

    return put


@pytest.fixture
def world(
    devhub: DevHub, family: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """A user's world for the backport stages, of the base, tuned model and delta that the module's
    ``family`` makes."""
    from backport_world import worlds  # brings torch: not for tests that do without

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield from worlds(devhub, family, tmp_path)
