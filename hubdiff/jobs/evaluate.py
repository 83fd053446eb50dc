"""evaluate: what a model, or a base with deltas on it, can do, and its card told so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hubdiff.errors import HubdiffError
from hubdiff.files import FileTree, open_tree
from hubdiff.jobs.bench import BACKENDS, Asked, Bench, Evaluated, Subject, require_output
from hubdiff.progress import Progress
from hubdiff.refs import ModelRef
from hubdiff.writer import disk_errors, write_whole

CARD = "README.md"


def evaluate(
    model: str | Path,
    *,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    limit: int | None = None,
    scale: float = 1.0,
    chat_template: bool = False,
    batch: int = 8,
    seed: int = 1234,
    device: str = "auto",
    spread: bool = False,
    backend: str = BACKENDS[0],
    output: str | Path | None = None,
    card: str | Path | None = None,
    create_pr: bool = False,
    progress: Progress | None = None,
) -> Evaluated | None:
    """Evaluate ``model`` by lm-evaluation-harness.

    Args:
        model: a ref or a folder; with deltas on it ``MODEL+DELTA…``, each with ``:WEIGHT`` or not:
            they are merged in memory, and nothing of the result is written.
        tasks, suite: tasks of the harness, YAML files, ``SUITE/NAME``; and a suite of hubdiff's.
        limit: examples of each task. A number for trying out, not for reporting.
        scale: for all deltas.
        chat_template: write prompts with the tokenizer's.
        spread: over all GPUs, where one does not hold the model.
        backend: ``accelerate``, or ``vllm`` where that is installed, which reads the merged model
            from a folder: in memory (/dev/shm) where there is room.
        output: a folder for ``results.json`` and what the model said to each example.
        card: a model folder or a repo whose card takes the scores.
        create_pr: as a pull request.

    A run that was stopped goes on from the answers it has when it is called the same way again.
    Under ``accelerate launch`` each process answers its share; those that are not the first get
    None. Needs ``pip install "hubdiff[eval]"``. Raises ``HubdiffError``.
    """
    asked = Asked(tuple(tasks), suite, limit, chat_template, batch, seed, device, spread, backend)
    _require_places(output, card)
    subject = Subject.parse(model, scale)
    bench = Bench(asked, progress)
    made = bench.evaluate(subject)
    if made is not None and output is not None:
        made.write(Path(output))
    if made is not None and card is not None:
        made = replace(made, card=_to_card(made, ModelRef.parse(card), create_pr))
    bench.finish()
    return made


def _require_places(output: str | Path | None, card: str | Path | None) -> None:
    """What would keep the scores from being kept, before hours are spent on them."""
    if output is not None:
        require_output(Path(output))
    if card is None:
        return
    ref = ModelRef.parse(card)
    if ref.path is None:
        from hubdiff.hub import require_token

        require_token()
    elif not ref.path.is_dir():
        raise HubdiffError(
            f"there is no folder {card} whose card could take the scores",
            next_step="Give a model folder, or a repo.",
        )
    from hubdiff.lab.score_card import with_scores

    with_scores(_read_card(open_tree(ref, cache=False)), _name(ref), (), "")


def _read_card(tree: FileTree) -> str:
    """To the letter, line ends included."""
    if CARD not in tree.files():
        return ""
    try:
        return tree.read_bytes(CARD).decode("utf-8")
    except UnicodeDecodeError as error:
        raise HubdiffError(
            f"the card of {tree.pin} is not UTF-8: {error}", next_step="Save it as UTF-8."
        ) from error


def _to_card(made: Evaluated, ref: ModelRef, create_pr: bool) -> str:
    from hubdiff.hub import HubUpload, benchmark_tasks
    from hubdiff.lab.score_card import benchmark_files, with_scores

    how = f"lm-evaluation-harness {made.libraries['lm_eval']}"
    if made.limit is not None:
        how += f", the first {made.limit:,} examples of each task only"
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # Part of a task is no result of a benchmark.
    whole = made.scores if made.limit is None else ()
    files = benchmark_files(whole, benchmark_tasks, how, date)
    tree = open_tree(ref, cache=False)  # anew: hours may have passed
    files[CARD] = with_scores(_read_card(tree), _name(ref), made.scores, how)
    if ref.path is not None:
        with disk_errors(ref.path):
            for path, text in files.items():
                (ref.path / path).parent.mkdir(exist_ok=True)
                write_whole(ref.path / path, text.encode())
        return str(ref.path)
    assert ref.repo is not None
    upload = HubUpload(ref.repo, revision=ref.revision, create_pr=create_pr, parent=tree.pin.commit)
    for path, text in files.items():
        upload.add_bytes(path, text.encode())
    done = upload.commit("Add evaluation results")
    return done.pr_url or done.url


def _name(ref: ModelRef) -> str:
    return ref.repo or (ref.path.resolve().name if ref.path else "")
