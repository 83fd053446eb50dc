"""``hubdiff lineage``: what a repo was made from, and what was made from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session

if TYPE_CHECKING:
    from hubdiff.graph import Graph


@click.command(
    "lineage",
    short_help="Show what was made from what.",
    cls=shared.Command,
    usage="REPO [OPTIONS]",
    examples=(
        "hubdiff lineage me/tuned-delta",
        "hubdiff lineage org/base --depth 2 --format mermaid",
        "hubdiff lineage me/tuned-v2 --html lineage.html",
    ),
)
@click.argument("repo")
@click.option(
    "--format",
    type=click.Choice(["tree", "json", "mermaid", "dot"]),
    default="tree",
    metavar="FORMAT",
    help="tree, json, mermaid or dot. Default: tree.",
)
@click.option("--html", metavar="FILE", help="Write one page with the graph, to click through.")
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=6,
    metavar="N",
    help="Steps to follow in either direction. Default: 6.",
)
@shared.json_output
@pass_session
def command(session: Session, repo: str, format: str, html: str | None, depth: int) -> None:
    """Show the graph around REPO, a model, a delta or a result: bases, tuned models, deltas,
    results and new versions. An edge has the pin that a manifest or a record gives it."""
    session.json = session.json or format == "json"
    from hubdiff.graph import dot, mermaid, tree_lines
    from hubdiff.jobs.lineage import lineage
    from hubdiff.writer import require_place

    with session.working() as progress:
        if html is not None:
            require_place(Path(html))
        graph = lineage(repo, depth=depth, progress=progress)
        if html is not None:
            _write(Path(html), graph)
            progress.note(f"written: {html}")
        if graph.cut:
            progress.note("there is more than was followed (--depth)")

    def draw(page: Page) -> None:
        text = {"mermaid": mermaid, "dot": dot}.get(format)
        for line in tree_lines(graph) if text is None else text(graph).splitlines():
            page.line(line)

    session.show(graph.as_json(), draw)


def _write(file: Path, graph: Graph) -> None:
    from hubdiff.lineage_page import lineage_page
    from hubdiff.writer import disk_errors

    page = lineage_page(graph).encode(errors="replace")
    with disk_errors(file):
        file.write_bytes(page)
