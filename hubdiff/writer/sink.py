"""What a place for results offers, whatever it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hubdiff.manifest import FileRecord, WrittenFile
from hubdiff.refs import PinnedRef
from hubdiff.writer.output import OutputFile


@dataclass(frozen=True)
class Published:
    """Where a result is: ``where`` is the folder or repo, ``url`` the commit's page."""

    where: str
    url: str | None = None
    commit: str | None = None
    pr_url: str | None = None


@dataclass(frozen=True)
class Kind:
    """What is published. ``marker`` is the file that every repo of this kind has; ``owned`` are the
    globs of files that belong to it and go when a new version lacks them."""

    name: str
    marker: str
    owned: tuple[str, ...]


DELTA = Kind(
    "delta",
    "hubdiff.json",
    # A signature is of the manifest it was made for, and goes with it.
    (
        *("delta-*", "tail-*", "exact-*", "delta.safetensors.index.json", "tuned/*", "base/*"),
        *("sample.safetensors", "vocabulary.json.zst", "base-vocabulary.json.zst", "hubdiff.sig"),
    ),
)
RESULT = Kind("result", "hubdiff-result.json", ("*.safetensors", "*.safetensors.index.json"))


class Sink(Protocol):
    """Takes the files of a result. Use as a context; without ``publish`` nothing appears."""

    staging: Path

    def done(self, path: str) -> WrittenFile | None:
        """The record of a file that an earlier run finished, checked again; else None."""

    def open(self, path: str, size: int) -> OutputFile:
        """A file to write, inside ``staging``."""

    def finish(self, record: WrittenFile) -> None:
        """The file is whole in ``staging``, closed, and has this content."""

    def put(self, path: str, data: bytes) -> FileRecord:
        """A small file, whole."""

    def copy(self, path: str, pin: PinnedRef, source: str) -> bool:
        """Take a file from where it lies without its bytes passing here; False: not possible."""

    def deposit(self) -> list[dict[str, Any]]:
        """All that was taken, as JSON for the sink that publishes it; nothing is taken after."""

    def accept(self, deposit: list[dict[str, Any]]) -> None:
        """Take what another rank's sink of the same place took."""

    def publish(self, message: str) -> Published:
        """Make all of it visible at once."""
