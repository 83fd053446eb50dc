"""Signatures of deltas, by OpenSSF's model-signing (the extra ``sign``).

What is signed is the manifest, hubdiff.json. It names every layer and side file by sha256, so a
signature of it is one of them all; the card and its picture are not covered. The signature is a
file of the delta, ``hubdiff.sig``, a Sigstore bundle that model-signing's own command verifies too.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubdiff.checkpoint import MANIFEST
from hubdiff.errors import BadSignature, HubdiffError
from hubdiff.files import FileTree
from hubdiff.hashing import hash_bytes

SIGNATURE = "hubdiff.sig"
ISSUER = "https://github.com/login/oauth"
_MOST_BYTES = 4 << 20  # of a signature


@dataclass(frozen=True)
class Trust:
    """Who must have signed: the owner of a public ``key`` (a PEM file of an elliptic curve), or an
    ``identity`` (an e-mail address, a workflow) as ``issuer`` vouches for it through Sigstore."""

    key: Path | None = None
    identity: str | None = None
    issuer: str = ISSUER

    @classmethod
    def of(cls, key: str | Path | None, identity: str | None, issuer: str | None) -> Trust:
        """Raises ``HubdiffError`` unless exactly one of key and identity is given."""
        if (key is None) == (identity is None):
            raise HubdiffError(
                "whose signature is wanted has to be said",
                next_step="Give --key FILE, the signer's public key, or --signed-by IDENTITY.",
            )
        return cls(Path(key) if key is not None else None, identity, issuer or ISSUER)

    def __str__(self) -> str:
        return f"the key {self.key}" if self.key else f"{self.identity} ({self.issuer})"


def sign_manifest(data: bytes, *, key: str | Path | None, password: str | None = None) -> bytes:
    """The signature of a manifest: by a private ``key`` (PEM, elliptic curve), or without one by
    whoever logs in with Sigstore (keyless; asks in a browser, in CI takes the workflow's own
    identity). Raises ``HubdiffError``."""
    with _library() as library, _staged({MANIFEST: data}) as folder:
        config, signature = library.signing.Config(), folder.parent / SIGNATURE
        path = _readable(key) if key is not None else None
        try:
            if path is not None:
                secret = password.encode() if password and _is_locked(path) else None
                config.use_elliptic_key_signer(private_key=path, password=secret)
            else:
                config.use_sigstore_signer(use_ambient_credentials=True)
            config.sign(folder, signature)
        except Exception as error:  # of four libraries, whose common class this is
            raise HubdiffError(
                f"it could not be signed with {path or 'Sigstore'}: {_said(error)}",
                next_step="A key is a private one in PEM, of the curve P-256, P-384 or P-521; "
                "its password goes into HUBDIFF_KEY_PASSWORD."
                if path
                else "Keyless signing needs a browser or a CI with an identity token.",
            ) from error
        return signature.read_bytes()


def check_signature(tree: FileTree, trust: Trust) -> None:
    """Raise ``BadSignature`` unless the manifest of the delta in ``tree`` is signed by whom
    ``trust`` names."""
    where = str(tree.pin)
    if SIGNATURE not in tree.files():
        raise BadSignature(
            f"{where} is not signed", next_step="Ask its author to sign it: hubdiff sign DELTA."
        )
    if tree.files()[SIGNATURE].size > _MOST_BYTES:
        raise BadSignature(f"{where}/{SIGNATURE} is no signature: it is too large")
    files = {MANIFEST: tree.read_bytes(MANIFEST)}
    with _library() as library, _staged(files) as folder:
        signature = folder.parent / SIGNATURE
        bundle = tree.read_bytes(SIGNATURE)
        key = _readable(trust.key) if trust.key is not None else None
        try:
            envelope = _envelope(bundle)
            signature.write_bytes(bundle)
            config = library.verifying.Config()
            if key is not None:
                config.use_elliptic_key_verifier(public_key=key)
            else:
                config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.issuer)
            config.verify(folder, signature)
            _check_signed(envelope, files[MANIFEST])
        except Exception as error:  # of four libraries, whose common class this is
            raise BadSignature(
                f"{where} is not signed by {trust}: {_said(error)}",
                next_step="Do not use it before you know why: ask its author.",
            ) from error


def _envelope(bundle: bytes) -> dict[str, Any]:
    """What is signed, from a bundle that two readers can't read in two ways: the library checks the
    signature of the envelope that it finds, and this must be the same one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("it names a field twice")
        return found

    document = json.loads(bundle, object_pairs_hook=unique)
    if set(document) != {"mediaType", "verificationMaterial", "dsseEnvelope"}:
        raise ValueError("it has other fields than a bundle of model-signing")
    envelope: dict[str, Any] = document["dsseEnvelope"]
    if set(envelope) != {"payload", "payloadType", "signatures"}:
        raise ValueError("its envelope has other fields than one of model-signing")
    return envelope


def _check_signed(envelope: dict[str, Any], manifest: bytes) -> None:
    """What was signed is this manifest and nothing else. The library takes from the signature which
    files it is to leave out: one of no files, or of others, would vouch for anything."""
    resources = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
    signed = [(one["name"], one["algorithm"], one["digest"]) for one in resources]
    if signed != [(MANIFEST, "sha256", hash_bytes(manifest))]:
        raise ValueError(f"mismatch: what was signed is not {MANIFEST} as it is")


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _library() -> Iterator[Any]:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise HubdiffError(
            "signatures need the package model-signing",
            next_step="Run pip install 'hubdiff[sign]'.",
        ) from error
    yield model_signing


@contextmanager
def _staged(files: dict[str, bytes]) -> Iterator[Path]:
    """The files in a folder of their own, the way the library wants them."""
    with tempfile.TemporaryDirectory(prefix="hubdiff-") as place:
        folder = Path(place) / "delta"
        folder.mkdir()
        for path, data in files.items():
            (folder / path).write_bytes(data)
        yield folder


def _is_locked(key: Path) -> bool:
    """Whether a PEM file asks for a password."""
    return b"ENCRYPTED" in key.read_bytes()


def _readable(key: str | Path) -> Path:
    path = Path(key).expanduser()
    if not path.is_file():
        raise HubdiffError(f"there is no key {path}", next_step="Give the path of a PEM file.")
    return path
