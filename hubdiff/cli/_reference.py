"""The command reference of README.md, made from the commands themselves.

    python -m hubdiff.cli._reference README.md

rewrites what stands between the two markers there; without a file the reference is printed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from hubdiff.cli import cli
from hubdiff.cli._command import Command

BEGIN, END = "<!-- commands:begin -->", "<!-- commands:end -->"


def reference_markdown() -> str:
    """A section for each command. Independent of the version of click and of the terminal."""
    sections = ("\n".join(_section(name, command)) for name, command in every_command(cli))
    return "\n\n".join(sections) + "\n"


def every_command(group: click.Group, before: str = "") -> Iterator[tuple[str, Command]]:
    """All commands with the words that call them, those of groups too."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from every_command(command, f"{before}{name} ")
        else:
            assert isinstance(command, Command)
            yield f"{before}{name}", command


def embed(document: str) -> str:
    """``document`` with the reference between its markers. Raises ``ValueError`` without them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document lacks {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{reference_markdown()}{END}{after}"


def _section(name: str, command: Command) -> Iterator[str]:
    yield f"### `hubdiff {name}`"
    yield ""
    yield "```"
    yield f"hubdiff {name} {command.usage}"
    yield "```"
    yield ""
    yield inspect.cleandoc(command.help or "")
    yield ""
    yield "| option | |"
    yield "|---|---|"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            metavar = f" {parameter.metavar}" if parameter.metavar else ""
            text = (parameter.help or "").replace("|", "\\|")
            yield f"| `{'`, `'.join(parameter.opts)}{metavar}` | {text} |"
    yield ""
    yield "```bash"
    yield from command.examples
    yield "```"


def main() -> None:
    if len(sys.argv) == 1:
        sys.stdout.write(reference_markdown())
        return
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(embed(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
