"""What is in a repo and how it came there: trees, paths, refs, commits, branches, tags."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from .endpoint import Call
from .git import TreeEntry
from .listing import iso, page
from .refusal import Refusal, bad_request, entry_not_found, revision_not_found
from .repo import Repo


def tree(call: Call) -> Any:
    repo = call.repo()
    commit = repo.commit_of(call.params["rev"])
    folder = call.params.get("path", "").strip("/")
    entries = repo.git.tree(commit)
    if folder and (folder not in entries or entries[folder].is_file):
        raise entry_not_found(folder, commit)
    prefix = f"{folder}/" if folder else ""
    inside = [entry for path, entry in entries.items() if path.startswith(prefix)]
    if not call.flag("recursive"):
        inside = [entry for entry in inside if "/" not in entry.path[len(prefix) :]]
    xet = call.hub.options.xet_downloads
    values = [_entry(call, repo, commit, item, call.flag("expand"), xet) for item in inside]
    return page(call, values, call.hub.options.page_size)


def paths_info(call: Call) -> Any:
    repo = call.repo()
    commit = repo.commit_of(call.params["rev"])
    if "json" in call.request.headers.get("content-type", ""):
        body = call.json()
        paths, expand = body.get("paths", []), bool(body.get("expand"))
    else:
        form = call.form()
        paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
    entries = repo.git.tree(commit)
    known = [entries[path.strip("/")] for path in paths if path.strip("/") in entries]
    return [_entry(call, repo, commit, entry, expand, True) for entry in known]


def _entry(
    call: Call, repo: Repo, commit: str, entry: TreeEntry, expand: bool, xet: bool
) -> dict[str, Any]:
    value: dict[str, Any] = {
        "type": "file" if entry.is_file else "directory",
        "oid": entry.oid,
        "size": entry.size,
        "path": entry.path,
    }
    if entry.lfs:
        pointer_size = len(entry.lfs.text())
        value["lfs"] = {"oid": entry.lfs.sha256, "size": entry.size, "pointerSize": pointer_size}
        if xet:
            # A copy between repos needs some xet hash. An object that came by LFS has none: its
            # sha256 stands in, and is taken back by the copy.
            value["xetHash"] = call.hub.xet.hash_of(entry.lfs.sha256) or entry.lfs.sha256
    if expand:
        last = repo.git.log(commit, path=entry.path)[0]
        value["lastCommit"] = {"id": last.oid, "title": last.title, "date": iso(last.timestamp)}
        value["securityFileStatus"] = None
    return value


def refs(call: Call) -> Any:
    repo = call.repo()
    groups: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "pullRequests": []}
    prefixes = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, commit in repo.git.refs().items():
        for prefix, group in prefixes.items():
            if ref.startswith(prefix):
                name = ref.removeprefix(prefix)
                groups[group].append({"name": name, "ref": ref, "targetCommit": commit})
    if not call.flag("include_prs"):
        del groups["pullRequests"]
    return {**groups, "converts": []}


def commits(call: Call) -> Any:
    repo = call.repo()
    commit = repo.commit_of(call.params["rev"])
    size = int(call.query("limit") or call.hub.options.page_size)
    number = int(call.query("p") or 0)
    total = repo.git.count(commit)
    values = [
        {
            "id": one.oid,
            "title": one.title,
            "message": one.message,
            "date": iso(one.timestamp),
            "authors": [{"user": one.author, "avatar": ""}],
        }
        for one in repo.git.log(commit, limit=size, skip=number * size)
    ]
    headers = {"X-Total-Count": str(total)}
    if (number + 1) * size < total:
        following = f"{call.hub.url}{call.record.path}?p={number + 1}&limit={size}"
        headers["Link"] = f'<{following}>; rel="next"'
    return JSONResponse(values, headers=headers)


def create_branch(call: Call) -> Any:
    repo, body = call.repo_for_write(), call.json()
    ref = f"refs/heads/{call.params['rev']}"
    with repo.lock:
        _check_new(repo, ref)
        start = repo.commit_of(str(body.get("startingPoint") or "main"))
        if body.get("emptyBranch"):
            raise bad_request("This server makes no empty branches")
        repo.git.set_ref(ref, start)
    return Response("OK")


def delete_branch(call: Call) -> Any:
    return _delete_ref(call, f"refs/heads/{call.params['rev']}")


def create_tag(call: Call) -> Any:
    """In this address the revision is what the tag will point to."""
    repo, body = call.repo_for_write(), call.json()
    ref = f"refs/tags/{body.get('tag')}"
    with repo.lock:
        _check_new(repo, ref)
        commit = repo.commit_of(call.params["rev"])
        if message := body.get("message"):
            repo.git.annotated_tag(str(body["tag"]), commit, str(message))
        else:
            repo.git.set_ref(ref, commit)
    return Response("OK")


def delete_tag(call: Call) -> Any:
    return _delete_ref(call, f"refs/tags/{call.params['rev']}")


def _check_new(repo: Repo, ref: str) -> None:
    if ref in repo.git.refs():
        raise Refusal(409, f"Reference already exists: {ref}")
    if not repo.git.is_ref_name(ref):
        raise bad_request(f"Not a valid reference name: {ref}")


def _delete_ref(call: Call, ref: str) -> Any:
    repo = call.repo_for_write()
    with repo.lock:
        if ref not in repo.git.refs():
            raise revision_not_found(call.params["rev"])
        if ref == "refs/heads/main":
            raise Refusal(403, "The default branch can't be deleted")
        repo.git.set_ref(ref, None)
    return Response("OK")


def super_squash(call: Call) -> Any:
    repo = call.repo_for_write()
    ref = f"refs/heads/{call.params['rev']}"
    with repo.lock:
        if ref not in repo.git.refs():
            raise revision_not_found(call.params["rev"])
        repo.git.squash(ref, str(call.json().get("message") or "Super-squash"))
    return Response("OK")
