"""``hubdiff eval``: what a model, or a base with deltas on it, can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, duration, pass_session

if TYPE_CHECKING:
    from hubdiff.jobs.bench import Evaluated
    from hubdiff.lab.scores import TaskScore

F = TypeVar("F", bound=Callable[..., Any])
GOES_ON = "Stopped. Run the same command again: it goes on from the answers it has."


def task_options(function: F) -> F:
    """Which tasks, and how they are put: the same for every command that evaluates."""
    options = [
        click.option(
            "--tasks",
            multiple=True,
            metavar="NAME,…",
            help="Tasks of lm-evaluation-harness, YAML files, or SUITE/NAME; repeatable.",
        ),
        click.option("--suite", metavar="NAME", help="A suite of tasks: paper or global-mmlu."),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            metavar="N",
            help="Examples of each task. For trying out.",
        ),
        click.option(
            "--apply-chat-template",
            "chat_template",
            is_flag=True,
            help="Write prompts with the tokenizer's chat template.",
        ),
        click.option(
            "--batch-size",
            "batch",
            type=click.IntRange(min=1),
            default=8,
            metavar="N",
            help="Requests at a time. Default: 8.",
        ),
        click.option("--seed", type=click.IntRange(min=0), default=1234, metavar="N"),
        click.option(
            "--device",
            default="auto",
            metavar="DEVICE",
            help="auto, cpu, cuda, cuda:N or mps. Default: auto. vLLM chooses itself.",
        ),
        click.option("--spread", is_flag=True, help="Spread a model over all GPUs."),
        click.option(
            "--backend",
            type=click.Choice(["accelerate", "vllm"]),
            default="accelerate",
            help="Default: accelerate.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def split_tasks(options: dict[str, Any]) -> dict[str, Any]:
    """``--tasks a,b --tasks c`` as a list."""
    names = [
        name.strip()
        for words in options["tasks"]
        for name in ([words] if Path(words).exists() else words.split(","))
    ]
    return {**options, "tasks": [name for name in names if name]}


@click.command(
    "eval",
    short_help="Evaluate a model, or a base with deltas on it.",
    cls=shared.Command,
    usage="MODEL[+DELTA…] --tasks NAME,… [OPTIONS]",
    examples=(
        "hubdiff eval org/base-v2+me/delta --suite paper",
        "hubdiff eval org/base-v2+me/delta:0.8 --tasks gsm8k_cot,my_task.yaml --limit 50",
        "hubdiff eval org/base-v2+me/delta --tasks paper/gsm8k --card me/result --create-pr",
    ),
)
@click.argument("model")
@task_options
@click.option("--scale", type=float, default=1.0, metavar="S", help="Of all deltas. Default: 1.")
@click.option("--output", metavar="DIR", help="Write results.json and each answer here.")
@click.option(
    "--card", metavar="DIR|REPO", help="Put the scores into this model's card and .eval_results."
)
@click.option("--create-pr", is_flag=True, help="As a pull request on that repo.")
@shared.json_output
@pass_session
def command(session: Session, model: str, **options: Any) -> None:
    """Evaluate MODEL by lm-evaluation-harness; of MODEL+DELTA what apply would make of the two,
    merged in memory and written nowhere.

    Tasks are the harness's (lm_eval ls tasks), YAML files of your own, which work offline with data
    of your own, or those of a suite. The suite "paper" has the tables of Lin et al. 2025: gsm8k,
    math, arc-c, gpqa, mmlu, ifeval, math500 and global-mmlu-mg, -si and -tr; --tasks paper/gsm8k
    is one of them. "global-mmlu" has 42 languages, such as global-mmlu/sw.

    A run that was stopped goes on from the answers it has when the same command is run again.
    Several devices: accelerate launch -m hubdiff eval …, or --spread for a model that one does not
    hold. Needs pip install "hubdiff[eval]".
    """
    if options["create_pr"] and options["card"] is None:
        raise click.UsageError("--create-pr goes with --card REPO")

    from hubdiff.jobs.evaluate import evaluate

    with session.working_launched(if_stopped=GOES_ON) as progress:
        made = evaluate(model, **split_tasks(options), progress=progress)
    if made is not None:
        session.show(made.as_json(), lambda page: _draw(page, made, options["output"]))


def _draw(page: Page, made: Evaluated, output: str | None) -> None:
    page.fields([("model", made.model), ("scale", f"{made.scale:g}" if made.scale != 1 else None)])
    page.line()
    page.table(
        ["task", "examples", "shots", "score", "±", "metric"],
        [
            (
                score.name,
                f"{score.examples:,}",
                str(score.fewshot),
                f"{score.value:.4f}",
                f"{score.stderr:.4f}" if score.stderr is not None else "",
                metric_words(score),
            )
            for score in made.scores
        ],
    )
    page.line()
    page.fields(
        [
            ("took", duration(made.seconds)),
            ("answers", output),
            ("card", made.card),
        ]
    )


def metric_words(score: TaskScore) -> str:
    words = ", ".join(metric.removesuffix(",none") for metric in score.metrics)
    return words if score.higher_is_better else f"{words} (small is good)"
