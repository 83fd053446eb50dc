from __future__ import annotations

import io
import re
from contextlib import suppress

import pytest

from hubdiff.cli._output import printable
from hubdiff.cli._progress import Lines, open_progress
from tests.cli.test_output import Terminal


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _lines(total: int, seconds: float, steps: int) -> list[str]:
    out, clock = io.StringIO(), Clock()
    lines = Lines(out, printable, clock)
    lines.start("merging", total)
    for _ in range(steps):
        clock.now += seconds / steps
        lines.advance(total // steps)
    lines.finish()
    return out.getvalue().splitlines()


def test_quick_work_is_two_lines() -> None:
    assert _lines(1000, 0.5, 100) == [
        "merging: 1 kB",
        "merging: done, 1 kB in 0.5 s (2 kB/s)",
    ]


def test_long_work_is_a_line_for_each_tenth() -> None:
    said = _lines(10**9, 100, 1000)
    assert len(said) == 11
    assert said[1] == "merging: 10 %, 100 MB of 1 GB, 10 MB/s, 90 s left"
    assert said[9] == "merging: 90 %, 900 MB of 1 GB, 10 MB/s, 10 s left"


def test_very_long_work_gives_signs_of_life() -> None:
    said = _lines(10**9, 1000, 1000)
    assert len(said) > 30


def test_an_empty_phase() -> None:
    out = io.StringIO()
    lines = Lines(out, printable)
    lines.start("merging", 0)
    lines.advance(0)
    lines.finish()
    assert out.getvalue().splitlines()[0] == "merging: 0 bytes"


def test_one_of_many() -> None:
    out = io.StringIO()
    lines = Lines(out, printable, Clock())
    lines.start("training", 1, "steps")
    lines.start("training", 2, "steps")
    assert out.getvalue().splitlines() == ["training: 1 step", "training: 2 steps"]


def _drive(stream: io.StringIO) -> str:
    with open_progress(stream, printable) as progress:
        progress.start("merging", 1000)
        progress.note("look \x1b[2J here")
        progress.advance(1000)
        progress.finish()
    return stream.getvalue()


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    said = _drive(Terminal())
    assert "━" in said
    assert "note: look \\x1b[2J here" in said
    assert "1 kB in " in said
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", said), "colour in spite of NO_COLOR"


@pytest.mark.parametrize("value", ["1", "true"])
def test_hf_hub_disable_progress_bars_leaves_the_notes(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", value)
    for stream in (Terminal(), io.StringIO()):
        assert _drive(stream) == "note: look \\x1b[2J here\n"


def test_lines_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "merging: done" in _drive(Terminal())


def test_a_bar_never_outlives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with suppress(KeyboardInterrupt), open_progress(stream, printable) as progress:
        progress.start("merging", 1000)
        raise KeyboardInterrupt
    assert "\x1b[?25h" in stream.getvalue(), "the cursor must come back"
