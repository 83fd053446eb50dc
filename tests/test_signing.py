"""Signatures by key, with OpenSSF's model-signing: made, checked, and refused where they must be.
Keyless signing needs Sigstore's servers and is not tried here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import models
import on_hub
import pytest
from on_hub import NewName

import hubdiff
from hubdiff.devhub import DevHub
from hubdiff.errors import BadSignature, HubdiffError
from hubdiff.signing import SIGNATURE, Trust


def new_key(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as ser
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    lock = ser.BestAvailableEncryption(password) if password else ser.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, lock))
    public.write_bytes(
        key.public_key().public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    base = models.weights()
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "tuned", models.moved(base))
    models.save(tmp_path / "target", models.moved(base, 1e-3, 7))
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    return tmp_path / "delta"


def test_a_signed_delta_is_verified_and_applied(delta: Path, tmp_path: Path) -> None:
    private, public = new_key(tmp_path, "mine")
    signed = hubdiff.sign(delta, key=private)
    assert (delta / SIGNATURE).is_file()
    assert signed.by == "the key mine.pem"
    verified = hubdiff.verify(delta, signature=Trust(key=public))
    assert str(public) in (verified.signed_by or "")
    hubdiff.apply(delta, tmp_path / "target", output=tmp_path / "out", signature=Trust(key=public))
    # It is a delta as before, and the signature no part of what it rebuilds.
    hubdiff.apply(delta, tmp_path / "base", output=tmp_path / "own")
    assert SIGNATURE not in models.hashes(tmp_path / "own")


def test_the_signers_own_tool_agrees(delta: Path, tmp_path: Path) -> None:
    """model-signing's command, on the folder as it is."""
    private, public = new_key(tmp_path, "mine")
    hubdiff.sign(delta, key=private)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(delta)]
    command += ["--signature", str(delta / SIGNATURE), "--public_key", str(public)]
    command += ["--ignore_unsigned_files"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_who_signed_nothing_or_something_else_is_refused(delta: Path, tmp_path: Path) -> None:
    private, public = new_key(tmp_path, "mine")
    _, other = new_key(tmp_path, "other")
    with pytest.raises(BadSignature, match="not signed"):
        hubdiff.verify(delta, signature=Trust(key=public))
    hubdiff.sign(delta, key=private)
    with pytest.raises(BadSignature, match="other"):
        hubdiff.verify(delta, signature=Trust(key=other))
    out = tmp_path / "out"
    with pytest.raises(BadSignature):
        hubdiff.apply(delta, tmp_path / "target", output=out, signature=Trust(key=other))
    assert not out.exists()

    # A manifest that was changed after it was signed.
    manifest = delta / "hubdiff.json"
    document = json.loads(manifest.read_text())
    document["tuned"]["name"] = "better"
    manifest.write_text(json.dumps(document))
    with pytest.raises(BadSignature, match="mismatch"):
        hubdiff.verify(delta, signature=Trust(key=public))


@pytest.mark.parametrize("broken", [b"", b"{}", b"\x00" * 100, b'{"mediaType": 3}'])
def test_a_broken_signature_is_refused_in_words(delta: Path, tmp_path: Path, broken: bytes) -> None:
    _, public = new_key(tmp_path, "mine")
    (delta / SIGNATURE).write_bytes(broken)
    with pytest.raises(BadSignature):
        hubdiff.verify(delta, signature=Trust(key=public))


def test_a_signature_of_another_delta_is_refused(delta: Path, tmp_path: Path) -> None:
    private, public = new_key(tmp_path, "mine")
    models.save(tmp_path / "evil", models.moved(models.weights(), seed=5))
    hubdiff.push_delta(tmp_path / "evil", tmp_path / "evil delta", base=tmp_path / "base")
    hubdiff.sign(delta, key=private)
    shutil.copy(delta / SIGNATURE, tmp_path / "evil delta" / SIGNATURE)
    with pytest.raises(BadSignature, match="mismatch"):
        hubdiff.verify(tmp_path / "evil delta", signature=Trust(key=public))
    # And a layer that was exchanged under a signed manifest is found by its hash.
    layer = delta / "delta-00001-of-00001.safetensors"
    shutil.copy(tmp_path / "evil delta" / layer.name, layer)
    with pytest.raises(HubdiffError):
        hubdiff.verify(delta, signature=Trust(key=public))


def test_keys_that_can_t_be_used(
    delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubdiffError, match="no key"):
        hubdiff.sign(delta, key=tmp_path / "nothing.pem")
    (tmp_path / "text.pem").write_text("no key")
    with pytest.raises(HubdiffError, match="could not be signed"):
        hubdiff.sign(delta, key=tmp_path / "text.pem")
    private, public = new_key(tmp_path, "locked", b"secret")
    with pytest.raises(HubdiffError, match="could not be signed"):
        hubdiff.sign(delta, key=private)
    assert not (delta / SIGNATURE).exists()
    monkeypatch.setenv("HUBDIFF_KEY_PASSWORD", "secret")
    hubdiff.sign(delta, key=private)
    hubdiff.verify(delta, signature=Trust(key=public))
    with pytest.raises(HubdiffError, match="whose signature"):
        Trust.of(None, None, None)
    with pytest.raises(HubdiffError, match="whose signature"):
        Trust.of(public, "me@example.org", None)


def test_a_delta_on_the_hub_is_signed_by_a_commit(
    devhub: DevHub, delta: Path, new_name: NewName, tmp_path: Path
) -> None:
    private, public = new_key(tmp_path, "mine")
    repo = new_name()
    hubdiff.push_delta(tmp_path / "tuned", repo, base=tmp_path / "base")
    before = on_hub.head(devhub, repo)
    signed = hubdiff.sign(repo, key=private)
    assert on_hub.head(devhub, repo) == signed.where.partition("@")[2] != before
    devhub.log.clear()
    hubdiff.apply(repo, tmp_path / "target", output=tmp_path / "out", signature=Trust(key=public))
    with pytest.raises(BadSignature, match="not signed"):
        hubdiff.verify(f"{repo}@{before}", signature=Trust(key=public))


def forged(folder: Path, private: Path, **ignored: object) -> bytes:
    """A signature by the author's key, of a folder without a delta or with its files ignored."""
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(private_key=private)
    if ignored:
        config.set_hashing_config(hashing.Config().set_ignored_paths(**ignored))
    config.sign(folder, folder.parent / "forged.sig")
    return (folder.parent / "forged.sig").read_bytes()


def test_a_signature_that_leaves_the_manifest_out_vouches_for_nothing(
    delta: Path, tmp_path: Path
) -> None:
    private, public = new_key(tmp_path, "mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    full = tmp_path / "full"
    full.mkdir()
    (full / "hubdiff.json").write_text("{}")
    for made in (
        forged(empty, private),
        forged(full, private, paths=["hubdiff.json"], ignore_git_paths=True),
    ):
        (delta / SIGNATURE).write_bytes(made)
        with pytest.raises(BadSignature, match="not signed by"):
            hubdiff.verify(delta, signature=Trust(key=public))


@pytest.mark.parametrize("name", ["dsseEnvelope", "dsse_envelope"])
def test_a_bundle_that_can_be_read_in_two_ways_is_refused(
    delta: Path, tmp_path: Path, name: str
) -> None:
    """The author's signature of nothing, and beside it an envelope that nobody signed."""
    private, public = new_key(tmp_path, "mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    genuine = forged(empty, private)
    stranger, _ = new_key(tmp_path, "stranger")
    hubdiff.sign(delta, key=stranger)
    envelope = json.dumps(json.loads((delta / SIGNATURE).read_bytes())["dsseEnvelope"])
    extra = f', "{name}": {envelope}}}'.encode()
    first = genuine.rstrip()
    for bundle in (first[:-1] + extra, b"{" + extra[2:-1] + b", " + first[1:]):
        assert json.loads(bundle)
        (delta / SIGNATURE).write_bytes(bundle)
        with pytest.raises(BadSignature, match="field"):
            hubdiff.verify(delta, signature=Trust(key=public))


def test_keys_of_the_wrong_kind_are_refused_in_words(delta: Path, tmp_path: Path) -> None:
    private, _ = new_key(tmp_path, "mine")
    hubdiff.sign(delta, key=private)
    (tmp_path / "text.pub").write_text("no key")
    for key in (tmp_path / "text.pub", private):
        with pytest.raises(BadSignature):
            hubdiff.verify(delta, signature=Trust(key=key))


def test_a_link_in_place_of_the_signature_is_replaced(delta: Path, tmp_path: Path) -> None:
    private, public = new_key(tmp_path, "mine")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (delta / SIGNATURE).symlink_to(victim)
    hubdiff.sign(delta, key=private)
    assert victim.read_text() == "mine"
    hubdiff.verify(delta, signature=Trust(key=public))


def test_only_a_branch_is_signed(devhub: DevHub, delta: Path, new_name: NewName) -> None:
    private, public = new_key(delta.parent, "mine")
    repo = new_name()
    hubdiff.push_delta(delta.parent / "tuned", repo, base=delta.parent / "base")
    hubdiff.tag(repo, "v1")
    with pytest.raises(HubdiffError, match="no branch"):
        hubdiff.sign(f"{repo}@v1", key=private)
    hubdiff.sign(f"{repo}@main", key=private)
    # A new version of the delta does not keep the signature of the old one.
    hubdiff.push_delta(delta.parent / "target", repo, base=delta.parent / "base", force=True)
    with pytest.raises(BadSignature, match="is not signed"):
        hubdiff.verify(repo, signature=Trust(key=public))
