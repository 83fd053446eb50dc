"""What the tests of the command line share: a process for a command line, and what it said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Family:
    """``other`` is a base of the same shapes that the delta was not made from."""

    base: str
    tuned: str
    other: str
    delta: str


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


def spawn(
    *arguments: str, python: tuple[str, ...] = ("-m", "hubdiff"), **environment: str
) -> subprocess.Popen[str]:
    """A command line in a process of its own; ``python`` is what comes before its arguments."""
    return subprocess.Popen(
        [sys.executable, *python, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, **environment},
        # A test run in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finished(process: subprocess.Popen[str]) -> Said:
    out, err = process.communicate(timeout=120)
    return Said(process.returncode, out, err)
