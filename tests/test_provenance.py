from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
from blake3 import blake3

import hubdiff
from hubdiff.licences import Side, licence_note, strictest
from hubdiff.provenance import Provenance, code_provenance, public_url


def run_git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *identity, *args], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit; the user's own git settings play no part."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    folder = tmp_path / "code"
    folder.mkdir()
    run_git(folder, "init")
    (folder / "train.py").write_text("steps = 1\n")
    run_git(folder, "add", "train.py")
    run_git(folder, "commit", "-m", "first")
    return folder


def test_remote_commit_and_clean(checkout: Path) -> None:
    run_git(checkout, "remote", "add", "origin", "https://me:secret@example.org/me/code.git")
    model = checkout / "runs" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"untracked")
    commit = run_git(checkout, "rev-parse", "HEAD")
    assert code_provenance(model) == Provenance("https://example.org/me/code.git", commit, False)


def test_changed_code_is_dirty(checkout: Path) -> None:
    (checkout / "train.py").write_text("steps = 2\n")
    provenance = code_provenance(checkout)
    assert provenance is not None
    assert provenance.dirty
    assert provenance.remote is None
    run_git(checkout, "add", "train.py")
    staged = code_provenance(checkout)
    assert staged is not None
    assert staged.dirty


def test_the_remote_of_the_branch_comes_before_origin(checkout: Path) -> None:
    run_git(checkout, "remote", "add", "origin", "git@example.org:fork/code.git")
    run_git(checkout, "remote", "add", "upstream", "git@example.org:main/code.git")
    assert_remote(checkout, "git@example.org:fork/code.git")
    run_git(checkout, "update-ref", "refs/remotes/upstream/main", "HEAD")
    run_git(checkout, "branch", "--set-upstream-to=upstream/main")
    assert_remote(checkout, "git@example.org:main/code.git")
    run_git(checkout, "checkout", "--detach")
    assert_remote(checkout, "git@example.org:fork/code.git")


def assert_remote(folder: Path, url: str) -> None:
    provenance = code_provenance(folder)
    assert provenance is not None
    assert provenance.remote == url


def test_no_checkout_no_commit_no_folder(tmp_path: Path) -> None:
    assert code_provenance(tmp_path) is None
    assert code_provenance(tmp_path / "missing") is None
    run_git(tmp_path, "init")
    assert code_provenance(tmp_path) is None


def test_a_checkout_with_broken_config_is_none(checkout: Path) -> None:
    (checkout / ".git" / "config").write_text("not a config\n")
    assert code_provenance(checkout) is None


def test_a_checkout_can_not_make_us_run_its_programs(checkout: Path, tmp_path: Path) -> None:
    hook, trace = tmp_path / "hook", tmp_path / "trace"
    hook.write_text(f"#!/bin/sh\ntouch '{trace}'\n")
    hook.chmod(0o755)
    run_git(checkout, "config", "core.fsmonitor", str(hook))
    run_git(checkout, "status")
    assert trace.exists(), "the trap must work for the test to mean anything"
    trace.unlink()
    assert code_provenance(checkout) is not None
    assert not trace.exists()


@pytest.mark.parametrize("key", ["filter.X.y.clean", "filter.X.y.process"])
def test_a_checkout_can_not_make_us_run_its_filters(
    checkout: Path, tmp_path: Path, key: str
) -> None:
    trap, trace = tmp_path / "trap", tmp_path / "trace"
    trap.write_text(f"#!/bin/sh\ntouch '{trace}'\ncat\n")
    trap.chmod(0o755)
    (checkout / ".git" / "info" / "attributes").write_text("*.py filter=X.y\n")
    (checkout / "train.py").write_text("steps = 2\n")
    run_git(checkout, "config", key, str(trap))
    run_git(checkout, "status")
    assert trace.exists(), "the trap must work for the test to mean anything"
    trace.unlink()
    provenance = code_provenance(checkout)
    assert provenance is not None
    assert provenance.dirty is None
    assert not trace.exists()


def test_nor_a_submodule(checkout: Path, tmp_path: Path) -> None:
    """A submodule's configuration lies in the same .git folder, and git reads it by itself."""
    trap, trace = tmp_path / "trap", tmp_path / "trace"
    trap.write_text(f"#!/bin/sh\ntouch '{trace}'\ncat\n")
    trap.chmod(0o755)
    allowed = ("-c", "protocol.file.allow=always")
    run_git(checkout, *allowed, "submodule", "add", str(checkout), "part")
    run_git(checkout, "commit", "-m", "part")
    part = checkout / "part"
    run_git(part, "config", "filter.x.clean", str(trap))
    (checkout / ".git" / "modules" / "part" / "info" / "attributes").write_text("* filter=x\n")
    (part / "train.py").write_text("steps = 2\n")
    run_git(checkout, "status")
    assert trace.exists(), "the trap must work for the test to mean anything"
    trace.unlink()
    assert code_provenance(checkout) is not None
    assert not trace.exists()


def test_the_users_own_filter_leaves_the_answer_known(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "gitconfig"
    own.write_text('[filter "lfs"]\n\tclean = cat\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(own))
    provenance = code_provenance(checkout)
    assert provenance is not None
    assert provenance.dirty is False


def test_without_git_there_is_no_provenance(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "git", None)
    assert code_provenance(checkout) is None


def test_a_result_pins_what_it_was_made_from_by_content(tmp_path: Path) -> None:
    """A folder has a name only, and the name stays when the content changes."""
    base = models.save(tmp_path / "base", models.weights())
    tuned = models.save(tmp_path / "tuned", models.moved(models.weights()))
    target = models.save(tmp_path / "target", models.weights(seed=7))
    delta = tmp_path / "delta"
    hubdiff.push_delta(tuned, delta, base=base)
    hubdiff.apply(delta, target, output=tmp_path / "out", force=True)
    record = json.loads((tmp_path / "out" / "hubdiff-result.json").read_text())
    assert record["deltas"][0]["manifest_sha256"] == models.hashes(delta)["hubdiff.json"]
    size = (target / "model.safetensors").stat().st_size
    assert [(file["path"], file["size"]) for file in record["target"]["files"]] == [
        ("model.safetensors", size)
    ]


@pytest.mark.parametrize("to", ["base", "target"])
def test_a_result_names_its_files_by_content(tmp_path: Path, to: str) -> None:
    """By sha256 where that is known beforehand, by blake3, which is faster, where nothing is."""
    models.save(tmp_path / "base", models.weights())
    models.save(tmp_path / "tuned", models.moved(models.weights()))
    models.save(tmp_path / "target", models.weights(seed=7))
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    out = tmp_path / "out"
    applied = hubdiff.apply(tmp_path / "delta", tmp_path / to, output=out, force=True)
    files = json.loads((out / "hubdiff-result.json").read_text())["files"]
    assert {file["path"] for file in files} >= {"model.safetensors", "config.json"}
    hashers = {"sha256": hashlib.sha256, "blake3": blake3}
    for file in files:
        assert file in applied.as_json()["files"]
        data = (out / file["path"]).read_bytes()
        (kind,) = set(file) - {"path", "size"}
        assert (file["size"], file[kind]) == (len(data), hashers[kind](data).hexdigest())
        if file["path"] == "model.safetensors":
            assert kind == ("sha256" if to == "base" else "blake3")


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://github.com/a/b.git", "https://github.com/a/b.git"),
        ("https://user:token@host/a/b", "https://host/a/b"),
        ("https://token@host:8443/a/b", "https://host:8443/a/b"),
        ("https://host/a/b?private_token=x#y", "https://host/a/b"),
        ("https://a@b:p@ss@host/x", "https://host/x"),
        ("git@github.com:a/b.git", "git@github.com:a/b.git"),
        ("ssh://git@host:22/a/b", "ssh://git@host:22/a/b"),
        ("ssh://git:secret@host/a/b", "ssh://git@host/a/b"),
        ("git://host/a", "git://host/a"),
        ("/home/me/private", None),
        ("../elsewhere", None),
        ("C:\\code", None),
        ("C:/code", None),
        ("file:///home/me/private", None),
    ],
)
def test_public_url(url: str, public: str | None) -> None:
    assert public_url(url) == public


@pytest.mark.parametrize(
    ("licences", "strict"),
    [
        (["mit", "apache-2.0"], "apache-2.0"),
        (["apache-2.0", "mpl-2.0"], "mpl-2.0"),
        (["lgpl-3.0", "apache-2.0"], "lgpl-3.0"),
        (["gpl-3.0", "lgpl-3.0"], "gpl-3.0"),
        (["cc-by-4.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["gpl-3.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["cc-by-nc-sa-4.0", "cc-by-4.0"], "cc-by-nc-sa-4.0"),
        (["openrail", "agpl-3.0"], "openrail"),
        (["llama3.1", "cc-by-nc-4.0"], "llama3.1"),
        (["apache-2.0", "gemma"], "gemma"),
        (["apache-2.0", "other"], "other"),
        (["apache-2.0", "my-own-terms"], "my-own-terms"),
        (["llama3.1", None], "unknown"),
        (["mit", ""], "unknown"),
        (["mit, gpl-3.0", "apache-2.0"], "gpl-3.0"),
        (["Apache-2.0", "mit"], "Apache-2.0"),
        (["mit"], "mit"),
        ([], "unknown"),
    ],
)
def test_strictest(licences: list[str | None], strict: str) -> None:
    assert strictest(licences) == strict
    assert strictest(licences[::-1]) == strict


def test_note_names_both_and_the_strictest() -> None:
    note = licence_note([Side("base", "llama3.1", gated=True), Side("tuned model", "apache-2.0")])
    assert note == (
        "The base is under llama3.1 and the tuned model is under apache-2.0; the terms of each "
        "apply. The strictest is llama3.1. The base is gated: accept the terms on the Hub first. "
        "They hold here too."
    )


def test_note_when_all_agree_or_one_says_nothing() -> None:
    sides = [Side("base", "mit", gated=True), Side("tuned model", "mit", gated=True)]
    assert licence_note(sides) == (
        "The base and the tuned model are under mit; so is this. The base and the tuned model are "
        "gated: accept the terms on the Hub first. They hold here too."
    )
    assert licence_note([Side("base", "mit")]) == "The base is under mit; so is this."
    assert "ask the owner" in licence_note([Side("base", "mit"), Side("tuned model", None)])
    assert "No licence" in licence_note([])
