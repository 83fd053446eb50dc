"""Discussions and pull requests. A pull request is a discussion with a git ref, ``refs/pr/N``."""

from __future__ import annotations

import time
import uuid
from typing import Any

from .endpoint import Call
from .listing import iso
from .refusal import Refusal, bad_request
from .repo import Repo

PAGE = 20
STATUSES = ("open", "closed")


def open_pull_request(
    repo: Repo, author: str, title: str, description: str, *, base: str, status: str
) -> int:
    """A new pull request towards ``base``; the caller makes its ref. Says its number."""
    discussion = _new(repo, author, title, description, status)
    discussion["base"] = base
    repo.save_settings()
    return int(discussion["num"])


def _new(repo: Repo, author: str, title: str, text: str, status: str) -> dict[str, Any]:
    discussion: dict[str, Any] = {
        "num": len(repo.settings.discussions) + 1,
        "title": title,
        "author": author,
        "status": status,
        "created": time.time(),
        "base": None,
        "merge_commit": None,
        "events": [],
    }
    repo.settings.discussions.append(discussion)
    _add_comment(discussion, author, text)
    return discussion


def _add_event(discussion: dict[str, Any], author: str, kind: str, data: Any) -> dict[str, Any]:
    event = {
        "id": uuid.uuid4().hex,
        "author": {"name": author},
        "createdAt": iso(time.time()),
        "type": kind,
        "data": data,
    }
    discussion["events"].append(event)
    return event


def _add_comment(discussion: dict[str, Any], author: str, text: str) -> dict[str, Any]:
    data = {"edited": False, "hidden": False, "latest": {"raw": text}}
    return _add_event(discussion, author, "comment", data)


def create(call: Call) -> Any:
    repo, body, user = call.repo_to_contribute(), call.json(), call.need_user()
    title, text = str(body.get("title", "")), str(body.get("description", ""))
    with repo.lock:
        if not body.get("pullRequest"):
            number = _new(repo, user, title, text, "open")["num"]
            repo.save_settings()
        else:
            number = open_pull_request(repo, user, title, text, base="main", status="draft")
            repo.git.set_ref(f"refs/pr/{number}", repo.commit_of("main"))
    url = f"{call.hub.url}/{repo.url_path}/discussions/{number}"
    return {"num": number, "url": url, "pullRequest": bool(body.get("pullRequest"))}


def list_all(call: Call) -> Any:
    repo = call.repo()
    kind, status, author = call.query("type"), call.query("status"), call.query("author")
    found = [
        discussion
        for discussion in reversed(repo.settings.discussions)
        if (kind in ("", "all") or (kind == "pull_request") == (discussion["base"] is not None))
        and (
            status in ("", "all")
            or (status == "open") == (discussion["status"] in ("open", "draft"))
        )
        and author in ("", discussion["author"])
    ]
    start = int(call.query("p") or 0) * PAGE
    shown = [_summary(repo, discussion) for discussion in found[start : start + PAGE]]
    return {"discussions": shown, "count": len(found), "start": start}


def _summary(repo: Repo, discussion: dict[str, Any]) -> dict[str, Any]:
    return {
        "num": discussion["num"],
        "title": discussion["title"],
        "status": discussion["status"],
        "author": {"name": discussion["author"]},
        "createdAt": iso(discussion["created"]),
        "isPullRequest": discussion["base"] is not None,
        "repo": {"name": repo.name, "type": repo.kind},
    }


def details(call: Call) -> Any:
    repo = call.repo()
    discussion = _discussion(call, repo)
    value = {**_summary(repo, discussion), "events": discussion["events"]}
    if discussion["base"] is None:
        return value
    ref, base = f"refs/pr/{discussion['num']}", discussion["base"]
    merged = discussion["merge_commit"] is not None
    value["changes"] = {"base": f"refs/heads/{base}", "mergeCommitId": discussion["merge_commit"]}
    target, head = repo.git.resolve(f"refs/heads/{base}"), repo.git.resolve(ref)
    if merged or target is None or head is None:
        return {**value, "filesWithConflicts": [], "diff": ""}
    value["filesWithConflicts"] = repo.git.merge_tree(target, head)[1]
    value["diff"] = repo.git.diff(target, head) if call.flag("diff") else None
    return value


def _discussion(call: Call, repo: Repo) -> dict[str, Any]:
    number = call.params["num"]
    for discussion in repo.settings.discussions:
        if str(discussion["num"]) == number:
            return discussion
    raise Refusal(404, f"Discussion {number} not found")


def _own(call: Call, repo: Repo) -> dict[str, Any]:
    """A discussion that the caller wrote, or may change as a member of the namespace."""
    discussion = _discussion(call, repo)
    if call.need_user() != discussion["author"]:
        call.hub.store.check_write(repo, call.user)
    return discussion


def comment(call: Call) -> Any:
    repo, user = call.repo_to_contribute(), call.need_user()
    with repo.lock:
        text = str(call.json().get("comment", ""))
        event = _add_comment(_discussion(call, repo), user, text)
        repo.save_settings()
    return {"newMessage": event}


def set_status(call: Call) -> Any:
    repo, body = call.repo_to_contribute(), call.json()
    status = body.get("status")
    if status not in STATUSES:
        raise bad_request(f"{status!r} is not one of {STATUSES}")
    with repo.lock:
        discussion = _own(call, repo)
        if discussion["status"] == "merged":
            raise bad_request("It is merged")
        discussion["status"] = status
        event = _add_event(discussion, call.need_user(), "status-change", {"status": status})
        if body.get("comment"):
            _add_comment(discussion, call.need_user(), str(body["comment"]))
        repo.save_settings()
    return {"newStatus": event}


def set_title(call: Call) -> Any:
    repo = call.repo_to_contribute()
    with repo.lock:
        discussion = _own(call, repo)
        data = {"from": discussion["title"], "to": str(call.json().get("title", ""))}
        discussion["title"] = data["to"]
        event = _add_event(discussion, call.need_user(), "title-change", data)
        repo.save_settings()
    return {"newTitle": event}


def merge(call: Call) -> Any:
    repo = call.repo_for_write()
    with repo.lock:
        discussion = _discussion(call, repo)
        if discussion["base"] is None or discussion["status"] != "open":
            raise bad_request("Only an open pull request can be merged")
        ref, base = f"refs/pr/{discussion['num']}", f"refs/heads/{discussion['base']}"
        target, head = repo.commit_of(base), repo.commit_of(ref)
        tree, conflicts = repo.git.merge_tree(target, head)
        if tree is None:
            raise Refusal(409, f"Merge conflict in {', '.join(conflicts)}")
        message = f"{discussion['title']} (#{discussion['num']})"
        discussion["merge_commit"] = repo.git.merge(base, head, tree, message)
        discussion["status"] = "merged"
        _add_event(discussion, call.need_user(), "status-change", {"status": "merged"})
        repo.save_settings()
    return {"success": True}
