"""What a repo is: its record, the search over all of them, and what is derived from its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from .endpoint import Call
from .git import TreeEntry
from .listing import iso, page
from .metadata import (
    BadCard,
    base_models,
    card_tags,
    check_card,
    count_parameters,
    parse_card,
    safetensors_header,
)
from .refusal import bad_request, entry_not_found
from .repo import Repo


def validate_yaml(call: Call) -> Any:
    body = call.json()
    errors, warnings = check_card(str(body.get("content", "")), str(body.get("repoType", "model")))
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return JSONResponse(answer, 400 if errors else 200)


def info(call: Call) -> Any:
    repo = call.repo()
    commit = repo.commit_of(call.params.get("rev", "main"))
    value = describe(call, repo, commit)
    expand = call.request.query_params.getlist("expand")
    if expand:
        kept = {"_id", "id", *expand}
        return {name: item for name, item in value.items() if name in kept}
    return value


def describe(call: Call, repo: Repo, commit: str, *, details: bool = True) -> dict[str, Any]:
    """The information record; ``details`` are what only a single repo's record has."""
    tree = repo.git.tree(commit)
    card = _card(repo, commit)
    value: dict[str, Any] = {
        "_id": repo.name,
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.namespace,
        "sha": commit,
        "private": repo.settings.visibility == "private",
        "gated": repo.settings.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card_tags(card, tree),
        "createdAt": iso(repo.settings.created_at),
        "lastModified": iso(repo.git.log(commit)[0].timestamp),
    }
    if library := card.get("library_name"):
        value["library_name"] = library
    if pipeline := card.get("pipeline_tag"):
        value["pipeline_tag"] = pipeline
    if not details:
        return value
    blobs = call.flag("blobs")
    value["cardData"] = card
    value["baseModels"] = base_models(card)
    value["siblings"] = [_sibling(entry, blobs) for entry in tree.values() if entry.is_file]
    value["usedStorage"] = sum(entry.size for entry in tree.values() if entry.lfs)
    headers = safetensors_headers(call, repo, commit)
    if headers:
        value["safetensors"] = count_parameters(headers.values())
    return value


def _card(repo: Repo, commit: str) -> dict[str, Any]:
    try:
        return parse_card(repo.text(commit, "README.md") or "")
    except BadCard:
        return {}


def _sibling(entry: TreeEntry, blobs: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"rfilename": entry.path}
    if blobs:
        value |= {"size": entry.size, "blobId": entry.oid}
        if entry.lfs:
            pointer_size = len(entry.lfs.text())
            lfs = {"sha256": entry.lfs.sha256, "size": entry.size, "pointerSize": pointer_size}
            value["lfs"] = lfs
    return value


def safetensors_headers(call: Call, repo: Repo, commit: str) -> dict[str, dict[str, Any]]:
    """File name → header, of every readable safetensors file at the root."""
    found = {}
    for entry in repo.git.tree(commit).values():
        if entry.is_file and "/" not in entry.path and entry.path.endswith(".safetensors"):
            header = safetensors_header(_reader(call, repo, entry))
            if header is not None:
                found[entry.path] = header
    return found


def _reader(call: Call, repo: Repo, entry: TreeEntry) -> Callable[[int, int], bytes]:
    if entry.lfs is None:
        content = repo.git.read_blob(entry.oid)
        return lambda start, end: content[start:end]
    path = call.hub.objects.path(entry.lfs.sha256)

    def read(start: int, end: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    return read


def safetensors_metadata(call: Call) -> Any:
    """``FILE`` is an index: its own content, and the headers of the shards it names."""
    repo = call.repo_files()
    commit = repo.commit_of("main")
    text = repo.text(commit, call.params["path"])
    if text is None:
        raise entry_not_found(call.params["path"], commit)
    try:
        index = json.loads(text)
        shards = set(index.pop("weight_map").values())
    except (ValueError, KeyError, AttributeError):
        raise bad_request(f"{call.params['path']} is not a safetensors index") from None
    headers = safetensors_headers(call, repo, commit)
    return {
        "index": index,
        "headers": {name: headers[name] for name in sorted(shards & set(headers))},
    }


def search(call: Call) -> Any:
    """Models (or datasets, spaces) by tag, name and author, newest first unless sorted."""
    details = bool(call.request.query_params.getlist("expand"))
    found = []
    for repo in call.hub.store.visible(call.kind, call.user):
        if _name_matches(call, repo):
            value = describe(call, repo, repo.commit_of("main"), details=details)
            if _tags_match(call, value):
                found.append((repo, value))
    order = call.query("sort", "createdAt")
    if order not in ("createdAt", "lastModified", "downloads", "likes", "trendingScore"):
        raise bad_request(f"Can't sort by {order}")
    found.sort(key=lambda pair: str(pair[1].get(order, "")), reverse=call.query("direction") != "1")
    values = [_listed(call, repo, value) for repo, value in found]
    return page(call, values, min(int(call.query("limit") or 1000), call.hub.options.page_size))


def _name_matches(call: Call, repo: Repo) -> bool:
    """Looked at first: it costs nothing, and tags cost reading the repo."""
    author, gated = call.query("author"), call.query("gated")
    return (
        author in ("", repo.namespace)
        and call.query("search").lower() in repo.name.lower()
        and (not gated or (gated.lower() == "true") == bool(repo.settings.gated))
    )


def _tags_match(call: Call, value: dict[str, Any]) -> bool:
    filters = call.request.query_params.getlist("filter")
    wanted = {tag for item in filters for tag in item.split(",")}
    pipeline = call.query("pipeline_tag")
    return wanted <= set(value["tags"]) and pipeline in ("", value.get("pipeline_tag"))


def _listed(call: Call, repo: Repo, value: dict[str, Any]) -> dict[str, Any]:
    expand = call.request.query_params.getlist("expand")
    if expand:
        return {name: item for name, item in value.items() if name in {"_id", "id", *expand}}
    commit = value["sha"]
    if call.flag("cardData"):
        value["cardData"] = _card(repo, commit)
    if call.flag("full"):
        tree = repo.git.tree(commit).values()
        value["siblings"] = [_sibling(entry, False) for entry in tree if entry.is_file]
    return value
