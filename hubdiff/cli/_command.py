"""What the commands share: how their help reads, and the options that several of them have."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

HELP = {"help_option_names": ["-h", "--help"]}
# The Hub makes no empty commits, and so no pull request of one.
NO_PR = "holds exactly this already: no pull request was opened"
F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A command with a usage line written by hand (which options go together is what people look
    for there) and examples that work when pasted."""

    def __init__(
        self, *args: Any, usage: str = "", examples: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **{"context_settings": HELP, **kwargs})
        self.usage, self.examples = usage, tuple(examples)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, self.usage)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


def trust(function: F) -> F:
    """--key, --signed-by and --issuer: whose signature is wanted."""
    for option in (
        click.option(
            "--issuer", metavar="URL", help="Who vouches for IDENTITY. Default: GitHub's login."
        ),
        click.option(
            "--signed-by", metavar="IDENTITY", help="Signed by this identity, through Sigstore."
        ),
        click.option("--key", metavar="FILE", help="Signed by the owner of this public key, PEM."),
    ):
        function = option(function)
    return function


def filters(subject: str) -> Callable[[F], F]:
    """--include and --exclude; ``subject`` says what their globs match."""

    def decorate(function: F) -> F:
        function = click.option(
            "--exclude", multiple=True, metavar="GLOB", help=f"Not these {subject}; repeatable."
        )(function)
        return click.option(
            "--include", multiple=True, metavar="GLOB", help=f"Only these {subject}; repeatable."
        )(function)

    return decorate


vocab = click.option(
    "--vocab",
    type=click.Choice(["align", "strict", "rows"]),
    metavar="MODE",
    help="How embedding rows are matched: align (by token), rows (by number) or strict (as they "
    "are). Default: align where both tokenizers can be read, else strict.",
)
private = click.option(
    "--private", is_flag=True, help="Make the repo private; it must be new or private."
)
public = click.option(
    "--public", is_flag=True, help="Public also where what it is made of is gated or private."
)
pr = click.option("--pr", is_flag=True, help="Open a pull request instead of committing.")
cache = click.option("--cache", is_flag=True, help="Keep what is downloaded in the Hub cache.")
# Read from the raw command line (Session.json): a wrong one must be answered in JSON too.
json_output = click.option(
    "--json", is_flag=True, expose_value=False, help="Print one JSON object, also for an error."
)


class Scale(click.ParamType):
    """``A`` or ``GLOB=A``, where A is a factor that float32 can hold, which is what the arithmetic
    takes: as (glob or None, factor)."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str | None, float]:
        glob, equals, number = str(value).rpartition("=")
        try:
            scale = float(number)
            finite = scale - scale == 0
            struct.pack("<f", scale)  # the native "f" would make it infinite
        except (ValueError, OverflowError):
            finite = False
        if not finite:
            self.fail(f"{number!r} is not a finite number", param, ctx)
        return (glob if equals else None), scale
