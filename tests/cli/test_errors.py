from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from hubdiff import errors
from hubdiff.cli import _errors
from hubdiff.cli._output import Session
from hubdiff.errors import HubdiffError


def _every_error() -> list[type[HubdiffError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, HubdiffError)
    ]


@pytest.mark.parametrize("kind", _every_error())
def test_every_hubdiff_error_exits_1(
    kind: type[HubdiffError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _errors.speak(kind("it is so", next_step="Do this."), Session([])) == 1
    assert capsys.readouterr().err == "error: it is so\nnext: Do this.\n"


def test_an_error_without_advice(capsys: pytest.CaptureFixture[str]) -> None:
    _errors.speak(HubdiffError("it is so"), Session([]))
    assert capsys.readouterr().err == "error: it is so\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_ctrl_c_says_what_the_command_says(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session([])
    with pytest.raises(type(error)), session.working(if_stopped="Stopped. All is well."):
        raise error
    assert _errors.speak(error, session) == 130
    assert capsys.readouterr().err.endswith("Stopped. All is well.\n")


def test_after_the_work_ctrl_c_promises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session([])
    with session.working(if_stopped="Stopped. Nothing was published."):
        pass
    _errors.speak(KeyboardInterrupt(), session)
    assert capsys.readouterr().err == "Stopped.\n"


def test_a_system_error_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert _errors.speak(PermissionError(13, "Permission denied", "w.bin"), Session([])) == 1
    assert capsys.readouterr().err.startswith("error: w.bin: Permission denied\nnext: Check")


def _crash() -> KeyError:
    try:
        raise KeyError("lost")
    except KeyError as error:
        return error


def test_a_bug_is_told_in_a_line_and_its_traceback_kept(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("HUBDIFF_DEBUG", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert _errors.speak(_crash(), Session([])) == 1
    said = capsys.readouterr().err
    assert "KeyError: 'lost'" in said
    assert "Traceback" not in said
    found = re.search(r"in (\S+\.txt) \(HUBDIFF_DEBUG=1 prints it\)", said)
    assert found
    assert "in _crash" in Path(found[1]).read_text()


@pytest.mark.parametrize("debug", [True, False])
def test_a_traceback_is_printed_on_demand_or_where_it_cannot_be_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    monkeypatch.setenv("HUBDIFF_DEBUG", "1" if debug else "")
    if not debug:
        monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    assert _errors.speak(_crash(), Session([])) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert "in _crash" in said
    assert said.endswith("the traceback is above.\n")


def test_names_from_a_repo_cannot_paint_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _errors.speak(HubdiffError("tensor \x1b[2J\u202eevil"), Session([]))
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said == "error: tensor \\x1b[2J\\u202eevil\n"


def test_the_last_row_takes_any_exception() -> None:
    assert _errors.TABLE[-1].errors == (Exception,)


def test_commands_catch_nothing() -> None:
    """Errors are the table's business: no ``except`` in a command, and one in all of the package's
    entry point."""
    folder = Path(_errors.__file__).parent
    commands = [file for file in folder.glob("*.py") if not file.name.startswith("_")]
    assert len(commands) == 25
    for file in commands:
        assert "except" not in file.read_text().replace("--except", ""), file.name
