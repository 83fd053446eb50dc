"""sign: a signature beside the manifest of a delta."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubdiff.checkpoint import MANIFEST
from hubdiff.errors import RefError
from hubdiff.files import open_tree
from hubdiff.manifest import read_manifest
from hubdiff.refs import ModelRef
from hubdiff.signing import SIGNATURE, sign_manifest
from hubdiff.writer import write_whole

PASSWORD = "HUBDIFF_KEY_PASSWORD"


@dataclass(frozen=True)
class Signed:
    """``where`` the delta is, ``by`` what it was signed; ``url`` of the commit."""

    where: str
    by: str
    file: str = SIGNATURE
    url: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def sign(delta: str | Path, *, key: str | Path | None = None) -> Signed:
    """Sign a delta, in a folder or on the Hub.

    Args:
        delta: a folder, or a repo that you may write to; on the Hub the signature is a commit.
        key: a private key, a PEM file of an elliptic curve; its password, if it has one, is in
            HUBDIFF_KEY_PASSWORD. Without a key Sigstore asks who you are (keyless).

    A signature that is there already is replaced. Needs ``pip install "hubdiff[sign]"``. Raises
    ``HubdiffError``.
    """
    ref = ModelRef.parse(delta)
    if ref.repo is not None and ref.revision is not None:
        _require_branch(ref.repo, ref.revision)
    tree = open_tree(ref)
    read_manifest(tree)
    data = sign_manifest(
        tree.read_bytes(MANIFEST), key=key, password=os.environ.get(PASSWORD) or None
    )
    by = "Sigstore" if key is None else f"the key {Path(key).name}"
    if ref.path is not None:
        write_whole(ref.path / SIGNATURE, data)
        return Signed(str(tree.pin), by)
    from hubdiff.hub import HubUpload

    assert ref.repo is not None
    upload = HubUpload(ref.repo, revision=ref.revision, parent=tree.pin.commit)
    upload.add_bytes(SIGNATURE, data)
    commit = upload.commit("Sign the delta")
    return Signed(f"{ref.repo}@{commit.oid}", by, url=commit.url)


def _require_branch(repo: str, revision: str) -> None:
    """A signature is a commit, and only a branch takes one."""
    from hubdiff.hub import pointers

    if revision not in pointers(repo).branches:
        raise RefError(
            f"{repo}@{revision} is no branch, and a signature is a commit",
            next_step=f"Sign the branch, hubdiff sign {repo}, and then tag that commit.",
        )
