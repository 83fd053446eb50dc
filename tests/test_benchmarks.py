"""The benchmarks' own promises: scripts start, the README holds what a script printed, rounding in
their judge is right. What they measure is not measured here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "benchmarks"
sys.path.append(str(SCRIPTS))  # last: one of them is called like a package of Python's own

import harness  # noqa: E402
import speed  # noqa: E402

NAMES = ("encodings", "forecasts", "network", "real_llm", "sizes", "speed", "startup")


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
