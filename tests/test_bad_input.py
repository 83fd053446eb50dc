"""Whatever is wrong: an error that names the file and the way out, nothing lost or half-written.

On folders; what the Hub can refuse is in tests/hub.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from models import hashes, moved, save
from safetensors.torch import load_file, save_file

import hubdiff
from hubdiff.errors import (
    BadIndex,
    BadManifest,
    BadSafetensors,
    CannotDiff,
    CheckpointError,
    CorruptPayload,
    DiskFull,
    HubdiffError,
    IntegrityError,
    IsADelta,
    NewerFormat,
    NotADelta,
    NoWeights,
    OutputError,
    OutputExists,
    RefError,
    UnsafePath,
    WrongBase,
)
from hubdiff.hashing import hash_bytes
from hubdiff.writer import FolderSink

RECORDS = {"hubdiff-result.json", "README.md"}


@contextmanager
def refused(kind: type[HubdiffError], *words: object) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    for word in words:
        assert str(word) in str(caught.value)
    assert caught.value.next_step


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Every file of ``folder`` stays as it is, and none is added."""
    before = hashes(folder), sorted(path for path in folder.rglob("*"))
    yield
    assert (hashes(folder), sorted(path for path in folder.rglob("*"))) == before


def small() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.a.weight": torch.randn(40, 8, generator=generator).bfloat16(),
        "layer.b.weight": torch.randn(20, generator=generator),
        "layer.c.weight": torch.arange(9, dtype=torch.int8),
        "layer.d.weight": torch.ones(3, dtype=torch.float16),
    }


def tuned_of(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With something in every group of layer files."""
    new = moved(old, step=1e-2)
    new["layer.a.weight"][0, 0] = -0.0
    new["layer.a.weight"][1, :4] = torch.tensor([float("nan"), 1e30, -1e-30, float("inf")])
    new["layer.c.weight"] = old["layer.c.weight"] + 1
    new["head.weight"] = torch.randn(6, generator=torch.Generator().manual_seed(1)).half()
    return new


class World:
    """A base, a tuned model, their delta, and another target."""

    def __init__(self, folder: Path, *, plain: bool = False) -> None:
        old = small()
        self.folder, self.out = folder, folder / "out"
        self.base = save(folder / "base", old)
        self.tuned = save(
            folder / "tuned", tuned_of(old), files={"tokenizer.json": "{}"}, eos_token_id=9
        )
        self.target = save(folder / "target", moved(old, step=0.1, seed=7), bos_token_id=5)
        self.delta = folder / "delta"
        hubdiff.push_delta(self.tuned, self.delta, base=self.base, plain=plain)

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.delta / "hubdiff.json"
        document = json.loads(path.read_bytes())
        change(document)
        path.write_text(json.dumps(document))

    def apply(self, to: Path | None = None, **options: Any) -> Any:
        return hubdiff.apply(self.delta, to or self.base, output=self.out, **options)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- models that can't be read: as tuned, as base, as target ---


def damage_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"BF17"'))


def overlap(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = sorted(
        (v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )
    entries[1]["data_offsets"] = [offset - 2 for offset in entries[1]["data_offsets"]]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + text + data[8 + length :])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def stale_index(folder: Path) -> None:
    save_file({"x": torch.ones(1)}, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"y": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def duplicates(folder: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(small(), names[0]) | {"layer.a.weight": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def hole(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0\0")


def no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{'single': 'quotes'}")


BROKEN: dict[str, tuple[Callable[[Path], None], type[HubdiffError], tuple[str, ...]]] = {
    "truncated": (truncate, BadSafetensors, ("model.safetensors", "truncated")),
    "bytes too many": (hole, BadSafetensors, ("model.safetensors", "after the last tensor")),
    "overlap": (overlap, BadSafetensors, ("model.safetensors", "overlaps", "layer.")),
    "unknown dtype": (damage_header, BadSafetensors, ("model.safetensors", "BF17")),
    "only pickle": (only_pickle, NoWeights, ("pytorch_model.bin", "pickle")),
    "an adapter": (only_adapter, NoWeights, ("adapter",)),
    "stale index": (stale_index, BadIndex, ("model.safetensors.index.json", "'y'")),
    "a tensor twice": (duplicates, CheckpointError, ("layer.", "00001-of", "00002-of")),
    "no JSON": (no_config, CheckpointError, ("config.json", "not JSON")),
}


@pytest.mark.parametrize("side", ["tuned", "base", "target"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_by_name(world: World, case: str, side: str) -> None:
    spoil, kind, words = BROKEN[case]
    folder = getattr(world, side)
    spoil(folder)
    with untouched(world.folder), refused(kind, folder, *words):
        if side == "target":
            world.apply(world.target)
        else:
            hubdiff.push_delta(world.tuned, world.folder / "new", base=world.base)


def test_a_file_name_that_leaves_its_folder_is_refused(world: World) -> None:
    (world.tuned / "..\\evil.json").write_text("{}")
    with untouched(world.folder), refused(UnsafePath, "evil.json"):
        hubdiff.push_delta(world.tuned, world.folder / "new", base=world.base)


# --- one thing in the place of another ---


def test_a_delta_is_not_a_model(world: World) -> None:
    push = hubdiff.push_delta
    with untouched(world.folder):
        with refused(IsADelta, world.delta):
            push(world.delta, world.folder / "new", base=world.base)
        with refused(IsADelta, world.delta):
            push(world.tuned, world.folder / "new", base=world.delta)
        with refused(IsADelta, world.delta):
            world.apply(world.delta)
        with refused(IsADelta, world.delta):
            hubdiff.verify(world.delta, base=world.delta)


def test_a_model_is_not_a_delta(world: World) -> None:
    jobs: list[Callable[[], object]] = [
        lambda: hubdiff.apply(world.tuned, world.base, output=world.out),
        lambda: hubdiff.verify(world.tuned),
        lambda: hubdiff.unpack(world.tuned, world.out),
        lambda: hubdiff.inspect(world.tuned),
        lambda: hubdiff.open_delta(world.tuned).__enter__(),
    ]
    with untouched(world.folder):
        for job in jobs:
            with refused(NotADelta, world.tuned, "hubdiff.json"):
                job()


@pytest.mark.parametrize("ref", ["./nowhere", "not a ref", "", "a/b/c"])
def test_what_is_no_ref_is_refused(world: World, ref: str) -> None:
    with untouched(world.folder):
        for job in (
            lambda: hubdiff.push_delta(ref, world.folder / "new", base=world.base),
            lambda: hubdiff.push_delta(world.tuned, world.folder / "new", base=ref),
            lambda: hubdiff.apply(world.delta, ref, output=world.out),
            lambda: hubdiff.apply(ref, world.base, output=world.out),
        ):
            with refused(RefError):
                job()


def test_options_that_contradict_are_refused(world: World) -> None:
    with untouched(world.folder):
        with refused(RefError):
            hubdiff.apply(world.delta, world.base)
        with refused(RefError):
            hubdiff.apply(world.delta, world.base, output=world.out, push_to="org/x")
        with refused(RefError, "folder"):
            hubdiff.apply(world.delta, world.base, push_to=str(world.out.parent))
        with refused(RefError, "toaster"):
            world.apply(device="toaster")
        with refused(CannotDiff, "include"):
            hubdiff.push_delta(
                world.tuned, world.folder / "new", base=world.base, include=["no such *"]
            )
        with refused(CannotDiff, "base_model"):
            hubdiff.push_delta(world.tuned, world.folder / "new")


# --- manifests ---


def test_a_newer_format_is_refused_by_every_job(world: World) -> None:
    world.edit(lambda document: document.update(format_version=2))
    with untouched(world.folder):
        for job in (
            world.apply,
            lambda: hubdiff.verify(world.delta),
            lambda: hubdiff.unpack(world.delta, world.out),
            lambda: hubdiff.inspect(world.delta),
        ):
            with refused(NewerFormat, world.delta / "hubdiff.json"):
                job()


def _layer(document: dict[str, Any], group: str = "delta") -> dict[str, Any]:
    found: dict[str, Any] = document["layers"][group][0]
    return found


def _tensor(document: dict[str, Any], name: str = "layer.a.weight") -> dict[str, Any]:
    return next(tensor for tensor in document["tensors"] if tensor["name"] == name)


Change = Callable[[dict[str, Any]], object]
MANIFESTS: dict[str, tuple[Change, type[HubdiffError], tuple[str, ...]]] = {
    "a field is missing": (lambda d: d.pop("tensors"), BadManifest, ("'tensors'", "missing")),
    "a layer file leaves the folder": (
        lambda d: _layer(d).update(path="../../delta.safetensors"),
        BadManifest,
        ("layers.delta[0].path",),
    ),
    "a tuned file leaves the folder": (
        lambda d: d["tuned"]["files"][1].update(path="/etc/cron.d/x"),
        BadManifest,
        ("tuned.files[1].path", "/etc/cron.d/x"),
    ),
    "a layer file that is not there": (
        lambda d: _layer(d).update(path="delta-00009-of-00001.safetensors"),
        BadManifest,
        ("delta-00009-of-00001.safetensors", "missing"),
    ),
    "a layer file of another size": (
        lambda d: _layer(d).update(size=12),
        CorruptPayload,
        ("delta-00001-of-00001.safetensors", "12"),
    ),
    "a payload of another size": (
        lambda d: _tensor(d)["parts"][0].update(bytes=12),
        CorruptPayload,
        ("layer.a.weight", "12"),
    ),
    "a payload of another hash": (
        lambda d: _tensor(d)["parts"][0].update(blake3="0" * 64),
        IntegrityError,
        ("layer.a.weight",),
    ),
    "an unknown encoding": (
        lambda d: _tensor(d)["parts"][0].update(encoding="quantum"),
        CorruptPayload,
        ("layer.a.weight", "quantum"),
    ),
    "an encoding that can't be": (
        lambda d: _tensor(d, "head.weight")["parts"][0].update(encoding="packed"),
        CorruptPayload,
        ("head.weight",),
    ),
    "a tensor that no file has": (
        lambda d: _tensor(d).update(tuned_name="layer.z.weight"),
        BadManifest,
        ("hubdiff.json", "layer.a.weight"),
    ),
    "another shape": (
        lambda d: _tensor(d).update(shape=[320]),
        HubdiffError,
        ("layer.a.weight",),
    ),
    "a base hash that is wrong": (
        lambda d: _tensor(d).update(base="1" * 64),
        HubdiffError,
        ("layer.a.weight",),
    ),
    "a rebuilt file of another hash": (
        lambda d: d["tuned"]["files"][0].update(sha256="1" * 64),
        IntegrityError,
        ("model.safetensors",),
    ),
    "a side file of another hash": (
        lambda d: [f.update(sha256="1" * 64) for f in d["tuned"]["files"] if f["path"][0] == "t"],
        HubdiffError,
        ("tokenizer.json",),
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_lies_is_found_out(world: World, case: str) -> None:
    change, kind, words = MANIFESTS[case]
    world.edit(change)
    if case in ("another shape", "a base hash that is wrong"):
        # The base then isn't the own base any more, as far as anyone can tell.
        with refused(HubdiffError, *words):
            hubdiff.verify(world.delta, base=world.base)
        return
    with refused(kind, *words):
        world.apply()
    assert not world.out.exists()


def test_no_base_files_are_no_proof_of_the_own_base(world: World) -> None:
    """An empty list is not "all of them are there"."""
    world.edit(lambda document: document["base"].update(files=[]))
    assert world.apply(world.target).plan["case"] == "transfer"


def _forge(world: World, name: str, group: str, data: bytes, **changes: Any) -> None:
    """Replace a payload, and every hash and size that would tell: the work of a hostile author."""
    path = world.delta / f"{group}-00001-of-00001.safetensors"
    tensors = load_file(path)
    tensors[name] = torch.tensor(list(data), dtype=torch.uint8)
    save_file(tensors, path)

    def change(document: dict[str, Any]) -> None:
        part = next(p for p in _tensor(document, name)["parts"] if p["group"] == group)
        part.update(bytes=len(data), blake3=blake3.blake3(data).hexdigest(), **changes)
        record = _layer(document, group)
        record.update(size=path.stat().st_size, sha256=hash_bytes(path.read_bytes()))

    world.edit(change)


def _payload(world: World, name: str, group: str = "delta") -> bytes:
    path = world.delta / f"{group}-00001-of-00001.safetensors"
    return bytes(load_file(path)[name].tolist())


FORGED: dict[str, Callable[[bytes], bytes]] = {
    "an index that claims less": lambda data: (
        (int.from_bytes(data[:4], "little") - 1).to_bytes(4, "little") + data[4:]
    ),
    "an index that claims more": lambda data: b"\xff\xff\xff\x7f" + data[4:],
    "nothing but an index": lambda data: data[:8],
    "less than an index": lambda data: data[:3],
    "noise": lambda data: data[:8] + bytes(len(data) - 8),
    "a variant from nowhere": lambda data: data[:8] + b"\x63" + data[9:],
}


@pytest.mark.parametrize("case", FORGED)
@pytest.mark.parametrize("job", ["apply", "transfer", "verify", "unpack", "get_tensor"])
def test_a_forged_payload_is_found_out(world: World, case: str, job: str) -> None:
    name = "layer.a.weight"
    _forge(world, name, "delta", FORGED[case](_payload(world, name)))
    with refused(CorruptPayload, name):
        if job == "apply":
            world.apply()
        elif job == "transfer":
            world.apply(world.target)
        elif job == "verify":
            hubdiff.verify(world.delta)
        elif job == "unpack":
            hubdiff.unpack(world.delta, world.out)
        else:
            with hubdiff.open_delta(world.delta) as delta:
                delta.get_tensor(name)
    assert not world.out.exists()


def test_a_payload_that_decodes_to_more_than_declared_is_found_out(world: World) -> None:
    world.edit(lambda document: (document.pop("sample"), _tensor(document).update(shape=[39, 8])))
    smaller = {n: t[:39] if n == "layer.a.weight" else t for n, t in small().items()}
    target = save(world.folder / "smaller", smaller)
    with refused(CorruptPayload, "layer.a.weight"):
        world.apply(target)
    with refused(CorruptPayload, "layer.a.weight"):
        hubdiff.unpack(world.delta, world.out)
    assert not world.out.exists()


def test_a_huge_shape_asks_for_no_memory(world: World) -> None:
    """A shape of 2^48 elements over a payload of a few bytes: refused by its index."""
    world.edit(lambda document: _tensor(document).update(shape=[2**24, 2**24]))
    with refused(CorruptPayload, "layer.a.weight", "too few for its index"):
        hubdiff.verify(world.delta)
    with refused(HubdiffError):  # by the disk, where it reserves what a file will take
        hubdiff.unpack(world.delta, world.out)
    assert not world.out.exists()


# --- flipped and missing bytes ---


def _outcome(world: World, to: Path) -> dict[str, str] | str:
    """The files of the result without the records about it, or the name of the error."""
    shutil.rmtree(world.out, ignore_errors=True)
    shutil.rmtree(world.folder / ".out.hubdiff-partial", ignore_errors=True)
    try:
        world.apply(to)
    except HubdiffError as error:
        if error.next_step is None or world.out.exists():
            raise
        return type(error).__name__
    return {path: digest for path, digest in hashes(world.out).items() if path not in RECORDS}


def _places(size: int, wanted: int) -> list[int]:
    """The first bytes, where headers and indices are, and a spread over the rest."""
    return sorted({*range(min(size, 24)), *range(0, size, max(1, size // wanted)), size - 1})


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_a_flipped_byte_anywhere_never_gives_a_wrong_result(tmp_path: Path, plain: bool) -> None:
    world = World(tmp_path, plain=plain)
    good = {to: _outcome(world, to) for to in (world.base, world.target)}
    assert all(isinstance(outcome, dict) for outcome in good.values())
    caught = 0
    files = [p for p in hashes(world.delta) if p not in ("README.md", "layers.png", "hubdiff.json")]
    assert {file.split("-")[0] for file in files} >= {"delta", "exact", "tuned/config.json"}
    for file in files:
        data = (world.delta / file).read_bytes()
        for place in _places(len(data), 12):
            damaged = bytearray(data)
            damaged[place] ^= 1 << place % 8
            (world.delta / file).write_bytes(damaged)
            for to, expected in good.items():
                outcome = _outcome(world, to)
                assert outcome == expected or isinstance(outcome, str), (file, place)
                caught += isinstance(outcome, str)
            # verify reads everything that the manifest lists.
            if not file.endswith(".index.json"):
                with pytest.raises(HubdiffError):
                    hubdiff.verify(world.delta)
        (world.delta / file).write_bytes(data)
    assert caught > 50
    assert {to: _outcome(world, to) for to in good} == good


def test_a_flipped_byte_in_the_manifest_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Never anything but a HubdiffError; and what an own-base rebuild gives is right."""
    world = World(tmp_path)
    good = _outcome(world, world.base)
    path = world.delta / "hubdiff.json"
    data = path.read_bytes()
    errors = 0
    for place in range(0, len(data), max(1, len(data) // 150)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 7
        path.write_bytes(damaged)
        shutil.rmtree(world.out, ignore_errors=True)
        try:
            applied = world.apply()
        except HubdiffError as error:
            if error.next_step is None:
                raise
            errors += 1
            continue
        if applied.plan["case"] == "own base":
            result = {p: d for p, d in hashes(world.out).items() if p not in RECORDS}
            assert result == good, place
    assert errors > 50


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
@pytest.mark.parametrize("group", ["delta", "exact"])
def test_a_truncated_layer_file_is_refused_by_name(world: World, group: str, keep: int) -> None:
    path = world.delta / f"{group}-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    for job in (world.apply, lambda: hubdiff.verify(world.delta)):
        with refused(HubdiffError, path.name):
            job()
    assert not world.out.exists()


def test_a_missing_side_file_is_refused_by_name(world: World) -> None:
    (world.delta / "tuned/tokenizer.json").unlink()
    for job in (
        world.apply,
        lambda: world.apply(world.target),
        lambda: hubdiff.verify(world.delta),
    ):
        with refused(HubdiffError, "tuned/tokenizer.json"):
            job()
    assert not world.out.exists()


# --- the wrong base ---


def test_the_wrong_base_is_named(world: World) -> None:
    with refused(WrongBase, world.target):
        hubdiff.verify(world.delta, base=world.target)
    changed = {name: tensor.clone() for name, tensor in small().items()}
    changed["layer.b.weight"][-1] += 1
    with refused(WrongBase, "layer.b.weight"):
        hubdiff.verify(world.delta, base=save(world.folder / "changed", changed))


def test_the_wrong_tuned_model_is_named(world: World) -> None:
    with refused(IntegrityError, world.base / "model.safetensors"):
        hubdiff.verify(world.delta, tuned=world.base)


def test_a_target_of_the_base_weights_without_its_files_is_not_the_own_base(world: World) -> None:
    """A rebuild would need the base's generation_config.json; it is not invented."""
    (world.base / "generation_config.json").unlink()
    plan = world.apply().plan
    assert plan["case"] == "transfer"
    assert "generation_config.json" in plan["reason"]


# --- places to write to ---


def _put(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


PLACES: dict[str, Callable[[Path], object]] = {
    "a folder in use": _put,
    "a file": lambda path: path.write_text("mine"),
    "a link": lambda path: path.symlink_to(path.parent / "base"),
    "a link to nowhere": lambda path: path.symlink_to(path.parent / "nowhere"),
}


@pytest.mark.parametrize("case", PLACES)
def test_an_output_that_exists_is_left_alone(world: World, case: str) -> None:
    PLACES[case](world.out)
    with untouched(world.folder):
        for job in (
            world.apply,
            lambda: hubdiff.push_delta(world.tuned, world.out, base=world.base),
            lambda: hubdiff.unpack(world.delta, world.out),
        ):
            with refused(OutputExists, world.out):
                job()


def test_force_replaces_a_folder_and_an_empty_one_needs_none(world: World) -> None:
    world.out.mkdir()
    world.apply()
    (world.out / "mine.txt").write_text("mine")
    world.apply(force=True)
    assert not (world.out / "mine.txt").exists()
    assert {path.name for path in world.folder.iterdir() if path.name.startswith(".")} == set()


def test_force_keeps_what_was_there_when_the_work_fails(world: World) -> None:
    _put(world.out)
    (world.out / "model.safetensors").write_bytes(b"an older model")
    (world.delta / "delta-00001-of-00001.safetensors").write_bytes(b"")
    with refused(CorruptPayload):
        world.apply(force=True)
    assert (world.out / "mine.txt").read_text() == "mine"


def test_a_place_below_a_file_is_said_in_words(world: World) -> None:
    (world.folder / "file").write_text("mine")
    for job in (
        lambda: hubdiff.apply(world.delta, world.base, output=world.folder / "file/out"),
        lambda: hubdiff.push_delta(world.tuned, world.folder / "file/out", base=world.base),
    ):
        with untouched(world.folder), refused(OutputError, "file"):
            job()


# --- a full disk ---


@contextmanager
def tiny_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "hubdiff-test", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_leaves_no_result(tmp_path: Path) -> None:
    world = World(tmp_path)
    large = {"layer.x.weight": torch.randn(40_000)}
    base = save(tmp_path / "b", {**small(), **large})
    tuned = save(tmp_path / "t", moved({**small(), **large}))
    hubdiff.push_delta(tuned, tmp_path / "d", base=base)
    with tiny_disk(tmp_path / "disk", 64 << 10) as disk:
        with refused(DiskFull, disk):
            hubdiff.apply(tmp_path / "d", base, output=disk / "out")
        assert not (disk / "out").exists()
        shutil.rmtree(disk / ".out.hubdiff-partial")
        with refused(DiskFull, disk):
            hubdiff.push_delta(tuned, disk / "new", base=base)
        assert list(disk.iterdir()) == []
        with refused(DiskFull, disk):
            hubdiff.unpack(tmp_path / "d", disk / "dense")
        assert list(disk.iterdir()) == []
        # What fits still works.
        hubdiff.apply(world.delta, world.base, output=disk / "out")


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("plain", [False, True])
def test_a_disk_that_fills_up_while_the_next_file_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """The layers of one file are hashed while the next is compared."""
    base = save(tmp_path / "base", small(), shards=3)
    tuned = save(tmp_path / "tuned", moved(small()), shards=3)
    before = set(os.listdir("/dev/fd"))
    calls: list[int] = []

    def full(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with refused(DiskFull, tmp_path):
        hubdiff.push_delta(tuned, tmp_path / "out", base=base, plain=plain)
    assert len(calls) == 1  # nothing is begun that would be in vain
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}
    assert set(os.listdir("/dev/fd")) <= before


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("job", ["apply", "push", "unpack"])
def test_a_disk_that_fills_up_at_any_call(
    world: World, monkeypatch: pytest.MonkeyPatch, call: str, job: str
) -> None:
    monkeypatch.setattr(os, call, _full)
    with refused(DiskFull, world.folder):
        if job == "apply":
            world.apply()
        elif job == "push":
            hubdiff.push_delta(world.tuned, world.out, base=world.base)
        else:
            hubdiff.unpack(world.delta, world.out)
    assert not world.out.exists()
    if job != "apply":  # apply can go on from what it has
        assert not list(world.folder.glob(".out*"))


def test_a_disk_that_takes_a_part_of_each_write_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, memoryview(data)[:100], at))
    hubdiff.push_delta(world.tuned, world.folder / "again", base=world.base)
    for file in ("hubdiff.json", "delta-00001-of-00001.safetensors"):
        assert (world.folder / "again" / file).read_bytes() == (world.delta / file).read_bytes()
    world.apply()
    assert _weights(world.out) == _weights(world.tuned)


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# --- runs that were cut off ---


def _cut_off(world: World, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose every file is finished, killed before the folder got its name."""

    def killed(self: FolderSink, message: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderSink, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            world.apply(to)
    assert not world.out.exists()


@pytest.mark.parametrize("file", ["config.json", "notes.txt", "model.safetensors"])
def test_a_target_that_changed_meanwhile_is_not_resumed_from(
    world: World, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (world.target / "notes.txt").write_text("old")
    _cut_off(world, world.target, monkeypatch)
    if file == "model.safetensors":
        save_file(moved(small(), step=0.1, seed=8), world.target / file)
    else:
        (world.target / file).write_text('{"bos_token_id": 77}')
    world.apply(world.target)
    resumed = hashes(world.out)
    world.apply(world.target, force=True)
    assert {k: v for k, v in resumed.items() if k not in RECORDS} == {
        k: v for k, v in hashes(world.out).items() if k not in RECORDS
    }
    if file == "config.json":
        assert json.loads((world.out / file).read_bytes())["bos_token_id"] == 77


@pytest.mark.parametrize("to", ["base", "target"])
def test_leftovers_that_were_damaged_are_made_again(
    world: World, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    world.apply(world.folder / to)
    whole = hashes(world.out)
    shutil.rmtree(world.out)
    _cut_off(world, world.folder / to, monkeypatch)
    partial = world.folder / ".out.hubdiff-partial"
    for path in [p for p in partial.iterdir() if not p.name.startswith(".")]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    world.apply(world.folder / to)
    assert hashes(world.out) == whole
    assert not partial.exists()
