"""A repo on the Hub as a tree of files, at one commit."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import AbstractContextManager, closing
from functools import cached_property
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.hf_api import RepoFile

from hubdiff.errors import HubError, IntegrityError, RemoteFileNotFound
from hubdiff.files import ByteReader, BytesReader, FileInfo, LocalReader, read_whole, safe_path
from hubdiff.hub.client import api, endpoint, model_info, quiet, subject
from hubdiff.hub.ranges import RemoteFile, RemoteReader
from hubdiff.hub.translate import translated
from hubdiff.refs import ModelRef, PinnedRef

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pin(ref: ModelRef) -> PinnedRef:
    """The commit a ref stands for now. A ref that is a commit already costs no request."""
    assert ref.repo is not None
    commit = ref.revision or ""
    if not _COMMIT.fullmatch(commit):
        commit = model_info(ref.repo, ref.revision).sha or ""
    if not _COMMIT.fullmatch(commit):
        raise HubError(
            f"{ref} has no commit", next_step="Upload something to it first, or check the name."
        )
    return PinnedRef(repo=ref.repo, commit=commit, path=None, ref=ref)


def list_files(at: PinnedRef) -> dict[str, FileInfo]:
    """Every file at a commit, by path."""
    assert at.repo is not None
    with translated(subject(at.repo, at.commit)):
        entries = list(api().list_repo_tree(at.repo, recursive=True, revision=at.commit))
    return {
        safe_path(entry.path): FileInfo(
            entry.path,
            entry.size,
            entry.lfs.sha256 if entry.lfs else None,
            None if entry.lfs else entry.blob_id,
        )
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def no_file(at: PinnedRef, path: str) -> RemoteFileNotFound:
    return RemoteFileNotFound(
        f"there is no {path} in {at}",
        next_step=f"Look at {endpoint()}/{at.repo}/tree/{at.commit}.",
    )


def has_content(info: FileInfo, data: bytes) -> bool:
    """Whether these are the bytes that the Hub lists."""
    if info.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == info.sha256
    blob = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
    blob.update(data)
    return blob.hexdigest() == info.git_id


def damaged(at: PinnedRef, path: str) -> IntegrityError:
    return IntegrityError(
        f"{at}/{path}: the bytes that came are not those that the Hub lists",
        next_step="Run it again; if it happens again, remove the file from the local Hub cache "
        "(`hf cache`), or tell the repo's owner.",
    )


class HubTree:
    """The files of one commit. A file that the local Hub cache holds is read from there; of any
    other file only the ranges asked for are fetched, unless ``cache`` says to download it whole
    into that cache first.

    A small file has no sha256 in the listing: it is read whole, checked against git's id, and
    remembered. Ranges of a large one can't be checked one by one; that is up to who reads them
    all."""

    def __init__(self, ref: ModelRef, *, cache: bool = False) -> None:
        self.pin = pin(ref)
        self._download_whole = cache
        self._remote: dict[str, RemoteFile] = {}
        self._small: dict[str, bytes] = {}
        self._downloaded: set[str] = set()  # into the cache, by this tree: it did cost traffic

    def files(self) -> dict[str, FileInfo]:
        return self._files

    @cached_property
    def _files(self) -> dict[str, FileInfo]:
        return list_files(self.pin)

    def open(self, path: str) -> AbstractContextManager[ByteReader]:
        info = self._info(path)
        small = info.sha256 is None
        return closing(BytesReader(self.read_bytes(path)) if small else self._reader(info))

    def read_bytes(self, path: str) -> bytes:
        info = self._info(path)
        if path in self._small:
            return self._small[path]
        with closing(self._reader(info)) as reader:
            data = read_whole(reader, path)
        if not has_content(info, data):
            raise damaged(self.pin, path)
        if info.sha256 is None:
            self._small[path] = data
        return data

    def _reader(self, info: FileInfo) -> ByteReader:
        local = self._cached(info)
        if local is None and self._download_whole:
            local = self._download(info.path)
        if local is not None:
            return LocalReader(local)
        file = self._remote.setdefault(info.path, RemoteFile(self.pin, info, endpoint()))
        return RemoteReader(file)

    def is_remote(self, path: str) -> bool:
        return path in self._downloaded or self._cached(self._info(path)) is None

    def _info(self, path: str) -> FileInfo:
        info = self._files.get(path)
        if info is None:
            raise no_file(self.pin, path)
        return info

    def _cached(self, info: FileInfo) -> Path | None:
        """The file in the local Hub cache; one of another size was cut short and does not count."""
        assert self.pin.repo is not None
        found = try_to_load_from_cache(self.pin.repo, info.path, revision=self.pin.commit)
        if isinstance(found, str) and os.path.getsize(found) == info.size:
            return Path(found)
        return None

    def _download(self, path: str) -> Path:
        assert self.pin.repo is not None
        self._downloaded.add(path)
        with translated(subject(self.pin.repo, self.pin.commit, path)), quiet():
            return Path(api().hf_hub_download(self.pin.repo, path, revision=self.pin.commit))
