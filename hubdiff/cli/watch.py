"""``hubdiff watch``: what is new among the bases, and what is to be done about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, count, pass_session

if TYPE_CHECKING:
    from hubdiff.backport.watch import Watched


@click.command(
    "watch",
    short_help="Look for new bases, and plan which deltas go there.",
    cls=shared.Command,
    usage="[OPTIONS]",
    examples=("hubdiff watch", "hubdiff watch --only qwen/math --adopted --output plan.json"),
)
@click.option("--config", default="hubdiff.yaml", metavar="FILE", help="Default: hubdiff.yaml.")
@click.option("--lock", default="hubdiff.lock", metavar="FILE", help="Default: hubdiff.lock.")
@click.option(
    "--only", multiple=True, metavar="NAME", help="Only this FAMILY or FAMILY/DELTA; repeatable."
)
@click.option("--base", multiple=True, metavar="REPO", help="Only this base; repeatable.")
@click.option("--adopted", is_flag=True, help="Plan also what was there at the first run.")
@click.option("--output", metavar="FILE", help="Write the plan there, for hubdiff backport.")
@click.option(
    "--outputs",
    metavar="FILE",
    help="Append count=, matrix= and news= there, as $GITHUB_OUTPUT has it.",
)
@click.option("--dry-run", is_flag=True, help="Write no file.")
@shared.json_output
@pass_session
def command(
    session: Session,
    config: str,
    lock: str,
    only: tuple[str, ...],
    base: tuple[str, ...],
    adopted: bool,
    output: str | None,
    outputs: str | None,
    dry_run: bool,
) -> None:
    """Compare the bases that hubdiff.yaml names or finds with hubdiff.lock, and plan what is to be
    done: each delta on each base that it was not on yet.

    The first time a delta is seen all bases are adopted: hubdiff backport record writes them down,
    and nothing else happens; --adopted plans them too. A new version of a delta goes where the old
    one went, and where that would go now.

    Costs one call to the Hub for a base that is followed, and none for one that is pinned and
    known, unless its new_version is followed. Needs pip install "hubdiff[backport]".
    """
    from hubdiff.backport.watch import watch
    from hubdiff.writer import write_whole

    with session.working() as progress:
        found = watch(config, lock=lock, only=only, bases=base, adopted=adopted, progress=progress)
    document = found.as_json()
    if output is not None and not dry_run:
        write_whole(Path(output), (json.dumps(document, indent=2) + "\n").encode())
    if outputs is not None and not dry_run:
        with Path(outputs).open("a", encoding="utf-8") as file:
            matrix = json.dumps({"id": [item.id for item in found.items]})
            news = json.dumps(found.news)
            file.write(f"count={len(found.items)}\nmatrix={matrix}\nnews={news}\n")
    session.show(document, lambda page: _draw(page, found))


def _draw(page: Page, found: Watched) -> None:
    if found.items:
        page.table(
            ["id", "delta", "base", "direction", "attempt"],
            [
                (
                    item.id,
                    f"{item.family}/{item.delta}",
                    item.base[:-28],
                    item.direction,
                    str(item.attempt),
                )
                for item in found.items
            ],
        )
        page.line()
    said = [f"{count(len(found.items), 'item')} to do"]
    if found.waiting:
        said.append(f"{found.waiting} more wait for the next run")
    if found.adopt:
        said.append(f"{len(found.adopt)} seen for the first time, and left alone")
    page.line(", ".join(said))
