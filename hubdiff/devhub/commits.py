"""Making commits: which files are large, the commit itself, copies of large files between repos."""

from __future__ import annotations

import base64
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .discussions import open_pull_request
from .endpoint import Call, read_lines
from .git import Change, GitRepo, Pointer
from .refusal import Refusal, bad_request, entry_not_found, revision_not_found
from .repo import Repo, check_path
from .store import KINDS


def preupload(call: Call) -> Any:
    """For each file: git or large-file storage, ignored or not, and what is there already."""
    repo, body = call.repo(), call.json()
    call.need_user()
    commit = repo.commit_of(call.params["rev"])
    attributes = body.get("gitAttributes") or repo.text(commit, ".gitattributes") or ""
    patterns = _lfs_patterns(str(attributes))
    paths = [check_path(str(item.get("path"))) for item in body.get("files", [])]
    ignored = _ignored(repo.git, str(body.get("gitIgnore") or ""), paths)
    tree = repo.git.tree(commit)
    answers = []
    for path, item in zip(paths, body.get("files", []), strict=True):
        large = _is_large(call, item, patterns)
        answer: dict[str, Any] = {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": path in ignored,
        }
        if path in tree:
            entry = tree[path]
            answer["oid"] = entry.lfs.sha256 if entry.lfs else entry.oid
        answers.append(answer)
    return {"files": answers}


def _is_large(call: Call, item: dict[str, Any], patterns: list[str]) -> bool:
    """By size, by the repo's ``.gitattributes``, or because it is not text."""
    path = str(item.get("path"))
    name = path.rpartition("/")[2]
    if int(item.get("size", 0)) >= call.hub.options.large_file_bytes:
        return True
    if any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns):
        return True
    return b"\0" in base64.b64decode(str(item.get("sample") or ""))


def _lfs_patterns(attributes: str) -> list[str]:
    rows = [line.split() for line in attributes.splitlines() if not line.startswith("#")]
    return [row[0] for row in rows if "filter=lfs" in row[1:]]


def _ignored(git: GitRepo, rules: str, paths: list[str]) -> set[str]:
    if not rules:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rules").write_text(rules)
        listing = git.run(
            "-c",
            f"core.excludesFile={folder}/rules",
            f"--work-tree={folder}",
            "check-ignore",
            "--no-index",
            "--stdin",
            "-z",
            stdin="\0".join(paths).encode(),
            ok=(0, 1),
        )
    return set(listing.decode().split("\0")[:-1])


def commit(call: Call) -> Any:
    lines = list(read_lines(call.body))
    if not lines or lines[0].get("key") != "header":
        raise bad_request("A commit starts with its header")
    header, user = lines[0]["value"], call.need_user()
    opens_pr, branch = call.flag("create_pr"), call.params["rev"]
    contributes = opens_pr or branch.startswith("refs/pr/")
    repo = call.repo_to_contribute() if contributes else call.repo_for_write()
    with repo.lock:
        ref, parent = _target(call, repo, branch, header.get("parentCommit"), opens_pr)
        changes = [_change(call, repo, parent, line) for line in lines[1:]]
        answer = {"success": True, "hookOutput": ""}
        if opens_pr:
            title, description = str(header["summary"]), str(header.get("description") or "")
            number = open_pull_request(repo, user, title, description, base=branch, status="open")
            ref = f"refs/pr/{number}"
            repo.git.set_ref(ref, parent)
            place = f"{call.hub.url}/{repo.url_path}/discussions/{number}"
            answer |= {"pullRequestUrl": place}
        message = "\n\n".join(filter(None, (header.get("summary"), header.get("description"))))
        oid = repo.git.commit(ref, parent, message, user, changes)
    url = f"{call.hub.url}/{repo.url_path}/commit/{oid}"
    return {**answer, "commitOid": oid, "commitUrl": url}


def _target(
    call: Call, repo: Repo, branch: str, expected: str | None, opens_pr: bool
) -> tuple[str, str]:
    """The ref to move and the commit it is at, which must be the one the client expects."""
    ref = branch if branch.startswith("refs/pr/") else f"refs/heads/{branch}"
    if ref not in repo.git.refs():
        raise revision_not_found(branch)
    parent = repo.git.refs()[ref]
    if branch.startswith("refs/pr/"):
        _check_author(call, repo, branch)
    if expected and opens_pr:
        return ref, repo.commit_of(expected)
    if expected and (len(expected) < 7 or not parent.startswith(expected)):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    return ref, parent


def _check_author(call: Call, repo: Repo, ref: str) -> None:
    number = int(ref.removeprefix("refs/pr/"))
    authors = {d["author"] for d in repo.settings.discussions if d["num"] == number}
    if call.user not in authors:
        call.hub.store.check_write(repo, call.user)


def _change(call: Call, repo: Repo, parent: str, line: dict[str, Any]) -> Change:
    key, value = line.get("key"), line.get("value", {})
    path = check_path(str(value.get("path", "")).removesuffix("/"))
    if key == "file":
        return Change(path, _content(call, path, value))
    if key == "lfsFile":
        return Change(path, _pointer(call, repo, value).text())
    if key in ("deletedFile", "deletedFolder"):
        if repo.entry(parent, path).is_file != (key == "deletedFile"):
            raise entry_not_found(path, parent)
        return Change(path, None)
    raise bad_request(f"Unknown commit operation {key!r}")


def _content(call: Call, path: str, value: dict[str, Any]) -> bytes:
    text = str(value.get("content", ""))
    is_base64 = value.get("encoding") == "base64"
    try:
        content = base64.b64decode(text, validate=True) if is_base64 else text.encode()
    except ValueError as error:
        raise bad_request(f"{path}: {error}") from None
    if len(content) > call.hub.options.large_file_bytes:
        raise bad_request(f"{path} is too large for git: it must be uploaded as a large file")
    return content


def _pointer(call: Call, repo: Repo, value: dict[str, Any]) -> Pointer:
    oid = str(value.get("oid"))
    if value.get("algo") != "sha256" or not repo.owns_object(oid):
        raise bad_request(f"{value.get('path')} points to an object that was not uploaded: {oid}")
    size = call.hub.objects.size(oid)
    if value.get("size", size) != size:
        raise bad_request(f"Object {oid} has {size} bytes, not {value['size']}")
    return Pointer(oid, size)


def duplicate(call: Call) -> Any:
    """Give objects of this repo to another one: the server-side half of a copy between repos."""
    source, body = call.repo_files(), call.json()
    target = body.get("target", {})
    if target.get("type") not in KINDS:
        raise bad_request(f"Unknown repo type {target.get('type')!r}")
    into = call.hub.store.open_for_write(target["type"], str(target.get("name")), call.user)
    failed = []
    for item in body.get("files", []):
        sha256 = str(item.get("sha256"))
        known = call.hub.xet.hash_of(sha256) or sha256
        if source.owns_object(sha256) and item.get("xetHash") == known:
            into.add_object(sha256)
        else:
            failed.append({"sha256": sha256, "error": "No such file in the source repo"})
    return {"success": not failed, "failed": failed}
