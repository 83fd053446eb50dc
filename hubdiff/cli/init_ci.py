"""``hubdiff init-ci``: the GitHub workflow that ports deltas to new bases, set up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session

if TYPE_CHECKING:
    from hubdiff.backport.init_ci import Initialised


@click.command(
    "init-ci",
    short_help="Set up the GitHub workflow that does this for new bases.",
    cls=shared.Command,
    usage="[DIR] [OPTIONS]",
    examples=("hubdiff init-ci", "hubdiff init-ci --force --dry-run"),
)
@click.argument("directory", metavar="DIR", default=".")
@click.option(
    "--commit",
    metavar="SHA",
    help="The commit of hubdiff that the workflow runs. Default: the one that it runs, else that "
    "of this version's tag.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace what is not as it would be written (never hubdiff.yaml), and take this version.",
)
@click.option("--dry-run", is_flag=True, help="Write no file.")
@shared.json_output
@pass_session
def command(
    session: Session, directory: str, commit: str | None, force: bool, dry_run: bool
) -> None:
    """Write a workflow, a hubdiff.yaml to fill in and a page of instructions into the git
    repository that DIR (default: where you are) is in. Files that are there are left as they are.

    Run it again when hubdiff.yaml is filled in: it prints what to enter on the Hub as the trusted
    publisher of each repo that results go to. To go to another version of hubdiff, run that one
    with --force.
    """
    from hubdiff.backport.init_ci import init_ci

    with session.working():
        made = init_ci(directory, commit=commit, force=force, dry_run=dry_run)
    session.show(made.as_json(), lambda page: _draw(page, made))


def _draw(page: Page, made: Initialised) -> None:
    page.fields(list(made.files.items()))
    page.line()
    if "kept" in (state for path, state in made.files.items() if path != "hubdiff.yaml"):
        page.prose("Kept files are not as this version would write them: --force replaces them.")
    if made.files["hubdiff.yaml"] == "written":
        page.prose("Next: fill in hubdiff.yaml, and run hubdiff init-ci again.")
    for one in made.publishers:
        page.heading(f"Trusted publisher of {one.repo}: {one.settings}")
        page.fields(
            [
                ("repository", one.repository or "unknown: there is no remote origin on GitHub"),
                ("workflow", one.workflow),
                ("branch", one.branch or "your default branch"),
            ]
        )
    if made.dry_run:
        page.line("dry run: nothing was written")
