"""Which folders may be filled, and which ``--force`` may replace. Nobody loses files that are no
result of hubdiff, nor the ones the command itself reads, by a slip in an argument."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hubdiff.errors import OutputError, OutputExists, RefError
from hubdiff.refs import ModelRef
from hubdiff.writer.output import disk_errors
from hubdiff.writer.sink import DELTA, RESULT


def output_folder(output: str | os.PathLike[str]) -> ModelRef:
    """The folder that a user named. Raises ``RefError`` for no name at all: an empty one, as an
    unset variable leaves it, would be the current folder."""
    text = os.fspath(output)
    if not text.strip() or "\0" in text:
        raise RefError(
            f"{text!r} is not the name of a folder", next_step="Say where the result is to go."
        )
    return ModelRef(repo=None, revision=None, path=Path(os.path.expanduser(text)))


def refuse_place(folder: Path, reads: Iterable[Path], *, force: bool) -> None:
    """Raise ``OutputExists`` unless ``folder`` is new, empty or, with ``force``, a model or delta
    that nobody needs. ``reads`` are the folders that this run reads."""
    with disk_errors(folder):
        _refuse_no_folder(folder)
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        if not force:
            raise OutputExists(
                f"{folder} exists and is not empty",
                next_step="Choose another place, or replace what is there with --force.",
            )
        _refuse_in_use(folder, reads)
        _refuse_foreign(folder)


def _refuse_no_folder(folder: Path) -> None:
    if folder.is_symlink():
        raise OutputExists(
            f"{folder} is a link to {os.readlink(folder)}",
            next_step="Name the folder that it leads to, or choose another place.",
        )
    if folder.exists() and not folder.is_dir():
        raise OutputExists(
            f"{folder} exists and is not a folder", next_step="Choose another place."
        )
    if os.path.ismount(folder):
        # A result appears by a rename, and a mount point can't be renamed.
        raise OutputError(
            f"{folder} is a mount point, which can't be replaced by a result",
            next_step=f"Choose a folder inside it, such as {folder / 'result'}.",
        )


def _refuse_in_use(folder: Path, reads: Iterable[Path]) -> None:
    # As text: where nobody knows the home folder it stays "~", and no error.
    home = Path(os.path.expanduser("~"))
    for kept, what in (
        *((path, "which this command reads") for path in reads),
        (Path.cwd(), "the current folder"),
        (home, "your home folder"),
    ):
        if _lies_in(kept, folder):
            raise OutputExists(
                f"{folder} can't be replaced: it is or holds {kept}, {what}",
                next_step="Choose another place.",
            )


def _lies_in(path: Path, folder: Path) -> bool:
    """Asked of the disk, not of the names: some disks take "A" and "a" for the same."""
    path = path.resolve()
    return any(place.exists() and place.samefile(folder) for place in (path, *path.parents))


def _refuse_foreign(folder: Path) -> None:
    markers = {DELTA.marker, RESULT.marker}
    if any(file.name in markers or file.suffix == ".safetensors" for file in folder.iterdir()):
        return
    raise OutputExists(
        f"{folder} holds neither a model nor a delta, and --force replaces nothing else",
        next_step="Choose another place, or empty that folder yourself.",
    )
