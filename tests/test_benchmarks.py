"""The benchmarks' own promises: scripts start, the README holds what a script printed, rounding in
their judge is right. What they measure is not measured here."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "benchmarks"
sys.path.append(str(SCRIPTS))  # last: one of them is called like a package of Python's own

import harness  # noqa: E402
import speed  # noqa: E402
import transfer_families  # noqa: E402
import transfer_matrix  # noqa: E402
import transfer_report as report  # noqa: E402

NAMES = ("encodings", "forecasts", "network", "real_llm", "sizes", "speed", "startup")
NAMES += ("transfer_matrix",)

linux = pytest.mark.skipif(sys.platform != "linux", reason="what memory holds is Linux's to say")


@pytest.mark.parametrize("name", NAMES)
def test_scripts_start_and_say_how(name: str) -> None:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"python tests/benchmarks/{name}.py" in done.stdout
    for option in ("--runs", "--json", "--folder", "--peers", "--readme"):
        assert option in done.stdout


def test_every_block_of_the_readme_has_its_script() -> None:
    page = (ROOT / "README.md").read_text()
    begun = re.findall(r"<!-- bench:(\w+):begin -->", page)
    assert sorted(begun) == sorted(NAMES)
    for name in begun:
        assert harness.with_block(page, name, "new").count("\nnew\n") == 1


def test_a_block_is_replaced_and_nothing_else() -> None:
    page = "a\n<!-- bench:x:begin -->\nold\n<!-- bench:x:end -->\nb\n"
    assert harness.with_block(page, "x", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="bench:y:begin"):
        harness.with_block(page, "y", "new")


def test_a_goal_is_judged_by_its_median() -> None:
    assert harness.Goal("size", [1.0, 1.1, 9.0], 1.2, "×").cells() == [
        "size",
        "≤ 1.2 ×",
        "1.10 (1.00–9.00) ×",
        "met",
    ]
    assert harness.Goal("speed", [1.0, 3.0, 1.1], 2, at_least=True).cells()[-1] == "missed"


def test_the_judge_rounds_once() -> None:
    """1 + 2^-8 is a tie, which goes to even; a trace more is not, though float32 can't see it."""
    tie, trace = 1 + 2**-8, 2**-40
    exact = np.array([tie, tie + trace, tie - trace, -tie - trace, 0.0, 1.5])
    wanted = [0x3F80, 0x3F81, 0x3F80, 0xBF81, 0x0000, 0x3FC0]
    assert speed.nearest(exact).tolist() == wanted


@linux
def test_the_filling_takes_memory_and_no_disk(tmp_path: Path) -> None:
    with harness.filler(tmp_path) as filling:
        found = os.fstat(filling.fileno())
        assert found.st_size == 2 * harness.memory("MemTotal") > 0
        assert found.st_blocks == 0
        assert not list(tmp_path.iterdir())


def test_memory_is_filled_from_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until enough is full, however much that needs; where it never is, that is said."""
    piece = harness.PIECE
    path = tmp_path / "filling"
    path.touch()
    os.truncate(path, 4 * piece)
    free = [2 * piece, 1 * piece, 0]
    monkeypatch.setattr(harness, "memory", lambda kind: {"MemFree": free[0]}[kind])
    with path.open("rb", buffering=0) as filling:
        harness._fill_memory(filling)
        assert filling.tell() == 2 * piece
        assert "does not get full" in capsys.readouterr().out
        filling.seek(3 * piece)
        harness._fill_memory(filling)
        assert filling.tell() == piece
        capsys.readouterr()
        monkeypatch.setattr(harness, "memory", lambda kind: free.pop(0))
        harness._fill_memory(filling)
        assert filling.tell() == 3 * piece
        assert not capsys.readouterr().out


@linux
def test_memory_is_full_before_the_inputs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "in"
    given.write_bytes(bytes(1 << 20))
    drop(given)
    then = []
    monkeypatch.setattr(harness, "_fill_memory", lambda filling: then.append(cached(given)))
    with harness.filler(tmp_path) as filling:
        harness.settle(tmp_path, [given], filling)
    assert then == [False]


@linux
def test_only_inputs_are_cached(tmp_path: Path) -> None:
    given, made, filling = (tmp_path / name for name in ("reads/in", "other/out", "filling"))
    for file in (given, made):
        file.parent.mkdir()
        file.write_bytes(bytes(1 << 20))
    drop(given)
    filling.touch()
    with filling.open("rb", buffering=0) as opened:
        harness.settle(tmp_path, [given.parent], opened)
    assert cached(given)
    assert not cached(made)


def drop(file: Path) -> None:
    """Leave nothing of it in the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(file):
        pytest.skip("this file system keeps its files in memory")


def cached(file: Path) -> bool:
    """Whether any of it is in the page cache. A read that must not wait (``RWF_NOWAIT``) would ask
    for it in passing, and now and then find what it had asked for."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        there = np.empty(-(-len(data) // mmap.PAGESIZE), np.uint8)
        begin, size, found = np.frombuffer(data, np.uint8).ctypes.data, len(data), there.ctypes.data
        mincore = ctypes.CDLL(None).mincore
        assert mincore(*map(ctypes.c_void_p, (begin, size, found))) == 0
    return bool((there & 1).any())


# --- the matrix of transfers ---


def test_ranks_are_correlated_with_ties_shared() -> None:
    assert report.spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert report.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # 1.5, 1.5, 3 and 1, 2, 3: √3/2.
    assert report.spearman([0, 0, 5], [1, 2, 3]) == pytest.approx(3**0.5 / 2)
    assert np.isnan(report.spearman([1, 1], [1, 2]))


def test_steps_to_reach_a_score() -> None:
    curve = [(0, 0.0), (10, 0.6), (20, 0.5), (30, 0.9)]
    assert [report.steps_to_reach(curve, score) for score in (0, 0.6, 0.7, 1)] == [0, 10, 30, None]
    slow, quick = [(0, 0.0), (10, 0.2), (20, 0.6)], [(0, 0.3), (10, 0.6), (20, 0.7)]
    assert report.steps_to_match(slow, quick) == 10
    assert report.steps_to_match(quick, slow) == 20  # never
    curves = [{"target": 0, "source": s, "points": p} for s, p in ((None, slow), (1, quick))]
    assert report.steps_share({"curves": curves}) == 0.5


def test_the_papers_matrix_shows_the_papers_findings() -> None:
    cells = {(c["target"], c["source"]): c for c in report.transfers(report.OLMO_FAMILY)}
    assert len(cells) == 20
    assert cells[4, 0]["gain"] == pytest.approx(0.196 - 0.655)
    assert cells[1, 0]["recovered"] == pytest.approx((26.6 - 19.4) / (50.7 - 19.4))
    assert report.nearness(report.OLMO_FAMILY) > 0.15
    assert report.upward(report.OLMO_FAMILY) < -0.1


def test_what_a_verdict_costs_is_counted() -> None:
    rows = [("go", 0.5), ("refuse", 0.5), ("doubtful", -0.5), ("refuse", -0.5), ("go", 0.0)]
    cells = [
        {"verdict": verdict, "gain": gain, "drift": number, "cosine": 1 - number}
        for number, (verdict, gain) in enumerate(rows)
    ]
    assert report.let_through(cells) == (1, 2)
    assert report.refused(cells) == (1, 2)
    assert report.edges(cells, "drift") == (1, 2)
    assert report.edges(cells, "cosine") == (0, -1)
    better = [cell | {"gain": -cell["drift"]} for cell in cells]
    assert report.correlation(better, "drift") == pytest.approx(1)
    assert report.correlation(better, "cosine") == pytest.approx(1)


TINY = replace(
    transfer_families.SIZES["small"].part(0),
    hidden=16,
    layers=1,
    heads=1,
    rows=2,
    task_rows=2,
    examples=4,
)


def test_a_matrix_is_measured_and_told(tmp_path: Path) -> None:
    family = transfer_families.Characters(replace(TINY, steps=(1, 1, 1)), seed=0)
    lab = transfer_matrix.Lab(family, tmp_path)
    document: dict[str, Any] = {"families": [transfer_matrix.one_family(lab)] * 2}
    cells = [(cell["target"], cell["source"]) for cell in document["families"][0]["cells"]]
    assert cells == [(i, j) for i in range(3) for j in range(3)]
    origin = {"cores": 1, "cpu": "", "memory_bytes": 1, "python": "", "commit": None, "peers": {}}
    document |= {
        "machine": origin | {"versions": {"hubdiff": "", "torch": ""}},
        "at": "",
        "runs": 2,
    }
    text = report.render(document)
    assert "+ Δ2" in text
    assert "harmful let through" in text
    report.draw(document, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size > 1000


@pytest.mark.parametrize("name", transfer_families.SIZES)
def test_every_size_starts(name: str, tmp_path: Path) -> None:
    few = {"rows": 2, "task_rows": 2, "examples": 2}
    recipe = replace(transfer_families.SIZES[name].part(0), **few)
    family = transfer_families.Characters(recipe, seed=0)
    family.train_version(0, None, tmp_path / "M1")
    curve = family.fine_tune(transfer_families.load(tmp_path / "M1"), 0)
    assert [step for step, _ in curve] == [0, 1]
