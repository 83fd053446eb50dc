"""Where results go: a folder, or a repo on the Hub. Nothing half-written is ever in the place where
it would be loaded.

A folder is filled as ``.NAME.hubdiff-partial`` beside it and renamed when it is whole. A journal in
it names the files that are finished; a run that was killed goes on after them, once it has hashed
them again. A repo gets its files one by one, large ones stored as soon as they are written, and one
commit at the end.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubdiff.refs import ModelRef
from hubdiff.writer.folder import FolderSink
from hubdiff.writer.hub import HubSink
from hubdiff.writer.nowhere import Nowhere
from hubdiff.writer.output import OutputFile, disk_errors, write_all
from hubdiff.writer.sink import DELTA, RESULT, Kind, Published, Sink

__all__ = [
    "DELTA",
    "RESULT",
    "FolderSink",
    "HubSink",
    "Kind",
    "Nowhere",
    "OutputFile",
    "Published",
    "Sink",
    "disk_errors",
    "open_sink",
    "write_all",
]


@contextmanager
def open_sink(
    destination: ModelRef,
    kind: Kind,
    *,
    run: str | None = None,
    force: bool = False,
    private: bool = False,
    pr: bool = False,
) -> Iterator[Sink]:
    """The sink for a folder or a repo. ``run`` names work that may be resumed: what a killed run of
    the same name left finished is used. ``force`` replaces what stands there and is not of this
    kind. Raises ``OutputExists``."""
    if destination.path is not None:
        folder = FolderSink(destination.path, run or uuid.uuid4().hex, force=force)
        try:
            yield folder
        finally:
            if run is None:
                folder.discard()
        return
    assert destination.repo is not None
    with tempfile.TemporaryDirectory(prefix="hubdiff-") as staging:
        yield HubSink(destination, kind, Path(staging), force=force, private=private, pr=pr)
