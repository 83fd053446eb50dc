"""``hubdiff finetune``: supervised fine-tuning, and its delta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, duration, pass_session

if TYPE_CHECKING:
    from hubdiff.jobs.finetune import Finetuned


@click.command(
    "finetune",
    short_help="Fine-tune a base, and push what changed.",
    cls=shared.Command,
    usage="BASE --data FILE|DATASET --output DIR [OPTIONS]",
    examples=(
        "hubdiff finetune org/base --data train.jsonl --output tuned --set steps=500",
        "hubdiff finetune org/base --data org/data:train --output tuned --push-delta me/delta",
        "hubdiff finetune org/base-v2 --from-delta me/delta --data train.jsonl --output tuned-v2",
        "hubdiff finetune org/base --data train.jsonl --output adapter --set lora.rank=16",
    ),
)
@click.argument("base")
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="A .jsonl, .json, .csv or .parquet file, or org/name[:split] of the Hub.",
)
@click.option("--output", required=True, metavar="DIR", help="Write the tuned model here.")
@click.option("--from-delta", metavar="DELTA", help="Put this delta on BASE first, start there.")
@click.option(
    "--recipe", default="paper", metavar="NAME|FILE", help="paper, or a YAML file. Default: paper."
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change the recipe; repeatable."
)
@click.option("--push-delta", "push_to", metavar="REPO", help="Publish the delta to BASE as REPO.")
@shared.private
@click.option(
    "--force",
    is_flag=True,
    help="Replace what stands at DIR, and the unfinished training of another run; also start from "
    "a delta that check refuses.",
)
@shared.json_output
@pass_session
def command(session: Session, base: str, **options: Any) -> None:
    """Fine-tune BASE on DATA, by TRL, into DIR.

    DATA has the columns prompt and completion (only the completion is learnt), messages (only what
    the assistant says is; needs a chat template) or text. All weights are trained in float32 and
    kept so in DIR/master: --push-delta makes the delta of those.

    The recipe "paper" is that of Lin et al. 2025: AdamW, learning rate 5e-6 falling to 0, warm-up
    0.03, 30,000 steps of 8 examples, 2,048 tokens, no dropout, no decay of embeddings. --set
    changes it: steps, batch, micro_batch, length, learning_rate, schedule, warmup, weight_decay,
    dropout, max_grad_norm, packing, gradient_checkpointing, seed, save_every, log_every,
    lora.rank, lora.alpha, lora.dropout, lora.targets.

    A run that was stopped goes on from its last checkpoint when the same command is run again.
    Several devices: accelerate launch -m hubdiff finetune …. Needs pip install "hubdiff[finetune]".
    """
    if options["private"] and options["push_to"] is None:
        raise click.UsageError("--private goes with --push-delta REPO")

    from hubdiff.jobs.finetune import finetune

    stopped = (
        f"Stopped. {options['output']} is as it was, or the tuned model if training was over; else "
        "run the same command again to go on from the last checkpoint."
    )
    with session.working_launched(if_stopped=stopped) as progress:
        made = finetune(base, **options, command=session.command, progress=progress)
    session.show(made.as_json(), lambda page: _draw(page, made))


def _draw(page: Page, made: Finetuned) -> None:
    first, last = (made.losses[0], made.losses[-1]) if made.losses else (None, None)
    page.fields(
        [
            ("tuned", made.output),
            ("base", made.base),
            ("started from", made.delta and f"{made.base} with {made.delta} on it"),
            ("examples", f"{made.examples:,}"),
            ("steps", f"{made.recipe.steps:,} of {made.recipe.batch}"),
            ("loss", f"{first:.4g} → {last:.4g}" if made.losses else None),
            ("took", duration(made.seconds)),
            ("delta", made.pushed.where if made.pushed else None),
            ("commit", made.pushed.url if made.pushed else None),
        ]
    )
