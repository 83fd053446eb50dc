"""Reading repos: what is listed, how few requests it takes, and what happens when things break."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import get_session

from hubdiff import errors
from hubdiff.devhub import DevHub
from hubdiff.errors import HubdiffError
from hubdiff.facts import facts
from hubdiff.files import FileInfo, LocalReader, open_tree
from hubdiff.hub import HubTree, retry
from hubdiff.refs import ModelRef

PutRepo = Callable[..., str]

WEIGHTS = os.urandom(3_000_000)
CONFIG = b'{"model_type": "llama"}'
FILES = {"model.safetensors": WEIGHTS, "config.json": CONFIG, "a/b c/ü.json": b"{}"}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.001)


def tree_of(repo: str, *, cache: bool = False) -> HubTree:
    return HubTree(ModelRef.parse(repo), cache=cache)


def read(tree: HubTree, path: str, offset: int, count: int) -> bytes:
    with tree.open(path) as reader:
        buffer = bytearray(count)
        reader.read_into(offset, memoryview(buffer))
        return bytes(buffer)


def test_lists_sizes_and_the_sha256_of_large_files(put_repo: PutRepo) -> None:
    files = tree_of(put_repo(FILES)).files()
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert files["model.safetensors"] == FileInfo("model.safetensors", len(WEIGHTS), sha256)
    assert files["config.json"] == FileInfo("config.json", len(CONFIG), None)
    assert set(files) == {*FILES, ".gitattributes"}


def test_listing_asks_once(put_repo: PutRepo, devhub: DevHub) -> None:
    tree = tree_of(put_repo({f"{n}.txt": b"" for n in range(150)}))  # two pages
    for _ in range(3):
        assert len(tree.files()) == 151
    assert len([record for record in devhub.log if "/tree/" in record.path]) == 2


def test_a_tree_stays_at_its_commit(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo({"config.json": b"old"})
    tree = tree_of(repo)
    put_repo({"config.json": b"new", "more.json": b""}, repo)
    assert tree.read_bytes("config.json") == b"old"
    assert "more.json" not in tree.files()
    pinned = tree_of(str(tree.pin))
    assert pinned.pin.commit == tree.pin.commit
    assert pinned.read_bytes("config.json") == b"old"
    assert tree_of(repo).read_bytes("config.json") == b"new"


@pytest.mark.parametrize("revision", ["main", "v1", "dev/x", "refs/pr/1"])
def test_revisions_are_pinned(put_repo: PutRepo, devhub: DevHub, revision: str) -> None:
    repo = put_repo({"config.json": b"1"})
    api = HfApi(endpoint=devhub.url, token=devhub.token())
    api.create_tag(repo, tag="v1")
    api.create_branch(repo, branch="dev/x")
    api.create_pull_request(repo, title="draft")
    head = api.model_info(repo).sha
    tree = tree_of(f"{repo}@{revision}")
    assert len(tree.pin.commit or "") == 40
    if revision != "refs/pr/1":
        assert tree.pin.commit == head
    assert tree.read_bytes("config.json") == b"1"


def test_reads_exactly_the_bytes_asked_for_and_resolves_once(
    put_repo: PutRepo, devhub: DevHub
) -> None:
    repo = put_repo(FILES)
    tree = tree_of(repo)
    spans = [(0, 8), (8, 1000), (1_000_000, 65_536), (len(WEIGHTS) - 1, 1)] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda span: read(tree, "model.safetensors", *span), spans))
    assert found == [WEIGHTS[at : at + count] for at, count in spans]
    assert devhub.log.count(kind="resolve", repo=repo) == 1
    assert devhub.log.count(kind="data", repo=repo) == len(spans)
    assert devhub.log.bytes_served(repo) == sum(count for _, count in spans)


def test_the_token_never_goes_to_storage(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo(FILES, private=True)
    tree = tree_of(repo)
    seen: list[tuple[str, bool]] = []
    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {
        "request": [lambda r: seen.append((r.url.path, "authorization" in r.headers))]
    }
    try:
        assert read(tree, "model.safetensors", 0, 8) == WEIGHTS[:8]
        assert tree.read_bytes("config.json") == CONFIG
    finally:
        session.event_hooks = hooks
    assert any("/cdn-files/" in path for path, _ in seen)
    for path, with_token in seen:
        assert with_token == ("/cdn-files/" not in path), path


def test_a_small_file_is_one_request(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo(FILES)
    tree = tree_of(repo)
    tree.files()
    devhub.log.clear()
    assert tree.read_bytes("config.json") == CONFIG
    assert tree.read_bytes("a/b c/ü.json") == b"{}"
    assert len(devhub.log) == 2


def test_an_expired_address_is_resolved_anew(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo(FILES)
    tree = tree_of(repo)
    assert read(tree, "model.safetensors", 0, 8) == WEIGHTS[:8]
    devhub.expire_urls()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: read(tree, "model.safetensors", at, 8), range(8)))
    assert found == [WEIGHTS[at : at + 8] for at in range(8)]
    assert devhub.log.count(kind="resolve", repo=repo) == 2


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *[(kind, "/resolve/") for kind in ("429", "500", "503")],
        *[(kind, "/cdn-files/") for kind in ("429", "500", "503", "reset", "short")],
    ],
)
def test_faults_on_the_way_are_survived(
    put_repo: PutRepo, devhub: DevHub, kind: str, where: str
) -> None:
    tree = tree_of(put_repo(FILES))
    tree.files()
    fault = devhub.faults.add(kind, where, times=3, after_bytes=1000)
    assert read(tree, "model.safetensors", 5, 100_000) == WEIGHTS[5:100_005]
    assert fault.fired == 3


def test_a_broken_body_is_not_fetched_again_from_its_start(
    put_repo: PutRepo, devhub: DevHub
) -> None:
    repo = put_repo(FILES)
    tree = tree_of(repo)
    tree.files()
    devhub.faults.add("short", "/cdn-files/", times=2, after_bytes=40_000)
    assert read(tree, "model.safetensors", 0, 100_000) == WEIGHTS[:100_000]
    starts = [r.range for r in devhub.log.select(kind="data")]
    assert starts == ["bytes=0-99999", "bytes=40000-99999", "bytes=80000-99999"]


def test_an_endless_fault_is_an_error_after_the_tries(put_repo: PutRepo, devhub: DevHub) -> None:
    tree = tree_of(put_repo(FILES))
    tree.files()
    fault = devhub.faults.add("503", "/cdn-files/", times=99)
    with pytest.raises(errors.HubUnavailable, match="503"):
        read(tree, "model.safetensors", 0, 8)
    assert fault.fired == 1 + retry.RETRIES


def test_pinning_survives_a_busy_hub(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo(FILES)
    devhub.faults.add("503", f"*/api/models/{repo}", times=2)
    assert tree_of(repo).pin.commit


def test_the_cache_is_used_and_never_filled(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo(FILES)
    tree = tree_of(repo)
    read(tree, "model.safetensors", 0, 8)
    tree.read_bytes("config.json")
    assert not list(Path(constants.HF_HUB_CACHE).glob(f"*{repo.split('/')[1]}"))
    HfApi(endpoint=devhub.url).hf_hub_download(repo, "model.safetensors")
    devhub.log.clear()
    again = tree_of(repo)
    assert not again.is_remote("model.safetensors")
    assert again.is_remote("config.json")
    assert read(again, "model.safetensors", 100, 8) == WEIGHTS[100:108]
    assert devhub.log.bytes_served(repo) == 0


def test_cache_downloads_whole_files_into_the_cache(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo(FILES)
    tree = tree_of(repo, cache=True)
    assert tree.is_remote("model.safetensors")
    with tree.open("model.safetensors") as reader:
        assert isinstance(reader, LocalReader)
    assert tree.is_remote("model.safetensors"), "it did cost traffic"
    assert not tree_of(repo).is_remote("model.safetensors")
    assert read(tree, "model.safetensors", 0, 8) == WEIGHTS[:8]
    assert devhub.log.bytes_served(repo, "model.safetensors") == len(WEIGHTS)


def test_a_cached_file_cut_short_is_not_trusted(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo(FILES)
    cached = Path(HfApi(endpoint=devhub.url).hf_hub_download(repo, "model.safetensors"))
    os.truncate(cached.resolve(), 1000)
    tree = tree_of(repo)
    assert tree.is_remote("model.safetensors")
    assert read(tree, "model.safetensors", 2000, 8) == WEIGHTS[2000:2008]


def test_a_full_disk_while_caching(
    put_repo: PutRepo, devhub: DevHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    tree = tree_of(put_repo(FILES), cache=True)
    tree.files()
    monkeypatch.setattr(HfApi, "hf_hub_download", full)
    with pytest.raises(errors.DiskFull, match=r"config\.json"):
        tree.read_bytes("config.json")


def test_names_that_leave_the_folder_are_refused(
    put_repo: PutRepo, devhub: DevHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = put_repo(FILES)
    listed = HfApi.list_repo_tree

    def hostile(self: HfApi, *args: object, **kwargs: object) -> object:
        for entry in listed(self, *args, **kwargs):  # type: ignore[arg-type]
            if entry.path == "config.json":
                entry.path = "../../.ssh/authorized_keys"
            yield entry

    monkeypatch.setattr(HfApi, "list_repo_tree", hostile)
    with pytest.raises(errors.UnsafePath, match="authorized_keys"):
        tree_of(repo).files()


def test_open_tree_of_a_repo(put_repo: PutRepo) -> None:
    tree = open_tree(ModelRef.parse(put_repo(FILES)))
    assert tree.read_bytes("config.json") == CONFIG


CARD = b"---\nlicense: apache-2.0\nbase_model: org/base\ntags:\n- x\n---\n# Hi\n"


def test_facts_of_a_repo_are_those_of_its_card(put_repo: PutRepo, devhub: DevHub) -> None:
    repo = put_repo({"README.md": CARD, **FILES}, private=True)
    devhub.set_gated(repo)
    found = facts(tree_of(repo))
    assert (found.licence, found.base_model) == ("apache-2.0", ("org/base",))
    assert (found.gated, found.private) == (True, True)
    assert "x" in found.tags
    assert found.card_data["base_model"] == "org/base"


def test_facts_of_a_repo_without_a_card(put_repo: PutRepo) -> None:
    found = facts(tree_of(put_repo(FILES)))
    assert (found.licence, found.base_model, found.gated) == (None, (), False)


def refused(repo: str, path: str = "model.safetensors") -> HubdiffError:
    with pytest.raises(HubdiffError) as caught:
        tree_of(repo).read_bytes(path)
    assert caught.value.next_step
    return caught.value


class TestRefusals:
    def test_missing_repo(self, devhub: DevHub) -> None:
        assert type(refused("org/nothing-there")) is errors.RepoNotFound

    def test_private_repo_without_a_token(
        self, put_repo: PutRepo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repo = put_repo(FILES, private=True)
        monkeypatch.delenv("HF_TOKEN")
        error = refused(repo)
        assert type(error) is errors.RepoNotFound
        assert "no token was sent" in str(error)

    def test_private_repo_of_someone_else(
        self, put_repo: PutRepo, devhub: DevHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repo = put_repo(FILES, private=True)
        monkeypatch.setenv("HF_TOKEN", devhub.token("other"))
        assert type(refused(repo)) is errors.RepoNotFound

    @pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
    @pytest.mark.parametrize("user", ["other", None])
    def test_gated_repo(
        self,
        put_repo: PutRepo,
        devhub: DevHub,
        monkeypatch: pytest.MonkeyPatch,
        path: str,
        user: str | None,
    ) -> None:
        repo = put_repo(FILES)
        devhub.set_gated(repo)
        if user is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", devhub.token(user))
        error = refused(repo, path)
        assert type(error) is errors.GatedRepo
        assert f"{devhub.url}/{repo}" in (error.next_step or "")

    def test_bad_token(self, put_repo: PutRepo, monkeypatch: pytest.MonkeyPatch) -> None:
        repo = put_repo(FILES)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        error = refused(repo)
        assert type(error) is errors.AuthError
        assert "hf auth login" in (error.next_step or "")

    @pytest.mark.parametrize("revision", ["nope", "0" * 40])
    def test_unknown_revision(self, put_repo: PutRepo, revision: str) -> None:
        error = refused(f"{put_repo(FILES)}@{revision}")
        assert type(error) is errors.RevisionNotFound
        assert revision in str(error)

    def test_missing_file(self, put_repo: PutRepo) -> None:
        error = refused(put_repo(FILES), "nope.json")
        assert type(error) is errors.RemoteFileNotFound
        assert "nope.json" in str(error)

    def test_nobody_answers(self, devhub: DevHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        error = refused("org/name")
        assert type(error) is errors.HubUnavailable
        assert "http://127.0.0.1:9/org/name" in str(error)

    def test_offline(self, devhub: DevHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        error = refused("org/name")
        assert type(error) is errors.HubUnavailable
        assert "HF_HUB_OFFLINE" in (error.next_step or "")
