"""``hubdiff backport``: the stages that bring a plan of hubdiff watch to the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, duration, pass_session
from hubdiff.cli.backport_record import record_command, report_command

if TYPE_CHECKING:
    from hubdiff.backport.gate import Gated
    from hubdiff.backport.publish import Published
    from hubdiff.backport.run import Ran

REFUSED = 4


@click.group(
    "backport",
    short_help="Bring deltas to new bases: run, gate, publish, record, report.",
    context_settings=shared.HELP,
)
def command() -> None:
    """Bring the items of a plan of hubdiff watch to the Hub, stage by stage: run makes and measures
    one, gate decides, publish puts it on the Hub, record writes hubdiff.lock, report tells people.

    PLAN is the file that hubdiff watch wrote, RESULTS a folder; each item has RESULTS/ID. The same
    commands run in the GitHub workflow that hubdiff init-ci sets up.
    """


_item = click.option("--item", required=True, metavar="ID", help="Which item of the plan.")


@command.command(
    "run",
    cls=shared.Command,
    usage="PLAN RESULTS --item ID [OPTIONS]",
    examples=("hubdiff backport run plan.json results --item 0123456789ab",),
)
@click.argument("plan")
@click.argument("results")
@_item
@click.option("--device", default="auto", metavar="DEVICE", help="As for hubdiff eval.")
@click.option("--dry-run", is_flag=True, help="Ask only whether it fits, and what check says.")
@shared.json_output
@pass_session
def run_command(
    session: Session, plan: str, results: str, item: str, device: str, dry_run: bool
) -> None:
    """Check one item, evaluate the base and the result, and make what is to be published.

    Of several scales the best is taken, on one half of the examples; the other half says what it is
    worth. Runs the tasks' code, and needs no right to write. Needs pip install
    "hubdiff[backport,eval]".
    """
    from hubdiff.backport.run import run

    with session.working(if_stopped="Stopped. Run the same again to go on.") as progress:
        made = run(plan, results, item=item, device=device, dry_run=dry_run, progress=progress)
    session.show(made.as_json(), lambda page: _draw_run(page, made))


def _draw_run(page: Page, made: Ran) -> None:
    document = made.document
    scores = document.get("scores") or {}
    for task, found in (scores.get("result") or {}).items():
        base = (scores.get("base") or {}).get(task) or {}
        page.line(f"{task}: {_shown(found)} at scale {document['scale']:g}, base {_shown(base)}")
    page.fields(
        [
            ("check", str((document.get("check") or {}).get("verdict"))),
            ("disk", f"{made.needs / 1e9:.1f} GB"),
            ("took", duration(document["seconds"])),
            ("result", made.folder),
        ]
    )
    if document.get("why"):
        page.line(str(document["why"]))
    if made.dry_run:
        page.line("dry run: nothing was written")


def _shown(score: dict[str, Any]) -> str:
    value, stderr = score.get("value"), score.get("stderr")
    if value is None:
        return "no number"
    return f"{value:.4g}" + (f" ± {stderr:.2g}" if stderr is not None else "")


@command.command(
    "gate",
    cls=shared.Command,
    usage="PLAN RESULTS --item ID [OPTIONS]",
    examples=("hubdiff backport gate plan.json results --item 0123456789ab",),
)
@click.argument("plan")
@click.argument("results")
@_item
@click.option("--dry-run", is_flag=True, help="Write no gate.json.")
@shared.json_output
@pass_session
def gate_command(session: Session, plan: str, results: str, item: str, dry_run: bool) -> int:
    """Say whether a result is what hubdiff.yaml asks for. Exit code 4: it is not."""
    from hubdiff.backport.gate import GATE, gate_item
    from hubdiff.backport.items import write_document

    with session.working():
        said = gate_item(plan, results, item=item)
        if not dry_run:
            write_document(results, item, GATE, said.as_json())
    session.show(said.as_json(), lambda page: _draw_gate(page, said))
    return 0 if said.passed else REFUSED


def _draw_gate(page: Page, said: Gated) -> None:
    page.line("passed" if said.passed else "refused")
    for reason in said.reasons:
        page.line(f"- {reason}")


@command.command(
    "publish",
    cls=shared.Command,
    usage="PLAN RESULTS --item ID [OPTIONS]",
    examples=("hubdiff backport publish plan.json results --item 0123456789ab --dry-run",),
)
@click.argument("plan")
@click.argument("results")
@_item
@click.option("--dry-run", is_flag=True, help="Look what is there, and write nothing.")
@shared.json_output
@pass_session
def publish_command(session: Session, plan: str, results: str, item: str, dry_run: bool) -> None:
    """Put an item that passed the gate on the Hub, as a pull request or a branch. What an earlier
    run put there already is found and left as it is."""
    from hubdiff.backport.publish import publish_item

    with session.working() as progress:
        made = publish_item(plan, results, item=item, dry_run=dry_run, progress=progress)
    session.show(made.as_json(), lambda page: _draw_published(page, made))


def _draw_published(page: Page, made: Published) -> None:
    if made.dry_run:
        page.line(f"dry run: it would go to {made.to} ({made.mode})")
        return
    where = made.pr_url or made.url or "nowhere: publish.mode is none"
    page.line(f"{'there already' if made.reused else 'published'}: {where}")


command.add_command(record_command)
command.add_command(report_command)
