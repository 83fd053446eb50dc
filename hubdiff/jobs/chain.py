"""Every link of a delta's ancestry: its base, and where that is a result itself, the deltas and the
target that made it, and so on, down to models that nobody made with hubdiff."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hubdiff import fields
from hubdiff.checkpoint import MANIFEST, read_json
from hubdiff.delta import Delta
from hubdiff.errors import CheckpointError, IntegrityError, UnsafePath
from hubdiff.files import FileTree, open_tree
from hubdiff.hashing import check_hash, hash_bytes, hash_reader, tensor_hash
from hubdiff.manifest import FileRecord, MadeFile, Manifest, WrittenFile, read_manifest
from hubdiff.progress import Progress
from hubdiff.refs import ModelRef
from hubdiff.writer import RESULT

_MOST_LINKS = 1000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDER = "a local folder, which nobody else can look at"


@dataclass(frozen=True)
class Link:
    """``made`` was made from ``origin``, a pinned ref or the name of a folder; ``files`` of the
    origin were found to be those that were recorded. ``end`` says why nothing comes before it."""

    made: str
    origin: str
    files: int
    end: str | None = None


def check_chain(delta: Delta, progress: Progress) -> list[Link]:
    """Follow every pin and compare what is there with what was recorded when it was used: files by
    the hashes that the Hub lists or that are computed here, manifests by their sha256. Raises
    ``IntegrityError`` at the first that differs, ``HubError`` for one that is gone."""
    chain = _Chain(progress)
    return chain.walk(delta)


@dataclass(frozen=True)
class _Step:
    """An origin to look at: what it was used for, its pin, and its files as recorded."""

    made: str
    name: str
    repo: str | None
    commit: str | None
    files: Sequence[FileRecord]


class _Chain:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._waiting: deque[_Step] = deque()
        self._seen: set[str] = set()
        self._links: list[Link] = []

    def walk(self, delta: Delta) -> list[Link]:
        self._queue_base(str(delta.tree.pin), delta.manifest)
        while self._waiting:
            self._visit(self._waiting.popleft())
            if len(self._links) > _MOST_LINKS:
                raise IntegrityError(
                    f"the chain of {delta.tree.pin} has more than {_MOST_LINKS:,} links",
                    next_step="Nobody makes that many: ask the owners of the repos.",
                )
        return self._links

    def _queue_base(self, made: str, manifest: Manifest) -> None:
        base = manifest.base
        self._waiting.append(_Step(made, base.name, base.repo, base.commit, base.files))

    def _visit(self, step: _Step) -> None:
        if step.repo is None:
            self._links.append(Link(step.made, step.name, 0, _FOLDER))
            return
        tree = open_tree(ModelRef(repo=step.repo, revision=step.commit, path=None))
        files = _check_listed(tree, step.files)
        end: str | None = None
        if RESULT.marker not in tree.files():
            end = "no result of hubdiff"
        elif str(tree.pin) in self._seen:
            end = "checked before"
        self._links.append(Link(step.made, str(tree.pin), files, end))
        if end is None:
            self._seen.add(str(tree.pin))
            self._follow(tree)

    def _follow(self, tree: FileTree) -> None:
        """A result: its own files, its target, and every delta on it."""
        record, made = read_json(tree, RESULT.marker), str(tree.pin)
        where = f"{made}/{RESULT.marker}"
        written = [_file(item, where) for item in _objects(record, "files", where)]
        deltas = _objects(record, "deltas", where)
        if not deltas:
            raise _bad(where, "names no delta")
        self._progress.start("hashing results", sum(file.size for file in written))
        for file in written:
            _check_written(tree, file)
            self._progress.advance(file.size)
        self._progress.finish()
        target = record.get("target")
        if not isinstance(target, dict):
            raise _bad(where, "names no target")
        recorded = [f for f in _objects(target, "files", where) if f.get("sha256")]
        files = [file for f in recorded if isinstance(file := _file(f, where), FileRecord)]
        self._waiting.append(_Step(made, *_pin(target, where), files))
        _check_all_told(tree, written, files, where)
        for item in deltas:
            self._follow_delta(made, item, where)

    def _follow_delta(self, made: str, item: dict[str, Any], where: str) -> None:
        name, repo, commit = _pin(item, where)
        if repo is None:
            self._links.append(Link(made, name, 0, _FOLDER))
            return
        tree = open_tree(ModelRef(repo=repo, revision=commit, path=None))
        expected = item.get("manifest_sha256")
        data = tree.read_bytes(MANIFEST)
        check_hash(hash_bytes(data), str(expected), f"{tree.pin}/{MANIFEST}")
        manifest = read_manifest(tree)
        listed = [file for files in manifest.layers.values() for file in files]
        files = _check_listed(tree, [*listed, *manifest.side_files])
        self._links.append(Link(made, str(tree.pin), 1 + files))
        if str(tree.pin) not in self._seen:
            self._seen.add(str(tree.pin))
            self._queue_base(str(tree.pin), manifest)


def _check_all_told(
    tree: FileTree, written: Sequence[WrittenFile], target: Sequence[FileRecord], where: str
) -> None:
    """Every weights file of a result was written by hubdiff, or is one of the target's."""
    known = {file.path for file in written}
    hashes = {file.sha256 for file in target}
    for path, info in tree.files().items():
        weights = path.endswith(".safetensors") and "/" not in path
        if weights and path not in known and info.sha256 not in hashes:
            raise IntegrityError(
                f"{where} does not say where {path} comes from",
                next_step="Somebody changed it: ask its owner.",
            )


def _check_listed(tree: FileTree, files: Sequence[FileRecord]) -> int:
    """Files by sha256: as the Hub lists them, or hashed here where nothing is listed."""
    for file in files:
        info = tree.files().get(file.path)
        where = f"{tree.pin}/{file.path}"
        if info is None:
            raise IntegrityError(
                f"{where} is missing", next_step="Somebody changed it: ask its owner."
            )
        if info.sha256 is None:
            check_hash(hash_bytes(tree.read_bytes(file.path)), file.sha256, where)
        else:
            check_hash(info.sha256, file.sha256, where)
    return len(files)


def _check_written(tree: FileTree, file: WrittenFile) -> None:
    if isinstance(file, FileRecord):
        _check_listed(tree, [file])
        return
    where = f"{tree.pin}/{file.path}"
    if file.path not in tree.files():
        raise IntegrityError(f"{where} is missing", next_step="Somebody changed it: ask its owner.")
    with tree.open(file.path) as reader:
        check_hash(hash_reader(reader, tensor_hash()), file.blake3, where)


def _objects(holder: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    items = holder.get(name)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _bad(where, f"{name} is no list of objects")
    return items


def _file(item: dict[str, Any], where: str) -> WrittenFile:
    try:
        path, size = fields.path(item.get("path")), fields.natural(item.get("size"))
        if item.get("sha256") is not None:
            return FileRecord(path, size, fields.digest(item["sha256"]))
        return MadeFile(path, size, fields.digest(item.get("blake3")))
    except (fields.WrongField, UnsafePath) as error:
        raise _bad(where, "has a file without path, size or hash") from error


def _pin(item: dict[str, Any], where: str) -> tuple[str, str | None, str | None]:
    name, repo, commit = (item.get(key) for key in ("name", "repo", "commit"))
    if not isinstance(name, str) or not isinstance(repo, str | None):
        raise _bad(where, "names a model or a delta without saying which")
    if repo is not None and not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
        raise _bad(where, f"names {repo} without the commit of it")
    return name, repo, commit if repo is not None else None


def _bad(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where} {what}", next_step="The record is damaged: ask its owner.")
