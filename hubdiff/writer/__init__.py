"""Where results go: a folder, or a repo on the Hub. Nothing half-written is ever in the place where
it would be loaded.

A folder is filled as ``.NAME.hubdiff-partial`` beside it and renamed when it is whole. A journal in
it names the files that are finished; a run that was killed goes on after them, once it has hashed
them again. A lock keeps two runs from filling the same folder. A repo gets its files one by one,
large ones stored as soon as they are written, and one commit at the end.

Several ranks fill one place together: rank 0's sink is the place, the others' are shares of it.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from hubdiff.files import FileTree
from hubdiff.ranks import ALONE, Ranks
from hubdiff.refs import ModelRef
from hubdiff.writer.folder import FolderShare, FolderSink
from hubdiff.writer.hub import HubShare, HubSink
from hubdiff.writer.lock import only_run
from hubdiff.writer.memory import Memory, TensorFile
from hubdiff.writer.nowhere import Nowhere
from hubdiff.writer.output import (
    OutputFile,
    begin_writeback,
    disk_errors,
    require_place,
    write_all,
    write_whole,
)
from hubdiff.writer.place import output_folder, refuse_place
from hubdiff.writer.sink import DELTA, RESULT, Kind, Published, Sink

_OPENING = "opening the place for the result"

__all__ = [
    "DELTA",
    "RESULT",
    "FolderSink",
    "HubSink",
    "Kind",
    "Memory",
    "Nowhere",
    "OutputFile",
    "Published",
    "Sink",
    "TensorFile",
    "begin_writeback",
    "disk_errors",
    "only_run",
    "open_sink",
    "output_folder",
    "refuse_place",
    "require_place",
    "write_all",
    "write_whole",
]


@contextmanager
def open_sink(
    destination: ModelRef,
    kind: Kind,
    *,
    reads: Sequence[FileTree] = (),
    run: str | None = None,
    force: bool = False,
    private: bool = False,
    pr: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Sink]:
    """The sink for a folder or a repo, on each of ``ranks``, all of which call it. ``reads`` are
    what the work reads: their folders stay. ``run`` names work that may be resumed: what a killed
    run of the same name left finished is used. ``force`` replaces what stands there and is not of
    this kind. Raises ``OutputExists``."""
    if destination.path is not None:
        folders = [tree.pin.path for tree in reads if tree.pin.path is not None]
        if ranks.first:
            with _folder_sink(destination.path.absolute(), run, folders, force, ranks) as sink:
                yield sink
        else:
            word = ranks.broadcast(None, _OPENING)
            share = FolderShare(destination.path, ranks.rank, word)
            with closing(share):
                _all_there(ranks)
                yield share
        return
    assert destination.repo is not None
    with tempfile.TemporaryDirectory(prefix="hubdiff-") as staging:
        yield _hub_sink(destination, kind, Path(staging), force, private, pr, ranks)


def _all_there(ranks: Ranks) -> None:
    """Nobody writes before every rank found the place."""
    ranks.gather(None, _OPENING)


@contextmanager
def _folder_sink(
    folder: Path, run: str | None, reads: Sequence[Path], force: bool, ranks: Ranks
) -> Iterator[FolderSink]:
    # Before the lock too, so that a place that is refused is not even touched.
    refuse_place(folder, reads, force=force)
    with only_run(folder):
        sink = FolderSink(folder, run or uuid.uuid4().hex, reads, force=force)
        try:
            if ranks.size > 1:
                _invite(sink, ranks)
            yield sink
        finally:
            if run is None:
                sink.discard()


def _invite(sink: FolderSink, ranks: Ranks) -> None:
    try:
        ranks.broadcast(sink.invite(), _OPENING)
        _all_there(ranks)
    except BaseException:
        if not sink.resumed:
            sink.discard()
        raise


def _hub_sink(
    destination: ModelRef,
    kind: Kind,
    staging: Path,
    force: bool,
    private: bool,
    pr: bool,
    ranks: Ranks,
) -> Sink:
    if not ranks.first:
        parent = ranks.broadcast(None, _OPENING)
        return HubShare(destination, staging, parent, pr=pr)
    sink = HubSink(destination, kind, staging, force=force, private=private, pr=pr)
    ranks.broadcast(sink.parent, _OPENING)
    return sink
