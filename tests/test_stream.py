"""Blocks, ranges and the ordered pool: nothing is lost, nothing extra is read, little is held."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import models
import pytest
import torch

from hubdiff.checkpoint import open_checkpoint
from hubdiff.files import LocalTree
from hubdiff.refs import ModelRef
from hubdiff.stream import MOST_WORKERS, Range, blocks, read_ranges, run_ordered, workers_for


def test_blocks_cover_every_byte_in_order(tmp_path: Path) -> None:
    tensors = {"big": torch.zeros(5 << 20, dtype=torch.int16), "empty": torch.zeros(0)}
    tensors |= {f"small.{i}": torch.zeros(i) for i in range(50)}
    models.save(tmp_path, tensors)
    with open_checkpoint(LocalTree(ModelRef.parse(tmp_path))) as checkpoint:
        for file, header in checkpoint.shards.items():
            position, names = len(header.raw), []
            for block in blocks(file, header):
                for span in block.spans:
                    assert span.begin == position
                    position += span.nbytes
                    names += [span.entry.name] * span.last
            assert position == header.file_size
            assert sorted(names) == sorted(tensors)


def test_neighbours_are_read_in_one_request(tmp_path: Path) -> None:
    models.save(tmp_path, models.weights())
    asked: list[tuple[int, int]] = []
    with open_checkpoint(LocalTree(ModelRef.parse(tmp_path))) as checkpoint:
        reader = checkpoint.reader("model.safetensors")
        read_into = reader.read_into

        def spy(offset: int, buffer: memoryview) -> None:
            asked.append((offset, len(buffer)))
            read_into(offset, buffer)

        reader.read_into = spy  # type: ignore[method-assign]
        ranges = [Range("model.safetensors", a, a + 10) for a in (500, 510, 520, 700)]
        views = read_ranges(checkpoint, reversed(ranges))
    assert asked == [(500, 30), (700, 10)]
    data = (tmp_path / "model.safetensors").read_bytes()
    assert all(views[r] == data[r.begin : r.end] for r in ranges)


def test_results_come_in_order_and_few_at_a_time() -> None:
    alive, most, lock, taken = 0, 0, threading.Lock(), []

    def work(job: int) -> int:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.001 * (job % 3))
        return job

    def consume(job: int, result: int) -> None:
        nonlocal alive
        assert job == result
        taken.append(job)
        with lock:
            alive -= 1

    run_ordered(range(60), work, consume, workers=3)
    assert taken == list(range(60))
    assert most <= 3 + 2


def test_several_reads_are_in_flight() -> None:
    """Each waits for the others: with fewer at a time the barrier would break."""
    together = threading.Barrier(workers_for(remote=True), timeout=20)
    run_ordered(
        range(2 * together.parties),
        lambda job: together.wait(),
        lambda job, result: None,
        workers_for(remote=True),
    )


def test_the_first_error_stops_the_work() -> None:
    begun: list[int] = []

    def work(job: int) -> None:
        begun.append(job)
        if job == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        run_ordered(range(1000), work, lambda job, result: None, workers=2)
    assert len(begun) < 20


@pytest.mark.parametrize("cores", [1, 2, 8, 128, None])
def test_workers_do_not_grow_with_the_machine(
    cores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert 1 <= workers_for(remote=False) <= workers_for(remote=True) <= MOST_WORKERS
