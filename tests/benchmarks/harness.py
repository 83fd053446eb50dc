"""What the benchmarks share: processes that are measured, the peers' environment, one report.

A benchmark is a script with ``measure(options, peers) → document`` and ``render(document) → text``.
The document is JSON and holds every single run; the text is Markdown, made from the document alone.
So what is printed, what ``--json FILE`` keeps and what ``--readme README.md`` puts between
``<!-- bench:NAME:begin -->`` and ``<!-- bench:NAME:end -->`` can't differ, and ``--from FILE``
renders a kept document again without measuring.

Peers (other tools) live in a virtual environment of their own, in ``--peers``, made once with pip;
nothing of them is imported here. One that can't be installed or fails is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

import hubdiff

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
PEERS = {
    "mergekit": "0.1.5",
    "zipnn": "0.5.4",
    "pcodec": "1.1.0",
    "zstandard": "0.25.0",
    "residuals": "0.3.2",
}

PIECE = 8 << 20  # bytes read at once
KEPT_FREE = 0.03  # of memory: the kernel holds back less for itself

Row = dict[str, Any]

MEASURED = r"""
import atexit, json, re, runpy, sys, time
from pathlib import Path
report, program = Path(sys.argv.pop(1)), sys.argv.pop(1)

def write():
    # Not ru_maxrss: that starts from what the parent held when it forked.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    report.write_text(json.dumps({"cpu": time.process_time(), "peak": int(peak) * 1024}))

atexit.register(write)
if program.endswith(".py"):
    sys.argv[0] = program
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


class PeerFailed(Exception):
    """A peer could not do what was asked of it here; the text says why."""


def process(
    program: str | Path,
    *arguments: str | Path,
    python: str | Path = sys.executable,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Row:
    """Run a module or a ``.py`` file in a process of its own: wall seconds from start to exit, CPU
    seconds, peak resident bytes (the kernel's VmHWM, so Linux), and what it printed."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report"
        command = [str(python), "-c", MEASURED, str(report), str(program), *map(str, arguments)]
        began = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**_environment(), "NO_COLOR": "1", **(env or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            print(done.stderr or "", file=sys.stderr)
            done.check_returncode()
        return {"seconds": seconds, **json.loads(report.read_text()), "output": done.stdout}


def _environment() -> dict[str, str]:
    """A package that pip installed is compiled, and so may be one that is worked on."""
    return {key: word for key, word in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Peers:
    """The other tools: what is installed, and why what is not is not."""

    python: Path
    versions: dict[str, str]
    missing: dict[str, str]

    def process(self, name: str, program: str | Path, *arguments: str | Path, **how: Any) -> Row:
        """``process`` in the peers' environment. Raises ``PeerFailed``."""
        if name in self.missing:
            raise PeerFailed(f"pip could not install it: {self.missing[name]}")
        env = {"PYTHONPATH": "", **(how.pop("env", None) or {})}
        try:
            return process(program, *arguments, python=self.python, env=env, **how)
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines() or [f"exit code {error.returncode}"]
            raise PeerFailed(lines[-1]) from error


def peers(folder: Path) -> Peers:
    """The peers' environment under ``folder``; made, or completed, where something is missing.

    torch comes first and at the version of constraints.txt: the peers would bring a build for GPUs.
    """
    python = folder.resolve() / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    missing = {}
    for name, number in {"torch": "", **PEERS}.items():
        found = _installed(python, name)
        if found is None or (number and found != number):
            requirement = f"{name}=={number}" if number else name
            print(f"installing {requirement} into {folder}", flush=True)
            install = [str(python), "-m", "pip", "install", "--quiet", requirement]
            install += ["--constraint", str(ROOT / "constraints.txt")]
            done = subprocess.run(install, capture_output=True, text=True, check=False)
            if done.returncode:
                missing[name] = done.stderr.strip().splitlines()[-1]
    versions = {name: _installed(python, name) or "not installed" for name in PEERS}
    return Peers(python, versions, missing)


def _installed(python: Path, name: str) -> str | None:
    code = f"from importlib.metadata import version; print(version({name!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def machine(others: Peers) -> Row:
    """Where the figures come from."""
    ours = ("hubdiff", "torch", "numpy", "zstandard", "safetensors", "huggingface_hub")
    package = Path(hubdiff.__file__).parent  # what is measured need not lie beside this script
    git = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=10"]
    described = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "cpu": _proc("cpuinfo", r"model name\s*:\s*(.+)") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory("MemTotal"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": described.stdout.strip() or None,
        "versions": {name: version(name) for name in ours},
        "peers": others.versions,
    }


def _proc(file: str, pattern: str) -> str:
    path = Path("/proc", file)
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found[1].strip() if found else ""


def memory(kind: str) -> int:
    """Bytes that /proc/meminfo gives for ``kind``; 0 where there is none."""
    return int(_proc("meminfo", rf"{kind}:\s*(\d+)") or 0) * 1024


@contextmanager
def filler(folder: Path) -> Iterator[IO[bytes]]:
    """A file twice as large as memory, so that what is read of it was dropped long ago or never
    read; without a name and all holes, so that it takes no disk."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.truncate(2 * memory("MemTotal"))
        yield file


def settle(folder: Path, inputs: Sequence[Path], filling: IO[bytes]) -> None:
    """The same start for everyone: what others wrote is on disk, ``folder`` is out of the page
    cache but for ``inputs``, those were read once just now (as far as memory holds them), and
    ``filling`` is cached in all memory else, as old files are wherever a machine was on for long.

    Were it free, a virtual machine would give it back to its host, beside whatever runs meanwhile;
    and the first touch of a page after that costs ten times as much as all later ones."""
    os.sync()
    wanted = {file for path in inputs for file in ([path] if path.is_file() else path.rglob("*"))}
    for file in folder.rglob("*"):
        if file.is_file() and file not in wanted:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    _fill_memory(filling)
    piece = bytearray(PIECE)
    for file in sorted(wanted):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(piece):
                    pass


def _fill_memory(filling: IO[bytes]) -> None:
    """Read on, round and round, from where the last call stopped: what is read twice while it is
    cached would stay longer than the inputs."""
    piece = bytearray(PIECE)
    left = total = os.fstat(filling.fileno()).st_size // 2
    while memory("MemFree") > KEPT_FREE * total:
        if left <= 0:
            print("Memory does not get full: more is free than what this file system caches.")
            return
        read = filling.readinto(piece)
        left -= read
        if not read:
            filling.seek(0)


def order0_bytes(bits: np.ndarray) -> float:
    """Bytes per element of a code that knows how often each value comes, and nothing else."""
    shares = np.unique(bits, return_counts=True)[1] / bits.size
    return float(-(shares * np.log2(shares)).sum() / 8)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and between which values the runs lay."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low}–{high})" if low != high else middle


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well in a terminal too; all but the first column to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    rule = "|".join(
        "-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)
    )
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


@dataclass(frozen=True)
class Goal:
    """What was promised, and what came out. ``limit`` is a maximum unless ``at_least``."""

    what: str
    values: Sequence[float]
    limit: float
    unit: str = ""
    at_least: bool = False
    digits: int = 2

    def cells(self) -> list[str]:
        value = statistics.median(self.values)
        met = value >= self.limit if self.at_least else value <= self.limit
        sign = "≥" if self.at_least else "≤"
        limit = f"{sign} {self.limit:g} {self.unit}".strip()
        measured = f"{spread(self.values, self.digits)} {self.unit}".strip()
        return [self.what, limit, measured, "met" if met else "missed"]


def goals_table(goals: Sequence[Goal]) -> str:
    return table(["goal", "limit", "measured", ""], [goal.cells() for goal in goals])


def origin(document: Row) -> str:
    """One line on where a document's figures come from."""
    here = document["machine"]
    names = {"hubdiff": here["versions"]["hubdiff"], "torch": here["versions"]["torch"]}
    versions = ", ".join(f"{name} {number}" for name, number in (names | here["peers"]).items())
    commit = f" (commit {here['commit']})" if here["commit"] else ""
    return (
        f"{document['at']}, {here['cores']} cores ({here['cpu']}), "
        f"{here['memory_bytes'] / 1e9:.0f} GB, Python {here['python']}; {versions}{commit}. "
        f"Median (min–max) of {document['runs']} run{'s' * (document['runs'] != 1)}."
    )


def arguments(doc: str | None, *, runs: int = 5) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=runs, help=f"rounds of each, {runs} by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks")
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--json", type=Path, help="keep the document here")
    parser.add_argument(
        "--from", dest="kept", type=Path, help="render this document, don't measure"
    )
    parser.add_argument("--readme", type=Path, help="put the text into this file's block")
    return parser


def main(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Peers], Row],
    render: Callable[[Row], str],
    *,
    compared: bool = True,
) -> Row:
    """Measure, or read what was measured; print, keep and publish it. Without ``compared`` there
    are no peers, and none are installed."""
    if options.kept:
        document = json.loads(options.kept.read_text(encoding="utf-8"))
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        options.folder, options.peers = options.folder.resolve(), options.peers.resolve()
        others = peers(options.peers) if compared else Peers(options.peers, {}, {})
        document = {"benchmark": name, "at": time.strftime("%F"), "runs": options.runs}
        document |= {"machine": machine(others)}
        document |= measure(options, others)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = render(document)
    print(f"\n{text}")
    if options.readme:
        page = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(with_block(page, name, text), encoding="utf-8")
    return document


def with_block(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` in the block called ``name``."""
    begin, end = (f"<!-- bench:{name}:{edge} -->" for edge in ("begin", "end"))
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"there is no block {begin} … {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"
