"""README.md and FORMAT.md say what is true: files exist, commands parse, snippets name what is."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

import hubdiff
from hubdiff.cli import cli
from hubdiff.errors import HubdiffError
from hubdiff.manifest import FORMAT_VERSION

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "FORMAT.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def typed_commands() -> list[str]:
    lines = [line for block in (*blocks("sh"), *blocks("bash")) for line in block.splitlines()]
    lines += [line.removeprefix("$ ") for line in README.splitlines() if line.startswith("$ ")]
    return [line.split("  #")[0] for line in lines if line.startswith("hubdiff ")]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http|#)([^)]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_there_are_commands_to_check():
    assert len(typed_commands()) >= 6


@pytest.mark.parametrize("line", typed_commands())
def test_commands_parse(line):
    name, *arguments = shlex.split(line)[1:]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    command.make_context(name, arguments, obj=None)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("snippet", blocks("python"))
def test_snippets_call_what_exists_with_what_it_takes(snippet):
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("hubdiff."):
            function = getattr(hubdiff, ast.unparse(node.func).removeprefix("hubdiff."))
            keywords = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(function).bind(*node.args, **keywords)


def test_errors_are_drawn_whole():
    import hubdiff.errors

    tree = hubdiff.errors.__doc__ or ""
    for name, value in vars(hubdiff.errors).items():
        if isinstance(value, type) and issubclass(value, HubdiffError):
            assert name in tree


def test_format_document_names_the_version_written():
    assert f"version {FORMAT_VERSION}" in FORMAT.splitlines()[0]
