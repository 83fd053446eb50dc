"""A repo on the Hub, changed by one commit or pull request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hubdiff.errors import OutputExists
from hubdiff.files import safe_path
from hubdiff.hashing import hash_bytes
from hubdiff.manifest import FileRecord, WrittenFile
from hubdiff.refs import ModelRef, PinnedRef
from hubdiff.writer.output import OutputFile
from hubdiff.writer.sink import DELTA, RESULT, Kind, Published

# What the Hub itself puts into a new repo, or its web page offers to.
_GIT_ATTRIBUTES = ".gitattributes"
_CARD = "README.md"


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
        foreign = self._other_kind()
        if foreign and not (force or pr):
            self._refuse(destination)
        # One repo that is both a model and a delta would be neither.
        mixture = foreign and (kind is DELTA or DELTA.marker in self._existing)
        self._replace_all = force or mixture
        self._earlier = self._earlier_files()

    def _other_kind(self) -> bool:
        """Whether the repo holds anything that this kind of upload did not make."""
        if self._kind.marker in self._existing:
            return self._kind is RESULT and DELTA.marker in self._existing
        return bool(set(self._existing) - {_GIT_ATTRIBUTES, _CARD})

    def _refuse(self, destination: ModelRef) -> None:
        """Don't let a mistyped name replace somebody's model."""
        files = [info for info in self._existing.values() if info.path != _GIT_ATTRIBUTES]
        largest = max(files, key=lambda info: info.size)
        raise OutputExists(
            f"{destination} holds {largest.path} and is not a {self._kind.name} that hubdiff made",
            next_step="Choose another repo, open a pull request with --pr, or replace all that it "
            "holds with --force.",
        )

    def _earlier_files(self) -> set[str]:
        """The files of the result that stands there, as far as its record lists them."""
        if self._kind is not RESULT or RESULT.marker not in self._existing:
            return set()
        return {_CARD, *_listed(self._upload.read(RESULT.marker))}

    def done(self, path: str) -> WrittenFile | None:
        return None

    def open(self, path: str, size: int) -> OutputFile:
        return OutputFile(self.staging / safe_path(path), size)

    def finish(self, record: WrittenFile) -> None:
        local = self.staging / record.path
        self._upload.add(record.path, local)
        self._paths.add(record.path)
        local.unlink()

    def put(self, path: str, data: bytes) -> FileRecord:
        self._upload.add_bytes(path, data)
        self._paths.add(path)
        return FileRecord(path, len(data), hash_bytes(data))

    def copy(self, path: str, pin: PinnedRef, source: str) -> bool:
        if pin.repo is None:
            return False
        self._upload.copy(path, pin, source)
        self._paths.add(path)
        return True

    @property
    def parent(self) -> str:
        """The commit that the upload is built on."""
        return self._upload.parent

    def deposit(self) -> list[dict[str, Any]]:
        return self._upload.deposit()

    def accept(self, deposit: list[dict[str, Any]]) -> None:
        self._upload.accept(deposit)
        self._paths.update(entry["path"] for entry in deposit)

    def publish(self, message: str) -> Published:
        """Commit. What an earlier version had and this one lacks is deleted in the same commit, so
        that the repo never holds a mixture."""
        for path in self._existing:
            if path not in self._paths and self._goes(path):
                self._upload.delete(path)
        done = self._upload.commit(message)
        return Published(self._upload.repo, done.url, done.oid, done.pr_url)

    def _goes(self, path: str) -> bool:
        if path == _GIT_ATTRIBUTES:
            return False
        owned = any(fnmatchcase(path, glob) for glob in self._kind.owned)
        return self._replace_all or owned or path in self._earlier


class HubShare(HubSink):
    """Another rank's part of the commit that rank 0's ``HubSink`` makes on ``parent``."""

    def __init__(self, destination: ModelRef, staging: Path, parent: str, *, pr: bool) -> None:
        from hubdiff.hub import HubUpload, require_token

        require_token()
        assert destination.repo is not None
        self.staging = staging
        self._upload = HubUpload(
            destination.repo, revision=destination.revision, create_pr=pr, parent=parent
        )
        self._paths = set()


def _listed(record: bytes) -> Iterator[str]:
    """The paths in the record of a result. Anybody may have edited it: what is not understood is
    passed over."""
    try:
        document = json.loads(record)
    except (ValueError, RecursionError):
        return
    for key in ("files", "side_files"):
        entries = document.get(key) if isinstance(document, dict) else None
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                yield entry["path"]
