"""The command line: one module per command, each a thin shell over a function of the library.

Commands catch nothing; ``_errors.py`` has the one table that turns an error into words and an exit
code. Results go to stdout, progress and notes to stderr. A command's module is imported when that
command is asked for, and the library only when it runs, so that ``--help`` costs next to nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from hubdiff._version import __version__
from hubdiff.cli._command import HELP
from hubdiff.cli._errors import speak
from hubdiff.cli._output import Session
from hubdiff.memory import leave_garbage, seldom_collect_garbage

COMMANDS = {
    "push-delta": "push_delta",
    "check": "check",
    "apply": "apply",
    "inspect": "inspect",
    "diff": "diff",
    "verify": "verify",
    "sign": "sign",
    "unpack": "unpack",
    "export": "export",
    "list": "list_deltas",
    "search": "search",
    "lineage": "lineage",
    "tag": "tag",
    "alias": "alias",
    "eval": "evaluate",
    "compare": "compare",
    "tune-scale": "tune_scale",
    "finetune": "finetune",
    "recycle": "recycle",
    "connectivity": "connectivity",
    "watch": "watch",
    "backport": "backport",
    "init-ci": "init_ci",
    "demo": "demo",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"hubdiff.cli.{COMMANDS[cmd_name]}").command
        return command


@click.group(cls=_Commands, context_settings=HELP)
@click.version_option(__version__, prog_name="hubdiff", message="%(prog)s %(version)s")
def cli() -> None:
    """Publish what a fine-tune changed, and put it on any base of the family.

    A delta is tuned − base, a small repo on the Hugging Face Hub. On its own base it rebuilds the
    tuned model byte for byte; on a newer base it carries the fine-tune over.

    \b
      hubdiff push-delta org/tuned org/tuned-delta --base org/base
      hubdiff apply org/tuned-delta --to org/base --output tuned
      hubdiff inspect org/tuned-delta

    TUNED, BASE, DELTA and TARGET are org/name, org/name@revision, hf://org/name@revision, or a
    folder. Results go to stdout, progress to stderr. Exit codes: 0 done, 1 an error, 2 a command
    line that can't be read, 3 and 4 what check doubts and refuses, 130 stopped with Ctrl-C.
    HUBDIFF_DEBUG=1 shows tracebacks.
    """


def run(arguments: Sequence[str]) -> int:
    """One command line, without the program's name. Returns the exit code."""
    session = Session(arguments)
    try:
        code = cli.main(list(arguments), "hubdiff", standalone_mode=False, obj=session)
    except (Exception, KeyboardInterrupt) as error:
        return speak(error, session)
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    seldom_collect_garbage()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that can't show "‖Δ‖" shows "?" there, and no command fails for it.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    code = run(sys.argv[1:])
    leave_garbage()
    sys.exit(code)


__all__ = ["cli", "main", "run"]
