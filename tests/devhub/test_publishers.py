from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from hubdiff.devhub import DevHub
from tests.github_fake import GitHubFake, id_token

GITHUB = "acme/models"
CLAIMS = {
    "repository": GITHUB,
    "ref": "refs/heads/main",
    "workflow_ref": f"{GITHUB}/.github/workflows/hubdiff.yml@refs/heads/main",
}
TRUSTED = {"repository": GITHUB, "workflow": "hubdiff.yml", "branch": "main"}

Publish = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def github() -> Iterator[GitHubFake]:
    with GitHubFake() as fake:
        yield fake


@pytest.fixture
def publish(hub: DevHub, github: GitHubFake, tmp_path: Path) -> Publish:
    """Run a script with the official client in a process that is a job on GitHub, without a token
    of any user."""

    def run(
        resource: str, script: str, *, xet: bool = False, **claims: object
    ) -> subprocess.CompletedProcess[str]:
        environment = os.environ | hub.environment(xet=xet, home=tmp_path / "home")
        environment |= github.environment(**{**CLAIMS, **claims})
        environment |= {"HF_OIDC_RESOURCE": resource, "REPO": resource}
        del environment["HF_TOKEN"]
        head = "import os; from huggingface_hub import *; repo = os.environ['REPO']; api = HfApi()"
        return subprocess.run(
            [sys.executable, "-c", f"{head}\n{textwrap.dedent(script)}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


UPLOAD = """
    done = api.create_commit(
        repo, [CommitOperationAdd("w.bin", b"weights" * 1000)], commit_message="m"
    )
"""
PROPOSE = UPLOAD.replace('commit_message="m"', 'commit_message="m", create_pr=True')


def token_for(hub: DevHub, repo: str) -> str:
    claims = {**CLAIMS, "iss": "https://token.actions.githubusercontent.com", "aud": hub.url}
    answer = exchange(hub, repo, id_token({**claims, "exp": time.time() + 60}))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


def exchange(hub: DevHub, repo: str, subject: str, **body: str) -> httpx2.Response:
    asked = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
        "subject_token": subject,
        "resource": repo,
        **body,
    }
    with httpx2.Client(trust_env=False) as client:
        return client.post(f"{hub.url}/oauth/token", json=asked)


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_job_publishes_without_any_secret(
    hub: DevHub, alice: HfApi, repo: str, publish: Publish, xet: bool
) -> None:
    hub.trust(repo, **TRUSTED)
    done = publish(repo, UPLOAD, xet=xet)
    assert done.returncode == 0, done.stderr
    assert "w.bin" in alice.list_repo_files(repo)
    assert alice.list_repo_commits(repo)[0].authors == ["[OIDC]"]


@pytest.mark.parametrize(
    "claims",
    [
        {"repository": "acme/others"},
        {"repository": "Acme/models"},
        {"ref": "refs/heads/dev"},
        {"ref": "refs/tags/main"},
        {"workflow_ref": f"{GITHUB}/.github/workflows/other.yml@refs/heads/main"},
        {"aud": "https://example.org"},
        {"iss": "https://example.org"},
        {"exp": 1},
    ],
)
def test_any_claim_that_differs_is_refused(
    hub: DevHub, alice: HfApi, repo: str, publish: Publish, claims: dict[str, object]
) -> None:
    hub.trust(repo, **TRUSTED)
    done = publish(repo, UPLOAD, **claims)
    assert done.returncode != 0
    assert "400" in done.stderr
    assert "w.bin" not in alice.list_repo_files(repo)


def test_a_repository_alone_may_be_trusted(hub: DevHub, repo: str, publish: Publish) -> None:
    hub.trust(repo, repository=GITHUB)
    done = publish(repo, UPLOAD, ref="refs/heads/dev", workflow_ref="x")
    assert done.returncode == 0, done.stderr


def test_a_repo_without_publishers_and_no_repo_look_alike(hub: DevHub, repo: str) -> None:
    claims = {**CLAIMS, "iss": "https://token.actions.githubusercontent.com", "aud": hub.url}
    subject = id_token({**claims, "exp": time.time() + 60})
    answers = [exchange(hub, name, subject) for name in (repo, "alice/not-there")]
    assert [answer.status_code for answer in answers] == [400, 400]
    texts = {
        answer.text.replace(name, "X")
        for answer, name in zip(answers, (repo, "alice/not-there"), strict=True)
    }
    assert len(texts) == 1


@pytest.mark.parametrize("subject", ["", "a.b", "a.b.c", "a.e30.c", "a.W10.c"])
def test_what_is_no_id_token_is_refused(hub: DevHub, repo: str, subject: str) -> None:
    hub.trust(repo, **TRUSTED)
    assert exchange(hub, repo, subject).status_code == 400
    assert exchange(hub, repo, subject, grant_type="password").status_code == 400


def test_the_token_is_for_one_repo(hub: DevHub, alice: HfApi, repo: str) -> None:
    hub.trust(repo, **TRUSTED)
    alice.create_repo("alice/other", exist_ok=True)
    api = HfApi(endpoint=hub.url, token=token_for(hub, repo))
    api.create_branch(repo, branch="hubdiff/x")
    assert api.model_info("alice/other").id == "alice/other"  # reading what is public is open
    add = [CommitOperationAdd("a.txt", b"a")]
    refused = [
        lambda: api.create_commit("alice/other", add, commit_message="m"),
        lambda: api.create_commit("alice/other", add, commit_message="m", create_pr=True),
        lambda: api.create_discussion("alice/other", "spam"),
        lambda: api.create_branch("alice/other", branch="b"),
        lambda: api.create_repo("alice/new"),
        lambda: api.create_repo("new"),
        lambda: api.move_repo(repo, "alice/moved"),
        lambda: api.create_collection("mine", namespace="alice"),
    ]
    for action in refused:
        with pytest.raises(HfHubHTTPError) as error:
            action()
        assert error.value.response.status_code == 403


def test_a_private_repo_is_open_to_its_own_publisher_only(hub: DevHub, alice: HfApi) -> None:
    for name in ("alice/secret-a", "alice/secret-b"):
        alice.create_repo(name, private=True)
    hub.trust("alice/secret-a", **TRUSTED)
    api = HfApi(endpoint=hub.url, token=token_for(hub, "alice/secret-a"))
    assert api.list_repo_files("alice/secret-a") == [".gitattributes"]
    assert not api.repo_exists("alice/secret-b")


def test_the_token_expires(hub: DevHub, repo: str) -> None:
    hub.trust(repo, **TRUSTED)
    api = HfApi(endpoint=hub.url, token=token_for(hub, repo))
    api.create_branch(repo, branch="before")
    hub.expire_urls()
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(repo, branch="after")
    assert error.value.response.status_code == 401


def test_pull_requests_where_they_are_allowed(
    hub: DevHub, alice: HfApi, repo: str, publish: Publish
) -> None:
    hub.trust(repo, **TRUSTED, pull_requests=True)
    done = publish(repo, PROPOSE + "    print(done.pr_num)\n")
    assert done.returncode == 0, done.stderr
    shown = alice.get_discussion_details(repo, int(done.stdout))
    assert (shown.author, shown.status) == ("[OIDC]", "open")
    assert "w.bin" in alice.list_repo_files(repo, revision=f"refs/pr/{shown.num}")


def test_no_pull_requests_where_they_are_not(
    hub: DevHub, alice: HfApi, repo: str, publish: Publish
) -> None:
    hub.trust(repo, **TRUSTED, pull_requests=False)
    done = publish(repo, PROPOSE)
    assert done.returncode != 0
    assert "403" in done.stderr
    assert list(alice.get_repo_discussions(repo)) == []
    assert publish(repo, UPLOAD).returncode == 0


def test_a_dataset_is_named_with_its_kind(hub: DevHub, alice: HfApi, publish: Publish) -> None:
    alice.create_repo("alice/judged-data", repo_type="dataset", exist_ok=True)
    hub.trust("alice/judged-data", **TRUSTED, kind="dataset")
    script = """
        api.upload_file(
            path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="alice/judged-data",
            repo_type="dataset",
        )
    """
    assert publish("datasets/alice/judged-data", script).returncode == 0
    assert publish("alice/judged-data", script).returncode != 0
