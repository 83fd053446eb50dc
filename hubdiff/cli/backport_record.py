"""``hubdiff backport record`` and ``report``: the stages that write things down and tell people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session

if TYPE_CHECKING:
    from hubdiff.backport.record import Recorded
    from hubdiff.backport.report import Reported

_lock = click.option(
    "--lock", default="hubdiff.lock", metavar="FILE", help="Default: hubdiff.lock."
)


@click.command(
    "record",
    cls=shared.Command,
    usage="PLAN RESULTS [OPTIONS]",
    examples=("hubdiff backport record plan.json results --push",),
)
@click.argument("plan")
@click.argument("results")
@_lock
@click.option(
    "--push", is_flag=True, help="Push the commit, merging with what others pushed meanwhile."
)
@click.option("--dry-run", is_flag=True, help="Say what would be committed, and write nothing.")
@shared.json_output
@pass_session
def record_command(
    session: Session, plan: str, results: str, lock: str, push: bool, dry_run: bool
) -> None:
    """Write into hubdiff.lock what became of the items of PLAN, and commit it: the lock alone,
    whatever else is changed in the work tree. To do it twice is to do it once.

    Where nothing is new there is no commit, but for a date after 45 quiet days: GitHub stops the
    schedules of a repository in which nothing happens for 60. Who may push is set up in git.
    """
    from hubdiff.backport.record import record

    with session.working() as progress:
        made = record(plan, results, lock=lock, push=push, dry_run=dry_run, progress=progress)
    session.show(made.as_json(), lambda page: _draw_record(page, made))


def _draw_record(page: Page, made: Recorded) -> None:
    if made.message is None:
        page.line("nothing is new")
        return
    for line in made.message.splitlines():
        page.line(line)
    page.line()
    if made.dry_run:
        page.line(f"dry run: {made.lock} would be committed, and was not written")
    else:
        page.line(f"{'pushed' if made.pushed else 'committed'}: {made.commit}")


@click.command(
    "report",
    cls=shared.Command,
    usage="PLAN RESULTS [OPTIONS]",
    examples=(
        "hubdiff backport report plan.json results --dry-run",
        "hubdiff backport report plan.json results --summary FILE --issue me/models",
    ),
)
@click.argument("plan")
@click.argument("results")
@_lock
@click.option("--summary", metavar="FILE", help="Append it there, as $GITHUB_STEP_SUMMARY has it.")
@click.option(
    "--issue", metavar="OWNER/REPO", help="Keep one issue of that GitHub repository up to date."
)
@click.option("--dry-run", is_flag=True, help="Print the Markdown, and write nothing.")
@shared.json_output
@pass_session
def report_command(
    session: Session,
    plan: str,
    results: str,
    lock: str,
    summary: str | None,
    issue: str | None,
    dry_run: bool,
) -> None:
    """Tell people, in Markdown, what became of the items of PLAN, where everything stands, and what
    needs them.

    The issue is found by a mark in its text; it is opened once and written anew where something
    changed. Needs GITHUB_TOKEN, with permissions: issues: write. Without --summary and --issue the
    Markdown is printed.
    """
    from hubdiff.backport.report import report

    with session.working() as progress:
        made = report(
            plan,
            results,
            lock=lock,
            summary=summary,
            issue=issue,
            dry_run=dry_run,
            progress=progress,
        )
    session.show(made.as_json(), lambda page: _draw_report(page, made, issue))


def _draw_report(page: Page, made: Reported, issue: str | None) -> None:
    if made.dry_run or (made.summary is None and issue is None):
        for line in made.text.splitlines():
            page.line(line)
        return
    if made.summary is not None:
        page.line(f"appended to {made.summary}")
    if issue is not None:
        page.line(
            f"issue {made.action}: {made.issue}" if made.action else "there is nothing to tell"
        )
