"""The command line as a whole: help, start-up, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubdiff._version import __version__
from hubdiff.cli import COMMANDS, cli
from hubdiff.cli._reference import every_command
from hubdiff.devhub import DevHub
from tests import models
from tests.cli.running import Family, Said, finished, spawn

Run = Callable[..., Said]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(hubdiff: Run, flag: str) -> None:
    said = hubdiff(flag)
    assert said.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in said.out


@pytest.mark.parametrize("name", [name for name, _ in every_command(cli)])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_a_command_shows_how_to_use_it(hubdiff: Run, name: str, flag: str) -> None:
    said = hubdiff(*name.split(), flag)
    assert said.code == 0
    assert said.out.startswith(f"Usage: hubdiff {name} ")
    assert "--json" in said.out
    assert f"Examples:\n  hubdiff {name}" in said.out


def test_version(hubdiff: Run) -> None:
    assert hubdiff("--version") == Said(0, f"hubdiff {__version__}\n", "")


def _imported_after(*arguments: str) -> set[str]:
    code = (
        "import sys\n"
        "from hubdiff.cli import run\n"
        "code = run(sys.argv[1:])\n"
        "print(*sys.modules, file=sys.stderr)\n"
        "sys.exit(code)"
    )
    said = finished(spawn(*arguments, python=("-c", code)))
    assert said.code == 0, said.err
    return set(said.err.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["apply", "--help"], ["demo", "--help"]])
def test_help_imports_nothing_but_click(arguments: list[str]) -> None:
    """That is what makes it fast: ``benchmarks/startup.py`` says how fast."""
    python = finished(spawn(python=("-c", "import sys; print(*sys.modules)")))
    before = set(python.out.split()) | set(sys.stdlib_module_names)  # .pth files import too
    packages = {name.partition(".")[0] for name in _imported_after(*arguments)}
    assert packages - before <= {"click", "hubdiff"}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_inspect_imports_nothing_for_numbers(family: Family, flags: list[str]) -> None:
    modules = _imported_after("inspect", family.delta, *flags)
    assert not modules & {"torch", "transformers", "matplotlib", "numpy"}


# --- exit codes, and what goes where ---


def test_results_go_to_stdout_and_progress_to_stderr(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    said = finished(spawn("apply", family.delta, "--to", family.base, "--output", str(output)))
    assert said.code == 0, said.err
    assert str(output) in said.out
    assert "own base" in said.out
    assert "note: the target is the delta's own base" in said.err
    assert "merging: done" in said.err
    assert "merging" not in said.out
    assert "\x1b" not in said.out + said.err


def test_json_is_one_object_on_stdout(family: Family, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    said = finished(spawn("apply", family.delta, "--to", family.base, "--output", output, "--json"))
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert document["plan"]["case"] == "own base"
    assert document["where"] == output
    assert "merging" in said.err


def test_a_hubdiff_error_exits_1_and_names_the_next_step(hubdiff: Run, family: Family) -> None:
    said = hubdiff("inspect", family.base)
    assert said.code == 1
    assert said.out == ""
    assert said.err.startswith(f"error: {family.base} has no hubdiff.json")
    assert "\nnext: A delta is made with: hubdiff push-delta" in said.err


def test_a_hubdiff_error_in_json(hubdiff: Run, family: Family) -> None:
    said = hubdiff("inspect", family.base, "--json")
    assert said.code == 1
    error = json.loads(said.out)["error"]
    assert error["type"] == "NotADelta"
    assert "hubdiff.json" in error["message"]
    assert error["next_step"].startswith("A delta is made with")
    assert error["message"] in said.err


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        ([], "Usage: hubdiff"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["inspect"], "Missing argument 'DELTA'"),
        (["inspect", "d", "--nope"], "--nope"),
        (["apply", "d", "--output", "o"], "Missing option '--to'"),
        (["apply", "d", "--to", "t"], "either --output DIR or --push-to REPO"),
        (["apply", "d", "--to", "t", "--output", "o", "--push-to", "r"], "either --output DIR"),
        (["apply", "d", "--to", "t", "--output", "o", "--pr"], "--push-to"),
        (["apply", "d", "--to", "t", "--output", "o", "--scale", "nan"], "finite"),
        (["apply", "d", "--to", "t", "--output", "o", "--scale", "1e39"], "finite"),
        (["apply", "d", "--to", "t", "--output", "o", "--scale", "half"], "finite"),
        (["apply", "d", "--to", "t", "--output", "o", "--scale", "x.*=half"], "finite"),
        (
            ["apply", "d", "--to", "t", "--output", "o", "--scale", "1", "--scale", "2"],
            "one --scale",
        ),
        (["apply", "--to", "t", "--output", "o"], "Missing argument 'DELTA"),
        (
            ["apply", "d", "--to", "t", "--output", "o", "--method", "slerp"],
            "'slerp' is not one of",
        ),
        (["apply", "d", "--to", "t", "--output", "o", "--density", "0.5"], "--density goes with"),
        (["apply", "d", "--to", "t", "--output", "o", "--seed", "1"], "--seed goes with"),
        (["apply", "d", "--to", "t", "--output", "o", "--method", "dare"], "needs --density"),
        (
            ["apply", "d", "--to", "t", "--output", "o", "--method", "ties", "--density", "nan"],
            "is a share",
        ),
        (
            ["apply", "d", "--to", "t", "--output", "o", "--method", "ties", "--seed", "1"],
            "--seed goes with --method dare",
        ),
        (["push-delta", "t", "./folder", "--private"], "--public need a repo"),
        (["unpack", "d"], "Missing option '--output'"),
    ],
)
def test_a_wrong_command_line_exits_2(hubdiff: Run, arguments: list[str], about: str) -> None:
    said = hubdiff(*arguments)
    assert said.code == 2
    assert about in said.err
    assert said.out == ""


def test_a_wrong_command_line_is_answered_in_json_too(hubdiff: Run) -> None:
    said = hubdiff("inspect", "--json")
    assert said.code == 2
    assert "DELTA" in json.loads(said.out)["error"]["message"]


def test_a_closed_pipe_is_no_error(family: Family) -> None:
    process = spawn("inspect", family.delta)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)


# --- Ctrl-C ---

# A run that stops to wait when the first file is finished, longer than any test, and says so.
SLOWED = """
import sys, time
from hubdiff.writer import FolderSink
from hubdiff.cli import main
finish = FolderSink.finish
def slow(self, record):
    finish(self, record)
    print("one file is finished", file=sys.stderr, flush=True)
    time.sleep(600)
FolderSink.finish = slow
main()
"""


def _interrupted(*arguments: str, sink: str = "FolderSink") -> Said:
    process = spawn(*arguments, python=("-c", SLOWED.replace("FolderSink", sink)))
    assert process.stderr is not None
    for line in process.stderr:
        if "one file is finished" in line:
            break
    process.send_signal(signal.SIGINT)
    return finished(process)


def test_an_interrupted_apply_is_calm_and_goes_on_when_run_again(
    family: Family, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ("apply", family.delta, "--to", family.base, "--output", str(output))
    said = _interrupted(*arguments)
    assert said.code == 130
    assert "Traceback" not in said.err
    assert f"Stopped. {output} is as it was; run the same command again" in said.err
    assert not output.exists()

    partial = tmp_path / ".out.hubdiff-partial"
    first = next(partial.glob("*.safetensors"))
    written = first.stat().st_mtime_ns
    again = finished(spawn(*arguments))
    assert again.code == 0, again.err
    assert (output / first.name).stat().st_mtime_ns == written
    assert models.hashes(output).items() >= _carried(family.tuned)


def _carried(tuned: str) -> set[tuple[str, str]]:
    return {(k, v) for k, v in models.hashes(Path(tuned)).items() if not k.endswith(".bin")}


def test_an_interrupted_push_leaves_nothing(family: Family, tmp_path: Path) -> None:
    repo = tmp_path / "delta"
    said = _interrupted("push-delta", family.tuned, str(repo), "--base", family.base, "--json")
    assert said.code == 130
    assert "Stopped. Nothing was published" in said.err
    assert json.loads(said.out)["error"]["type"] == "Stopped"
    assert not list(tmp_path.iterdir())


def test_an_interrupted_push_to_the_hub_says_what_stays(
    devhub: DevHub, family: Family, new_name: Callable[[], str]
) -> None:
    repo = new_name()
    said = _interrupted("push-delta", family.tuned, repo, "--base", family.base, sink="HubSink")
    assert said.code == 130
    assert f"Nothing was published at {repo}; a repo that is new stays there, empty." in said.err
    files = HfApi(endpoint=devhub.url, token=devhub.token()).list_repo_files(repo)
    assert set(files) <= {".gitattributes"}
