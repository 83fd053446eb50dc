"""One repo: a bare git repository, its settings, and the large objects it may refer to.

A repo may only point at objects that were uploaded or copied to it, as on the Hub: knowing a
sha256 is not enough to read someone else's file.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .git import Change, GitRepo, TreeEntry
from .refusal import bad_request, entry_not_found, revision_not_found

LFS_SUFFIXES = (
    "7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb "
    "pickle pkl pt pth rar safetensors tar tflite tgz wasm xz zip zst"
)
GITATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split()
)
NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)


@dataclass
class Settings:
    visibility: str = "public"
    gated: str | bool = False
    allowed: list[str] = field(default_factory=list)
    created_at: float = field(default_factory=time.time)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    publishers: list[dict[str, Any]] = field(default_factory=list)


class Repo:
    """``lock`` is held by whoever reads refs in order to write them."""

    def __init__(self, kind: str, name: str, folder: Path) -> None:
        self.kind = kind
        self.name = name
        self.git = GitRepo(folder)
        self.lock = threading.RLock()
        self.settings = Settings(**json.loads(self._settings_file.read_text()))
        self._objects = set(self._objects_file.read_text().split())

    @classmethod
    def create(cls, kind: str, name: str, folder: Path, settings: Settings, author: str) -> Repo:
        git = GitRepo.create(folder)
        attributes = Change(".gitattributes", GITATTRIBUTES.encode())
        git.commit("refs/heads/main", None, "initial commit", author, [attributes])
        (folder / "devhub.json").write_text(json.dumps(asdict(settings)))
        (folder / "devhub-objects.txt").touch()
        return cls(kind, name, folder)

    @property
    def _settings_file(self) -> Path:
        return self.git.folder / "devhub.json"

    @property
    def _objects_file(self) -> Path:
        return self.git.folder / "devhub-objects.txt"

    def moved_to(self, name: str, folder: Path) -> Repo:
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.git.folder.rename(folder)
        return Repo(self.kind, name, folder)

    def save_settings(self) -> None:
        temporary = self._settings_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self.settings)))
        temporary.replace(self._settings_file)

    def owns_object(self, sha256: str) -> bool:
        return sha256 in self._objects

    def add_object(self, sha256: str) -> None:
        with self.lock:
            if sha256 not in self._objects:
                self._objects.add(sha256)
                with self._objects_file.open("a") as file:
                    file.write(sha256 + "\n")

    @property
    def namespace(self) -> str:
        return self.name.partition("/")[0]

    @property
    def url_path(self) -> str:
        return self.name if self.kind == "model" else f"{self.kind}s/{self.name}"

    def commit_of(self, revision: str) -> str:
        commit = self.git.resolve(revision)
        if commit is None:
            raise revision_not_found(revision)
        return commit

    def entry(self, commit: str, path: str) -> TreeEntry:
        entry = self.git.tree(commit).get(path)
        if entry is None:
            raise entry_not_found(path, commit)
        return entry

    def text(self, commit: str, path: str) -> str | None:
        """A small text file, or None where there is none."""
        entry = self.git.tree(commit).get(path)
        if entry is None or not entry.is_file or entry.lfs is not None:
            return None
        return self.git.read_blob(entry.oid).decode(errors="replace")


def check_repo_name(name: str) -> str:
    parts = name.split("/")
    bad = any(NAME.fullmatch(p) is None or "--" in p or ".." in p or len(p) > 96 for p in parts)
    if bad or len(parts) > 2 or name.endswith(".git"):
        raise bad_request(f"Invalid repo name: {name!r}")
    return name


def check_path(path: str) -> str:
    """A file path inside a repo; anything that could leave its folder is refused."""
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or "\\" in path or "\0" in path:
        raise bad_request(f"Invalid path in repo: {path!r}")
    return path
