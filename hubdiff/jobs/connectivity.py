"""connectivity: the loss along the straight line between two models."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.checkpoint import open_checkpoint
from hubdiff.delta import open_delta_tree
from hubdiff.errors import HubdiffError
from hubdiff.files import open_tree
from hubdiff.jobs.finetune import require_all, require_extra, usable_model
from hubdiff.jobs.load import model_class, model_side_files
from hubdiff.jobs.merging import choose_device
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.writer import disk_errors, require_place

if TYPE_CHECKING:
    from hubdiff.lab.line import Line
    from hubdiff.lab.loss import Tokens

BASES, TUNED = "base to target", "tuned to result"


@dataclass(frozen=True)
class Losses:
    """One line: its ``losses`` at the points, and its ``barrier``, how far the loss rises above the
    straight line between those of its ends (0 where it never does). None: no number."""

    name: str
    losses: tuple[float | None, ...]
    barrier: float | None

    @classmethod
    def of(cls, name: str, points: Sequence[float], losses: Sequence[float]) -> Losses:
        if not all(map(math.isfinite, losses)):
            known = tuple(loss if math.isfinite(loss) else None for loss in losses)
            return cls(name, known, None)
        first, last = losses[0], losses[-1]
        above = (loss - (1 - t) * first - t * last for t, loss in zip(points, losses, strict=True))
        return cls(name, tuple(losses), max(0.0, *above))


@dataclass(frozen=True)
class Connectivity:
    """``points`` from 0, the base's end, to 1; ``examples`` and ``tokens`` the losses are of."""

    base: str
    target: str
    delta: str | None
    points: tuple[float, ...]
    lines: tuple[Losses, ...]
    examples: int
    tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def connectivity(
    base: str | Path,
    target: str | Path,
    *,
    data: str | Path,
    delta: str | Path | None = None,
    points: int = 11,
    limit: int = 256,
    length: int = 1024,
    batch: int = 8,
    device: str = "auto",
    plot: str | Path | None = None,
    cache: bool = False,
    progress: Progress | None = None,
) -> Connectivity:
    """The loss on ``data`` along the straight line from ``base`` to ``target``; with a ``delta``
    also from base + Δ to target + Δ.

    A transfer rests on the two bases lying in one basin: where the loss climbs between them, Δ was
    made for a place that the target has left (Lin et al. 2025). One model is in memory, in float32.

    Args:
        base, target, delta: refs or folders.
        data: as ``hubdiff.finetune`` takes it; of ``limit`` examples, ``length`` tokens each.
        points: on each line, both ends included.
        plot: where to write a picture of the curves, as a PNG.

    Needs ``pip install "hubdiff[finetune]"``. Raises ``HubdiffError``.
    """
    require_extra()
    progress = progress or Silent()
    if points < 2 or limit < 1 or length < 2 or batch < 1:
        raise HubdiffError(
            "a line has 2 points at least, and there must be examples of 2 tokens",
            next_step="Check --points, --limit, --length and --batch.",
        )
    if plot is not None:
        require_place(Path(plot))
    where = choose_device(device)
    steps = tuple(number / (points - 1) for number in range(points))
    with ExitStack() as stack:
        trees = [open_tree(ModelRef.parse(ref), cache=cache) for ref in (base, target)]
        first, last = (stack.enter_context(open_checkpoint(tree)) for tree in trees)
        opened = None
        if delta is not None:
            tree = open_tree(ModelRef.parse(delta), cache=cache)
            opened = stack.enter_context(open_delta_tree(tree))
        small = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hubdiff-")))
        model_side_files(trees[0], small, set(first.shards))

        from hubdiff.lab.line import Line

        lines = {BASES: Line.between(first, last)}
        if opened is not None:
            lines[TUNED] = Line.between(first, last, opened)
        examples = _examples(data, small, limit, length)
        progress.start("measuring", points * len(lines), "models")
        found = []
        for name, line in lines.items():
            losses = []
            for t in steps:
                losses.append(_loss(line, t, small, examples, batch, where))
                gc.collect()  # a model is full of cycles: two of them would be in memory
                progress.advance(1)
            found.append(Losses.of(name, steps, losses))
        progress.finish()
        result = Connectivity(
            str(trees[0].pin),
            str(trees[1].pin),
            str(opened.tree.pin) if opened is not None else None,
            steps,
            tuple(found),
            len(examples),
            sum(max(0, len(ids) - start) for ids, start in examples),
        )
    if plot is not None:
        from hubdiff.lab.curve import line_curves

        with disk_errors(Path(plot)), Path(plot).open("wb") as stream:
            line_curves(steps, {one.name: one.losses for one in found}, stream)
    return result


def _examples(data: str | Path, folder: Path, limit: int, length: int) -> list[Tokens]:
    from transformers import AutoTokenizer

    from hubdiff.lab.examples import read_examples
    from hubdiff.lab.loss import tokenized
    from hubdiff.lab.quiet import quiet

    with quiet():
        with usable_model("the base's tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        has_template = bool(tokenizer.chat_template)
        rows = read_examples(data, chat_template=has_template, cache=folder / "data")
        with usable_model("the data with the base's tokenizer"):
            found = tokenized(rows.select(range(min(limit, len(rows)))), tokenizer, length)
    found = [(ids, start) for ids, start in found if len(ids) > start]
    if not found:
        raise HubdiffError(
            f"no token of {data} counts: within {length} tokens there are prompts only",
            next_step="Give a larger --length, or other examples.",
        )
    return found


def _loss(
    line: Line, t: float, folder: Path, examples: list[Tokens], batch: int, device: str
) -> float:
    import torch

    from hubdiff.lab.loss import mean_loss
    from hubdiff.lab.quiet import quiet

    with quiet():
        with usable_model("the base"):
            model, loading = model_class(folder).from_pretrained(
                None,
                config=folder,
                state_dict=line.at(t),
                dtype=torch.float32,
                output_loading_info=True,
            )
        require_all(loading, str(line.first.tree.pin))
        rows = model.get_input_embeddings().num_embeddings
        if any(max(ids) >= rows for ids, _ in examples):
            raise HubdiffError(
                f"the tokenizer of {line.first.tree.pin} has more tokens than its embedding rows",
                next_step="Resize the model first (model.resize_token_embeddings).",
            )
        return mean_loss(model.to(device).eval(), examples, batch)
