"""Bare git repositories, driven by git's own plumbing commands.

One ``git fast-import`` makes a whole commit. Trees are cached by commit, refs until the next write;
nothing else may write to these repositories while the server runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

POINTER_VERSION = b"version https://git-lfs.github.com/spec/v1\n"
POINTER_MAX_BYTES = 200
FULL_SHA = re.compile(r"[0-9a-f]{40}")
EMAIL = "devhub@localhost"


class GitError(Exception):
    pass


@dataclass(frozen=True)
class Pointer:
    """What git holds in place of a large file."""

    sha256: str
    size: int

    def text(self) -> bytes:
        return POINTER_VERSION + f"oid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @staticmethod
    def parse(blob: bytes) -> Pointer | None:
        found = re.fullmatch(rb"oid sha256:([0-9a-f]{64})\nsize (\d+)\n", blob[43:])
        if not blob.startswith(POINTER_VERSION) or found is None:
            return None
        return Pointer(found[1].decode(), int(found[2]))


@dataclass(frozen=True)
class TreeEntry:
    path: str
    is_file: bool
    oid: str
    size: int
    lfs: Pointer | None = None


@dataclass(frozen=True)
class LoggedCommit:
    oid: str
    author: str
    timestamp: int
    title: str
    message: str


@dataclass(frozen=True)
class Change:
    """``content`` of None deletes the file or the folder."""

    path: str
    content: bytes | None


class GitRepo:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._refs: dict[str, str] | None = None
        self._writes = 0
        self.tree = lru_cache(maxsize=32)(self._read_tree)

    @classmethod
    def create(cls, folder: Path) -> GitRepo:
        folder.mkdir(parents=True)
        repo = cls(folder)
        # No template: sample hooks would be most of the files on the disk.
        repo.run("init", "--bare", "--quiet", "--template=", "--initial-branch=main", str(folder))
        return repo

    def run(self, *args: str, stdin: bytes = b"", ok: Sequence[int] = (0,)) -> bytes:
        done = subprocess.run(
            ["git", f"--git-dir={self.folder}", *args],
            input=stdin,
            capture_output=True,
            env=_environment(),
            check=False,
        )
        if done.returncode not in ok:
            raise GitError(f"git {args[0]}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout

    def refs(self) -> dict[str, str]:
        """Full ref name → commit (annotated tags are peeled)."""
        known, writes = self._refs, self._writes
        if known is None:
            lines = self.run("for-each-ref", "--format=%(refname) %(objectname) %(*objectname)")
            fields = [line.split() for line in lines.decode().splitlines()]
            known = {name: oids[-1] for name, *oids in fields}
            if writes == self._writes:  # otherwise they may be older than a write made meanwhile
                self._refs = known
        return known

    def _refs_changed(self) -> None:
        self._writes += 1
        self._refs = None

    def resolve(self, revision: str) -> str | None:
        """A branch, a tag, a full ref or a full commit id; nothing of git's own revision syntax."""
        refs = self.refs()
        revision = "main" if revision == "HEAD" else revision
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in refs:
                return refs[name]
        if FULL_SHA.fullmatch(revision) and self._is_commit(revision):
            return revision
        return None

    def _is_commit(self, oid: str) -> bool:
        return self.run("cat-file", "--batch-check", stdin=oid.encode()).split()[1:2] == [b"commit"]

    def set_ref(self, name: str, commit: str | None) -> None:
        if commit is None:
            self.run("update-ref", "-d", name)
        else:
            self.run("update-ref", name, commit)
        self._refs_changed()

    def annotated_tag(self, name: str, commit: str, message: str) -> None:
        self.run("tag", "--annotate", f"--message={message}", name, commit)
        self._refs_changed()

    def is_ref_name(self, name: str) -> bool:
        try:
            self.run("check-ref-format", name)
        except GitError:
            return False
        return True

    def read_blob(self, oid: str) -> bytes:
        return self.run("cat-file", "blob", oid)

    def _read_tree(self, commit: str) -> dict[str, TreeEntry]:
        listing = self.run("ls-tree", "-r", "-t", "-l", "-z", "--full-tree", commit)
        rows = []
        for line in listing.split(b"\0")[:-1]:
            facts, _, path = line.partition(b"\t")
            _, kind, oid, size = facts.split()
            rows.append((path.decode(), kind == b"blob", oid.decode(), size))
        small = [oid for _, is_file, oid, size in rows if is_file and int(size) < POINTER_MAX_BYTES]
        pointers = self._pointers(small)
        return {
            path: _entry(path, is_file, oid, int(size) if is_file else 0, pointers.get(oid))
            for path, is_file, oid, size in rows
        }

    def _pointers(self, oids: Sequence[str]) -> dict[str, Pointer]:
        answer = self.run("cat-file", "--batch", stdin="\n".join(oids).encode())
        found, position = {}, 0
        for oid in oids:
            end = answer.index(b"\n", position)
            size = int(answer[position:end].split()[2])
            pointer = Pointer.parse(answer[end + 1 : end + 1 + size])
            if pointer is not None:
                found[oid] = pointer
            position = end + size + 2
        return found

    def commit(
        self, ref: str, parent: str | None, message: str, author: str, changes: Iterable[Change]
    ) -> str:
        """One commit on ``ref``. Fails, and moves nothing, unless it is a fast-forward."""
        feed = [f"feature done\ncommit {ref}\nmark :1\n".encode(), _committer(author)]
        feed.append(_data(message.encode()))
        if parent is not None:
            feed.append(f"from {parent}\n".encode())
        for change in changes:
            path = _quoted(change.path)
            if change.content is None:
                feed.append(b"D " + path + b"\n")
            else:
                feed += [b"M 100644 inline " + path + b"\n", _data(change.content)]
        feed.append(b"get-mark :1\ndone\n")
        oid = self.run("fast-import", "--quiet", stdin=b"".join(feed)).decode().strip()
        self._refs_changed()
        return oid

    def squash(self, ref: str, message: str) -> str:
        oid = self.run("commit-tree", f"{self.refs()[ref]}^{{tree}}", "-m", message)
        self.set_ref(ref, oid.decode().strip())
        return self.refs()[ref]

    def merge_tree(self, ours: str, theirs: str) -> tuple[str | None, list[str]]:
        """The merged tree, or None and the paths that conflict."""
        answer = self.run("merge-tree", "--write-tree", "--name-only", ours, theirs, ok=(0, 1))
        tree, *rest = answer.decode().split("\n")
        conflicts = rest[: rest.index("")]
        return (None, conflicts) if conflicts else (tree, [])

    def merge(self, ref: str, theirs: str, tree: str, message: str) -> str:
        ours = self.refs()[ref]
        oid = self.run("commit-tree", tree, "-p", ours, "-p", theirs, "-m", message)
        self.set_ref(ref, oid.decode().strip())
        return self.refs()[ref]

    def diff(self, base: str, head: str) -> str:
        return self.run("diff", f"{base}...{head}").decode(errors="replace")

    def log(
        self, commit: str, *, limit: int = 1, skip: int = 0, path: str | None = None
    ) -> list[LoggedCommit]:
        form = "--format=%H%x1f%an%x1f%ct%x1f%s%x1f%b"
        only = ["--", f":(literal){path}"] if path is not None else []
        text = self.run("log", "-z", form, f"-{limit}", f"--skip={skip}", commit, *only).decode()
        rows = [row.split("\x1f") for row in text.split("\0") if row]
        return [
            LoggedCommit(oid, author, int(when), title, body.strip())
            for oid, author, when, title, body in rows
        ]

    def count(self, commit: str) -> int:
        return int(self.run("rev-list", "--count", commit))


def _entry(path: str, is_file: bool, oid: str, size: int, lfs: Pointer | None) -> TreeEntry:
    return TreeEntry(path, is_file, oid, lfs.size if lfs else size, lfs)


def _committer(name: str) -> bytes:
    return f"committer {name} <{EMAIL}> {int(time.time())} +0000\n".encode()


def _data(content: bytes) -> bytes:
    return b"data %d\n" % len(content) + content + b"\n"


def _quoted(path: str) -> bytes:
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'.encode()


def _environment() -> dict[str, str]:
    """The user's own git settings must not change what the server does."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_AUTHOR_NAME": "devhub",
        "GIT_AUTHOR_EMAIL": EMAIL,
        "GIT_COMMITTER_NAME": "devhub",
        "GIT_COMMITTER_EMAIL": EMAIL,
        "LC_ALL": "C",
    }
