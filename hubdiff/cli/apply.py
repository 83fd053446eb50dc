"""``hubdiff apply``: one delta or several onto a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, count, duration, pass_session
from hubdiff.summary import size_text

if TYPE_CHECKING:
    from hubdiff.jobs.apply import Applied


@click.command(
    "apply",
    short_help="Put deltas on a model: the own base or another.",
    cls=shared.Command,
    usage="DELTA[:WEIGHT]... --to TARGET (--output DIR | --push-to REPO) [OPTIONS]",
    examples=(
        "hubdiff apply me/tuned-delta --to org/base --output ./tuned",
        "hubdiff apply me/tuned-delta --to org/base-v2 --push-to me/tuned-v2",
        "hubdiff apply me/tuned-delta --to org/base-v2 --output ./half --scale 0.5",
        "hubdiff apply me/tuned-delta --to org/base-v2 --output ./half "
        "--scale 'model.layers.{0..7}.*=0.5'",
        "hubdiff apply me/a-delta:0.7 me/b-delta:0.5 --to org/base-v2 --output ./both",
        "hubdiff apply me/a-delta me/b-delta --to org/base-v2 --output ./both --method ties",
        "hubdiff apply me/tuned-delta --to org/base-v2 --output ./tuned-v2 --dry-run",
    ),
)
@click.argument("delta", nargs=-1, required=True)
@click.option("--to", required=True, metavar="TARGET", help="The model to put it on.")
@click.option("--output", metavar="DIR", help="Write the result into this folder.")
@click.option("--push-to", metavar="REPO", help="Publish the result as this repo on the Hub.")
@click.option(
    "--scale",
    type=shared.Scale(),
    multiple=True,
    metavar="[GLOB=]A",
    help="Add A · Δ, to all tensors or those that match; repeatable, the last match wins. "
    "Default: 1.",
)
@click.option(
    "--method",
    type=click.Choice(["linear", "ties", "dare"]),
    default="linear",
    metavar="METHOD",
    help="How deltas are merged: linear, ties or dare. Default: linear.",
)
@click.option(
    "--density",
    type=float,
    metavar="D",
    help="The share of Δ that ties keeps (default: 0.2) or dare draws.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", help="Of the draw of dare. Default: 0."
)
@shared.vocab
@click.option(
    "--device",
    default="auto",
    metavar="DEVICE",
    help="auto, cpu, cuda, cuda:N or mps. Default: auto.",
)
@shared.filters("tensors")
@shared.private
@shared.public
@shared.pr
@click.option(
    "--force",
    is_flag=True,
    help="Replace what stands at DIR or REPO; also make what check refuses.",
)
@shared.cache
@click.option(
    "--require-signature",
    is_flag=True,
    help="Only deltas that are signed, as --key or --signed-by says.",
)
@shared.trust
@click.option("--dry-run", is_flag=True, help="Print the plan; read no weights, write nothing.")
@shared.json_output
@pass_session
def command(session: Session, delta: tuple[str, ...], **options: Any) -> None:
    """Put DELTA, or several, on TARGET.

    On the delta's own base, recognised by content, the tuned model comes back: every file, byte for
    byte. On any other base of the family the result is TARGET + A · Δ, rounded once.

    Several deltas, each with a WEIGHT (1 unless given), are added as a weighted sum in float32,
    rounded once; --method ties resolves their signs first, --method dare draws what is kept of
    each. A GLOB is matched with the delta's tensor names; {0..7} and {a,b} work as in a shell.

    A run with --output that was stopped goes on where it was when the same command is run again.
    """
    output, push_to = options["output"], options["push_to"]
    if (output is None) == (push_to is None):
        raise click.UsageError("give either --output DIR or --push-to REPO")
    if output is not None and (options["pr"] or options["private"] or options["public"]):
        raise click.UsageError("--pr, --private and --public go with --push-to REPO")
    if options["private"] and options["public"]:
        raise click.UsageError("give one of --private and --public")
    _check_settings(options)
    signer = [options.pop(name) for name in ("key", "signed_by", "issuer")]
    if any(signer) and not options["require_signature"]:
        raise click.UsageError("--key, --signed-by and --issuer go with --require-signature")
    if options["require_signature"] and (signer[0] is None) == (signer[1] is None):
        raise click.UsageError("--require-signature needs one of --key and --signed-by")
    options["scale"] = _scales(options["scale"])

    from hubdiff.jobs.apply import apply
    from hubdiff.signing import Trust

    required = options.pop("require_signature")
    options["signature"] = Trust.of(*signer) if required else None
    stopped = (
        f"Stopped. Nothing was published at {push_to}; a repo that is new stays there, empty."
        if output is None
        else f"Stopped. {output} is as it was; run the same command again to go on from here."
    )
    with session.working_together(if_stopped=stopped) as (progress, ranks):
        applied = apply(
            list(delta), **options, command=session.command, progress=progress, ranks=ranks
        )
        if options["pr"] and not applied.dry_run and applied.pr_url is None:
            progress.note(f"{applied.where} {shared.NO_PR}")
    session.show(applied.as_json(), lambda page: _draw(page, applied))


def _check_settings(options: dict[str, Any]) -> None:
    method, density, seed = options["method"], options["density"], options["seed"]
    if density is not None and method == "linear":
        raise click.UsageError("--density goes with --method ties or dare")
    if seed is not None and method != "dare":
        raise click.UsageError("--seed goes with --method dare")
    if density is None and method == "dare":
        raise click.UsageError("--method dare needs --density D, for example 0.1")
    if density is not None and not 0 < density <= 1:
        raise click.UsageError("--density is a share: 0 < D <= 1")


def _scales(given: tuple[tuple[str | None, float], ...]) -> float | dict[str, float]:
    """What the library takes: a number, or globs in order, one for all the others first."""
    alone = [scale for glob, scale in given if glob is None]
    if len(alone) > 1:
        raise click.UsageError("give one --scale A; others take a glob: --scale GLOB=A")
    default = alone[0] if alone else 1.0
    scales = {"*": default}
    for glob, scale in given:
        if glob is not None:
            scales.pop(glob, None)  # the last one counts, and it counts from its own place
            scales[glob] = scale
    return scales if len(scales) > 1 or "*" not in scales else scales["*"]


def _draw(page: Page, applied: Applied) -> None:
    if applied.dry_run:
        _draw_plan(page, applied)
    else:
        _draw_result(page, applied)


def _draw_result(page: Page, applied: Applied) -> None:
    plan, written = applied.plan, sum(file.size for file in applied.files)
    rate = f"{size_text(written / max(applied.seconds, 1e-3))}/s"
    copied = len(plan["files"]) - len(_planned(applied))
    page.fields(
        [
            ("result", applied.where),
            ("case", _case(plan)),
            ("because", plan["reason"]),
            (
                "written",
                f"{count(len(applied.files), 'file')}, {size_text(written)} in "
                f"{duration(applied.seconds)} ({rate})",
            ),
            ("copied", f"{count(copied, 'file')}, by the Hub itself" if copied else None),
            ("commit", applied.url),
            ("pull request", applied.pr_url),
        ]
    )
    _draw_remarks(page, plan)


def _planned(applied: Applied) -> list[dict[str, Any]]:
    """The files of the plan that were written here."""
    written = {file.path for file in applied.files}
    return [file for file in applied.plan["files"] if file["path"] in written]


def _case(plan: dict[str, Any]) -> str:
    scale = plan["scale"]
    if isinstance(scale, dict):
        return f"{plan['case']}, scaled by tensor"
    return plan["case"] if scale == 1.0 else f"{plan['case']} at scale {scale:g}"


def _inputs(plan: dict[str, Any]) -> list[tuple[str, str | None]]:
    """What goes into a merge, line by line."""
    several = len(plan["deltas"]) > 1
    fields: list[tuple[str, str | None]] = [
        (
            "delta",
            f"{item['weight']:g} × {item['delta']}"
            if several or item["weight"] != 1
            else item["delta"],
        )
        for item in plan["deltas"]
    ]
    method = plan["method"]
    if method:
        said = [f"{key} {value}" for key, value in method.items() if key != "name"]
        fields.append(("method", ", ".join([method["name"], *said])))
    if isinstance(plan["scale"], dict):
        fields += [("scale", f"{scale:g} for {glob}") for glob, scale in plan["scale"].items()]
    return fields


def _draw_plan(page: Page, applied: Applied) -> None:
    plan = applied.plan
    page.line("The plan: no weights were read, nothing was written.")
    page.line()
    page.fields(
        [
            ("case", _case(plan)),
            ("because", plan["reason"]),
            *_inputs(plan),
            ("target", plan["target"]),
            ("result", applied.where),
        ]
    )
    page.line()
    page.table(
        ["file", "size", "tensors changed", ""],
        [
            (
                file["path"],
                size_text(file["bytes"]),
                f"{file['changed']:,} of {file['tensors']:,}" if "changed" in file else "",
                file["action"],
            )
            for file in plan["files"]
        ],
    )
    page.line()
    read = plan["read"]
    page.fields(
        [
            ("read", f"{size_text(read['target'])} target + {size_text(read['delta'])} delta"),
            ("network", size_text(read["network"])),
            ("write", size_text(plan["write"])),
            (
                "temporary files",
                f"at most {size_text(plan['scratch'])}" if plan["scratch"] else None,
            ),
            ("memory", f"at most {size_text(plan['peak_memory'])}"),
        ]
    )
    _draw_remarks(page, plan)


def _vocabulary(plan: dict[str, Any]) -> list[str]:
    """Where rows went, and whose tokenizer the result has."""
    texts = []
    for item, one in zip(plan["deltas"], plan["vocabulary"], strict=False):
        if one is not None:
            whose = f"{item['delta']}: " if len(plan["deltas"]) > 1 else ""
            texts += [
                f"{whose}{one['text']}",
                f"{whose}tokenizer of the result: {one['tokenizer']}",
            ]
    return texts


def _draw_remarks(page: Page, plan: dict[str, Any]) -> None:
    """What a reader of the result should know; nothing in most cases."""
    notes = [f"{file['path']}: {file['note']}" for file in plan["files"] if file.get("note")]
    sections = (
        ("Vocabulary", _vocabulary(plan)),
        ("Notes", [*plan["notes"], *notes]),
        ("Kept from the target, the tuned model has no such tensor", plan["kept"]),
        ("Left out", [f"{item['path']}: {item['reason']}" for item in plan["left_out"]]),
    )
    for title, texts in sections:
        if texts:
            page.heading(title)
            page.items(texts)
