"""Folders and locks: whose files a run may replace, and that two runs never share a place."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from models import hashes, moved, save, weights

import hubdiff
from hubdiff.errors import OutputError, OutputExists, RefError
from hubdiff.files import open_tree
from hubdiff.hashing import hash_bytes
from hubdiff.manifest import FileRecord
from hubdiff.progress import Silent
from hubdiff.refs import ModelRef
from hubdiff.writer import DELTA, RESULT, Sink, open_sink

TIMEOUT = 60


def place(folder: Path) -> ModelRef:
    return ModelRef(repo=None, revision=None, path=folder)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def publish(folder: Path, data: bytes = b"new", **options: bool) -> None:
    with open_sink(place(folder), RESULT, **options) as sink:
        sink.put("config.json", data)
        sink.publish("x")


def model(folder: Path, **files: str) -> Path:
    """What --force may replace."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"old")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def trio(tmp_path: Path) -> Path:
    """A base, a tuned model, a target and a delta."""
    before = weights()
    save(tmp_path / "base", before)
    save(tmp_path / "tuned", moved(before))
    save(tmp_path / "target", moved(before, step=1e-3, seed=9))
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    return tmp_path


# --- two runs to one folder ---


def test_a_second_run_to_the_same_folder_is_refused(tmp_path: Path) -> None:
    for first_run, second_run in (("a", "b"), ("a", "a"), (None, None)):
        output = tmp_path / f"{first_run}{second_run}"
        with open_sink(place(output), RESULT, run=first_run) as sink:
            sink.put("config.json", b"first")
            with (
                pytest.raises(OutputExists, match="another run is writing"),
                open_sink(place(output), RESULT, run=second_run),
            ):
                pass
            sink.publish("x")
        assert (output / "config.json").read_bytes() == b"first"
    assert not any(name.startswith(".") for name in names(tmp_path))


class Pausing(Silent):
    """Stops when the work begins until it is told to go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def start(self, what: str, total: int) -> None:
        self.begun.set()
        assert self.go_on.wait(TIMEOUT)


def both(first: Callable[[Pausing], object], second: Callable[[], object]) -> None:
    """``second`` runs to its end while ``first`` is at work."""
    progress = Pausing()
    thread = threading.Thread(target=first, args=(progress,))
    thread.start()
    try:
        assert progress.begun.wait(TIMEOUT)
        with pytest.raises(OutputExists, match="another run is writing"):
            second()
    finally:
        progress.go_on.set()
        thread.join()


def test_two_scales_to_one_folder_do_not_mix(trio: Path) -> None:
    def run(output: str, scale: float, progress: Silent | None = None) -> None:
        hubdiff.apply(
            trio / "delta", trio / "target", output=trio / output, scale=scale, progress=progress
        )

    run("right", 1.0)
    both(lambda progress: run("out", 1.0, progress), lambda: run("out", 2.0))
    assert json.loads((trio / "out" / "hubdiff-result.json").read_text())["scale"] == 1.0
    right = hashes(trio / "right")["model.safetensors"]
    assert hashes(trio / "out")["model.safetensors"] == right


def test_two_deltas_to_one_folder_do_not_mix(trio: Path) -> None:
    def run(progress: Silent | None = None) -> None:
        hubdiff.push_delta(trio / "tuned", trio / "d", base=trio / "base", progress=progress)

    both(run, run)
    assert hashes(trio / "d").items() >= {
        (path, digest) for path, digest in hashes(trio / "delta").items() if path != "README.md"
    }


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / ".out.hubdiff-lock").touch()
    publish(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_a_lock_file_that_the_run_before_deletes_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    lock, real, calls = tmp_path / ".out.hubdiff-lock", fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(fd)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    publish(tmp_path / "out")
    assert len(calls) == 2


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_a_folder_that_lost_something_is_not_published(tmp_path: Path, harm: str) -> None:
    with open_sink(place(tmp_path / "out"), RESULT, run="r") as sink:
        sink.put("config.json", b"whole")
        file = sink.staging / "config.json"
        file.unlink() if harm == "gone" else file.write_bytes(b"w")
        with pytest.raises(OutputError, match=r"config\.json"):
            sink.publish("x")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with open_sink(place(output), RESULT) as sink:
        sink.put("config.json", b"new")
        model(output)
        with pytest.raises(OutputExists, match="not empty"):
            sink.publish("x")
    assert names(output) == {"model.safetensors"}


# --- what --force may not replace ---


@pytest.mark.parametrize("text", ["", "  "])
def test_no_name_is_not_the_current_folder(
    trio: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(trio / "target")
    before = hashes(trio)
    for job in (
        lambda: hubdiff.apply(trio / "delta", trio / "base", output=text, force=True),
        lambda: hubdiff.unpack(trio / "delta", text, force=True),
        lambda: hubdiff.push_delta(trio / "tuned", text, base=trio / "base", force=True),
    ):
        with pytest.raises(RefError):
            job()
    assert hashes(trio) == before


def test_force_never_replaces_what_the_command_reads(trio: Path) -> None:
    nested = trio / "nest"
    (trio / "target").rename(model(nested) / "target")
    (trio / "link").symlink_to(trio / "tuned")
    before = hashes(trio)
    base, tuned, delta, target = (
        trio / "base",
        trio / "tuned",
        trio / "delta",
        nested / "target",
    )
    for job in (
        lambda: hubdiff.push_delta(tuned, tuned, base=base, force=True),
        lambda: hubdiff.push_delta(tuned, base, base=base, force=True),
        lambda: hubdiff.push_delta(trio / "link", tuned, base=base, force=True),
        lambda: hubdiff.push_delta(base, tuned, base=base, tuned_master=tuned, force=True),
        lambda: hubdiff.apply(delta, target, output=target, force=True),
        lambda: hubdiff.apply(delta, target, output=nested, force=True),
        lambda: hubdiff.apply(delta, target, output=delta, force=True),
        lambda: hubdiff.unpack(delta, delta, force=True),
    ):
        with pytest.raises(OutputExists, match="this command reads"):
            job()
    assert hashes(trio) == before


@pytest.mark.parametrize("where", ["current", "above current", "home"])
def test_force_never_replaces_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    output = model(tmp_path / "out")
    (output / "sub").mkdir()
    if where == "home":
        monkeypatch.setenv("HOME", str(output))
    else:
        monkeypatch.chdir(output if where == "current" else output / "sub")
    with pytest.raises(OutputExists, match=where.split()[-1]):
        publish(output, force=True)
    assert names(output) == {"model.safetensors", "sub"}


def test_force_replaces_models_and_deltas_only(tmp_path: Path) -> None:
    for marker in ("hubdiff.json", "hubdiff-result.json", "model-00001-of-00002.safetensors"):
        output = tmp_path / marker
        output.mkdir()
        (output / marker).write_text("old")
        publish(output, force=True)
        assert names(output) == {"config.json"}
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.jpg").write_text("mine")
    with pytest.raises(OutputExists, match="neither a model nor a delta"):
        publish(photos, force=True)
    assert names(photos) == {"me.jpg"}


# --- places that can't be ---


def test_a_mount_point_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    for force in (False, True):
        with pytest.raises(OutputError, match="mount point") as caught:
            publish(output, force=force)
        assert str(output / "result") in (caught.value.next_step or "")


def test_a_name_too_long_is_said_in_words(tmp_path: Path) -> None:
    for length in (240, 300):
        with pytest.raises(OutputError, match="File name too long"):
            publish(tmp_path / ("x" * length))
    assert names(tmp_path) == set()


def test_a_link_is_called_a_link(tmp_path: Path) -> None:
    folder = model(tmp_path / "folder")
    (tmp_path / "out").symlink_to(folder)
    for force in (False, True):
        with pytest.raises(OutputExists, match=f"is a link to {folder}"):
            publish(tmp_path / "out", force=force)


# --- on the disk ---


def test_every_file_of_a_delta_is_synced(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = set(), os.fsync

    def fsync(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    hubdiff.push_delta(trio / "tuned", trio / "again", base=trio / "base")
    files = {path for path in (trio / "again").rglob("*") if path.is_file()}
    assert {path.name for path in files if path.stat().st_ino not in synced} == set()


# --- runs inside a model's folder ---


def test_an_output_inside_the_target_stays_out_of_the_result(trio: Path) -> None:
    target = trio / "target"
    expected = set(open_tree(place(target)).files())
    with pytest.raises(KeyboardInterrupt):
        hubdiff.apply(trio / "delta", target, output=target / "res", progress=Stopping())
    assert (target / ".res.hubdiff-partial").is_dir()
    hubdiff.apply(trio / "delta", target, output=target / "res")
    hubdiff.apply(trio / "delta", target, output=trio / "res")
    assert set(hashes(target / "res")) == set(hashes(trio / "res"))
    assert set(open_tree(place(target)).files()) == expected


class Stopping(Silent):
    def finish(self) -> None:
        raise KeyboardInterrupt


def test_a_delta_inside_the_tuned_model_is_not_carried_by_the_next(trio: Path) -> None:
    for name in ("delta", "delta2"):
        hubdiff.push_delta(trio / "tuned", trio / "tuned" / name, base=trio / "base")
        assert set(hashes(trio / "tuned" / name)) == set(hashes(trio / "delta"))


def test_what_a_sink_takes_is_what_it_gives(tmp_path: Path) -> None:
    def fill(sink: Sink) -> None:
        output = sink.open("a/b.bin", 3)
        output.write_at(0, b"abc")
        output.close()
        sink.finish(FileRecord("a/b.bin", 3, hash_bytes(b"abc")))

    with open_sink(place(tmp_path / "out"), DELTA) as sink:
        fill(sink)
        sink.publish("x")
    assert hashes(tmp_path / "out") == {"a/b.bin": hash_bytes(b"abc")}
