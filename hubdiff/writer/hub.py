"""A repo on the Hub, changed by one commit or pull request."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from hubdiff.errors import OutputExists
from hubdiff.files import safe_path
from hubdiff.hashing import hash_bytes
from hubdiff.manifest import FileRecord
from hubdiff.refs import ModelRef, PinnedRef
from hubdiff.writer.output import OutputFile
from hubdiff.writer.sink import Kind, Published


class HubSink:
    """A commit, or a pull request, on the Hub. Files are stored on the Hub one by one and deleted
    here; the repo changes at ``publish`` only."""

    def __init__(
        self,
        destination: ModelRef,
        kind: Kind,
        staging: Path,
        *,
        force: bool,
        private: bool,
        pr: bool,
    ) -> None:
        from hubdiff.hub import HubUpload, require_token

        require_token()
        assert destination.repo is not None
        self.staging = staging
        self._kind = kind
        self._upload = HubUpload(
            destination.repo, revision=destination.revision, private=private, create_pr=pr
        )
        self._existing = self._upload.existing_files()
        self._paths: set[str] = set()
        if not (force or pr):
            self._refuse_other_kind(destination)

    def _refuse_other_kind(self, destination: ModelRef) -> None:
        """Don't let a mistyped name replace somebody's model."""
        weights = [path for path in self._existing if path.endswith((".safetensors", ".bin"))]
        if weights and self._kind.marker not in self._existing:
            raise OutputExists(
                f"{destination} holds {weights[0]} and is not a {self._kind.name} that hubdiff "
                "made",
                next_step="Choose another repo, open a pull request with --pr, or replace it with "
                "--force.",
            )

    def done(self, path: str) -> FileRecord | None:
        return None

    def open(self, path: str, size: int) -> OutputFile:
        return OutputFile(self.staging / safe_path(path), size)

    def finish(self, record: FileRecord) -> None:
        local = self.staging / record.path
        self._upload.add(record.path, local)
        self._paths.add(record.path)
        local.unlink()

    def put(self, path: str, data: bytes) -> FileRecord:
        self._upload.add_bytes(path, data)
        self._paths.add(path)
        return FileRecord(path, len(data), hash_bytes(data))

    def copies_from(self, pin: PinnedRef) -> bool:
        return pin.repo is not None

    def copy(self, path: str, pin: PinnedRef, source: str) -> None:
        self._upload.copy(path, pin, source)
        self._paths.add(path)

    def publish(self, message: str) -> Published:
        """Commit. What an earlier version had and this one lacks is deleted in the same commit, so
        that the repo never holds a mixture."""
        for path in self._existing:
            owned = any(fnmatchcase(path, glob) for glob in self._kind.owned)
            if owned and path not in self._paths:
                self._upload.delete(path)
        done = self._upload.commit(message)
        return Published(self._upload.repo, done.url, done.oid, done.pr_url)
