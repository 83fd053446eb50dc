from __future__ import annotations

import io

import pytest

from hubdiff.cli._output import Page, count, duration, printable, wrapped


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_no_colour_and_no_cuts() -> None:
    out = io.StringIO()
    page, name, prose = Page(out), "layer/" + 300 * "n", "word " * 100
    page.heading("Heading")
    page.fields([("path", name), ("note", prose.strip()), ("absent", None)])
    page.table(["name", "size"], [(name, "1 kB"), ("b", "10 kB")])
    lines = out.getvalue().splitlines()
    assert lines == [
        "",
        "Heading",
        f"path  {name}",
        f"note  {prose.strip()}",
        f"name{'':{len(name) - 4}}   size",
        f"{name}   1 kB",
        f"b{'':{len(name) - 1}}  10 kB",
    ]


def test_a_terminal_wraps_prose_and_never_breaks_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    out, name = Terminal(), "/a/very/long/path/" + 60 * "n"
    Page(out).fields([("path", name), ("note", "word " * 12)])
    lines = out.getvalue().splitlines()
    assert lines[0] == f"path  {name}"
    assert all(len(line) <= 40 for line in lines[1:])
    assert lines[2].startswith("      word")


def test_colour_on_a_terminal_unless_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    Page(out).heading("Heading")
    assert "\x1b[1m" in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    Page(out).heading("Heading")
    assert "\x1b" not in out.getvalue()


def test_names_are_text_not_markup() -> None:
    out = io.StringIO()
    page, name = Page(out), "[bold]a[/bold] :smile: \x1b[31m"
    page.table(["name"], [(name,)])
    page.items([name])
    assert out.getvalue().count("[bold]a[/bold] :smile: \\x1b[31m") == 2


def test_a_long_list_is_counted() -> None:
    out = io.StringIO()
    Page(out).items([f"tensor {i}" for i in range(100)])
    assert out.getvalue().splitlines()[-1] == "  … and 92 more (--json lists all)"
    out = io.StringIO()
    Page(out).items([f"tensor {i}" for i in range(9)])
    assert "more" not in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (59.7, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.9, "1 h 0 min"),
        (7460, "2 h 4 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts() -> None:
    assert [count(n, "file") for n in (0, 1, 1200)] == ["0 files", "1 file", "1,200 files"]


def test_printable_keeps_letters_of_any_script() -> None:
    assert printable("‖Δ‖ 模型 é") == "‖Δ‖ 模型 é"
    assert printable("a\nb\x07") == "a\\nb\\x07"


def test_wrapping_nothing() -> None:
    assert wrapped("", 80, 4) == [""]
