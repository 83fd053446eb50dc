"""What is kept in memory: by this process, where the command line decides and not the library, and
by the system's file cache."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import hubdiff
from hubdiff.files import LocalReader
from hubdiff.memory import give_back_freed_memory, upload_in_small_blocks
from tests import models

BLOCK = "HF_XET_DATA_INGESTION_BLOCK_SIZE"


@pytest.mark.parametrize(("chosen", "used"), [(None, "1mb"), ("4mb", "4mb")])
def test_the_size_of_uploaded_blocks_is_the_users_to_choose(
    chosen: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BLOCK, raising=False)
    if chosen:
        monkeypatch.setenv(BLOCK, chosen)
    else:
        monkeypatch.setenv(BLOCK, "")  # so that it is taken back
        del os.environ[BLOCK]
    upload_in_small_blocks()
    assert os.environ[BLOCK] == used


def test_the_library_sets_nothing() -> None:
    code = f"""
import gc, os
before = gc.get_threshold()
import hubdiff
hubdiff.push_delta
print(os.environ.get({BLOCK!r}), gc.get_threshold() == before)
"""
    env = {name: value for name, value in os.environ.items() if name != BLOCK}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["None", "True"]


def test_the_command_line_seldom_collects_garbage() -> None:
    """And not at all when it ends, though exit handlers run and the exit code is kept."""
    code = """
import atexit, gc
from hubdiff import cli
def run(arguments):
    print(gc.get_threshold()[0])
    return 3
atexit.register(lambda: print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000))
cli.run = run
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    threshold, *frozen = done.stdout.split()
    assert int(threshold) >= 100_000
    assert frozen == ["True", "True"]
    assert done.returncode == 3


glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc keeps and gives back"
)


def printed_by_a_process_that_keeps(code: str) -> int:
    """The MiB that ``code`` prints, after ``keep_freed_memory``."""
    prelude = """
import threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from hubdiff.memory import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
"""
    command = [sys.executable, "-c", prelude + code]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@glibc
def test_freed_memory_is_given_back() -> None:
    code = """
blocks = [np.ones(4 << 20, np.uint8) for _ in range(40)]
del blocks
kept = resident()
give_back_freed_memory()
print(kept - resident())
"""
    assert printed_by_a_process_that_keeps(code) > 100


@glibc
def test_freed_memory_is_used_again_by_any_thread() -> None:
    """Six threads take turns: each finds what the one before freed."""
    code = """
everyone, turn = threading.Barrier(6), threading.Lock()
def work():
    everyone.wait()  # so that each job has a thread of its own
    with turn:
        np.ones(16 << 20, np.uint8)
before = resident()
with ThreadPoolExecutor(6) as pool:
    [job.result() for job in [pool.submit(work) for _ in range(6)]]
    print(resident() - before)
"""
    assert printed_by_a_process_that_keeps(code) < 2 * 16


def test_giving_back_nothing_is_no_error() -> None:
    give_back_freed_memory()


def test_streams_that_do_not_fit_leave_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is dropped, the bytes of the result are the same."""
    dropped: list[int] = []
    monkeypatch.setattr(LocalReader, "forget", lambda self, offset, size: dropped.append(size))
    base = models.weights()
    tuned = models.moved(base)
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "tuned", tuned)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in base.values())

    def push_and_apply(name: str) -> tuple[int, int]:
        dropped.clear()
        delta, output = tmp_path / f"delta-{name}", tmp_path / f"out-{name}"
        hubdiff.push_delta(tmp_path / "tuned", delta, base=tmp_path / "base", plain=True)
        pushed = sum(dropped)
        hubdiff.apply(delta, tmp_path / "base", output=output)
        assert models.hashes(output)["model.safetensors"] == models.hashes(tmp_path / "tuned").get(
            "model.safetensors"
        )
        return pushed, sum(dropped) - pushed

    assert push_and_apply("fits") == (0, 0)
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    pushed, applied = push_and_apply("does-not")
    assert pushed == 2 * nbytes
    assert applied > 1.5 * nbytes  # base, and Δ of all tensors but the norms
