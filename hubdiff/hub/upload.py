"""One commit on one repo, collected file by file.

Large files are stored on the Hub as they are added, so that the caller may delete its copy at once;
they belong to no commit until ``commit`` makes one of everything, or a pull request. If it is never
called, the repo stays as it was. The commit names the parent that was read at the start: when
someone else commits meanwhile, it is refused rather than mixed.

Several processes may store files for one commit: each ``join``s the upload that one of them opened
and hands it a ``deposit`` of what it stored, as JSON.
"""

from __future__ import annotations

import base64
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import UploadInfo

from hubdiff.errors import HubConflict, RepoNotFound
from hubdiff.files import FileInfo, safe_path
from hubdiff.hub.client import api, model_info, quiet, subject
from hubdiff.hub.retry import retrying
from hubdiff.hub.translate import translated
from hubdiff.hub.tree import HubTree, damaged, list_files, no_file
from hubdiff.memory import give_back_freed_memory
from hubdiff.refs import ModelRef, PinnedRef

# The Hub keeps no file over 10 MB inside the commit itself, so any file it may ask for again at
# commit time is small enough to keep in memory.
IN_MEMORY = 16 << 20

# Sent in place of the repo's .gitignore: with it the Hub would drop files without a word.
_IGNORE_NOTHING = "# nothing is ignored\n"

_Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


@dataclass(frozen=True)
class Commit:
    """What a commit became: its page, its id, and the pull request's page if it is one."""

    url: str
    oid: str
    pr_url: str | None


class HubUpload:
    """One commit in the making. The repo is created if it does not exist, unless ``parent`` joins
    an upload that another process opened at that commit. Not for several threads at once."""

    def __init__(
        self,
        repo: str,
        *,
        revision: str | None = None,
        private: bool = False,
        create_pr: bool = False,
        parent: str | None = None,
    ) -> None:
        self.repo = repo
        self._revision = revision
        self._create_pr = create_pr
        self._parent = self._at(parent) if parent else self._open_repo(private)
        self._subject = subject(repo, revision)
        self._operations: list[_Operation] = []
        self._small: list[CommitOperationAdd] = []

    @property
    def parent(self) -> str:
        """The commit that this one is built on."""
        assert self._parent.commit is not None
        return self._parent.commit

    def existing_files(self) -> dict[str, FileInfo]:
        """What the repo holds at the parent commit."""
        return list_files(self._parent)

    def read(self, path: str) -> bytes:
        """A small file of the repo, as it is at the parent commit."""
        pinned = ModelRef(repo=self.repo, revision=self._parent.commit, path=None)
        return HubTree(pinned).read_bytes(path)

    def add(self, path: str, local: Path) -> None:
        """Add a file from disk; when this returns, ``local`` is no longer needed."""
        if local.stat().st_size <= IN_MEMORY:
            self.add_bytes(path, local.read_bytes())
            return
        operation = CommitOperationAdd(safe_path(path), local)
        give_back_freed_memory()
        self._store([operation])
        self._operations.append(operation)

    def add_bytes(self, path: str, data: bytes) -> None:
        operation = CommitOperationAdd(safe_path(path), data)
        self._small.append(operation)
        self._operations.append(operation)
        if sum(op.upload_info.size for op in self._small) > IN_MEMORY:
            self._store_small()

    def copy(self, path: str, source: PinnedRef, source_path: str) -> None:
        """Add a file that another repo holds. Large files are copied by the Hub itself; one that
        its storage can't copy goes through this machine's disk."""
        assert source.repo is not None
        entry = _describe(source, source_path)
        same_repo = source.repo == self.repo
        if entry.lfs is not None and (same_repo or entry.xet_hash):
            self._operations.append(
                CommitOperationCopy(
                    src_path_in_repo=source_path,
                    path_in_repo=safe_path(path),
                    src_revision=source.commit,
                    src_repo_id=None if same_repo else source.repo,
                    src_repo_type=None if same_repo else "model",
                )
            )
        else:
            self._carry(path, source, entry)

    def delete(self, path: str) -> None:
        self._operations.append(CommitOperationDelete(safe_path(path), is_folder=False))

    def deposit(self) -> list[dict[str, Any]]:
        """What was added here, as JSON for ``accept`` in the process that commits: of what the Hub
        stores apart from commits its name and hash, of the rest its content."""
        self._store_small()
        return [_as_json(operation) for operation in self._operations]

    def accept(self, deposit: list[dict[str, Any]]) -> None:
        """Add what another process stored."""
        self._operations += [_from_json(entry) for entry in deposit]

    def commit(self, message: str, description: str = "") -> Commit:
        """Make the commit, or the pull request. A repo that holds all of it already stays as it is
        and its latest commit is returned. Raises ``HubConflict`` when someone else committed since
        this upload began."""
        self._store_small()
        with translated(self._subject), quiet():
            if self._create_pr:
                # Nothing locks a pull request: sent twice, it might be opened twice.
                return self._send(message, description)
            try:
                return retrying(lambda: self._send(message, description))
            except HfHubHTTPError as error:
                mine = self._landed(message) if error.response.status_code == 412 else None
                if mine is None:
                    raise
                return mine

    def _send(self, message: str, description: str) -> Commit:
        done = api().create_commit(
            self.repo,
            self._operations,
            commit_message=message,
            commit_description=description,
            revision=self._revision,
            parent_commit=self._parent.commit,
            create_pr=self._create_pr,
        )
        return Commit(url=str(done.commit_url), oid=done.oid, pr_url=done.pr_url)

    def _landed(self, message: str) -> Commit | None:
        """Our own commit, when it is what made the parent stale: it was made and the answer got
        lost."""
        commits = api().list_repo_commits(self.repo, revision=self._revision)
        ids = [commit.commit_id for commit in commits[:2]]
        if ids[1:] != [self._parent.commit] or commits[0].title != message:
            return None
        url = f"{subject(self.repo).url}/commit/{ids[0]}"
        return Commit(url=url, oid=ids[0], pr_url=None)

    def _open_repo(self, private: bool) -> PinnedRef:
        """The commit to build on, in a repo that exists from here on."""
        try:
            info = model_info(self.repo, self._revision)
        except RepoNotFound:
            with translated(subject(self.repo)):
                retrying(
                    lambda: api().create_repo(self.repo, private=private or None, exist_ok=True)
                )
            info = model_info(self.repo, self._revision)
        if private and not info.private:
            raise HubConflict(
                f"{self.repo} exists and is public, and this belongs into a private repo",
                next_step="Make it private in its settings, choose another name, or say --public.",
            )
        return self._at(info.sha)

    def _at(self, commit: str | None) -> PinnedRef:
        ref = ModelRef(repo=self.repo, revision=self._revision, path=None)
        return PinnedRef(repo=self.repo, commit=commit, path=None, ref=ref)

    def _carry(self, path: str, source: PinnedRef, entry: RepoFile) -> None:
        assert source.repo is not None
        with tempfile.TemporaryDirectory(prefix="hubdiff-") as folder:
            with translated(subject(source.repo, source.commit, entry.path)), quiet():
                local = api().hf_hub_download(
                    source.repo, entry.path, revision=source.commit, local_dir=folder
                )
            content = CommitOperationAdd(path, local).upload_info.sha256.hex()
            if entry.lfs is not None and content != entry.lfs.sha256:
                raise damaged(source, entry.path)
            self.add(path, Path(local))

    def _store_small(self) -> None:
        if self._small:
            self._store(self._small)
            self._small = []

    def _store(self, additions: list[CommitOperationAdd]) -> None:
        """Send what the Hub stores apart from commits; the rest stays in memory until commit."""
        with translated(self._subject), quiet():
            api().preupload_lfs_files(
                self.repo,
                additions,
                revision=self._revision,
                create_pr=self._create_pr,
                gitignore_content=_IGNORE_NOTHING,
            )


def _as_json(operation: _Operation) -> dict[str, Any]:
    path = operation.path_in_repo
    if isinstance(operation, CommitOperationCopy):
        source = (operation.src_repo_id, operation.src_revision, operation.src_path_in_repo)
        return {"path": path, "copy": source}
    assert isinstance(operation, CommitOperationAdd), "only rank 0 deletes"
    if not operation._is_uploaded:
        return {"path": path, "content": operation.b64content().decode()}
    info = operation.upload_info
    stored = {"size": info.size, "sha256": info.sha256.hex(), "oid": operation._remote_oid}
    return {"path": path, "stored": stored}


def _from_json(entry: dict[str, Any]) -> _Operation:
    path = safe_path(entry["path"])
    if "copy" in entry:
        repo, revision, source = entry["copy"]
        kind = "model" if repo else None
        return CommitOperationCopy(source, path, revision, repo, kind)
    if "content" in entry:
        return CommitOperationAdd(path, base64.b64decode(entry["content"]))
    # As the client itself leaves an addition that it stored: named by hash, not sent again.
    operation, stored = CommitOperationAdd(path, b""), entry["stored"]
    operation.upload_info = UploadInfo(stored["size"], b"", bytes.fromhex(stored["sha256"]))
    operation._upload_mode, operation._should_ignore = "lfs", False
    operation._remote_oid, operation._is_uploaded = stored["oid"], True
    return operation


def _describe(source: PinnedRef, path: str) -> RepoFile:
    """A file as the Hub stores it: inside the commit, or apart from it and under which hash."""
    assert source.repo is not None
    repo = source.repo
    with translated(subject(repo, source.commit, path)):
        found = retrying(lambda: api().get_paths_info(repo, path, revision=source.commit))
    for entry in found:
        if isinstance(entry, RepoFile) and entry.path == path:
            return entry
    raise no_file(source, path)
