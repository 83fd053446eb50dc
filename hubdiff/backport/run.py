"""run: an item made and measured. This is the stage that runs tasks, which may be anybody's code:
it needs no right to write anywhere."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.backport.items import (
    DELTA,
    DELTA_KIND,
    FAILED,
    RAN,
    REFUSED,
    RESULT,
    Item,
    planned_item,
    read_document,
    write_document,
)
from hubdiff.card import delta_card
from hubdiff.checkpoint import MANIFEST
from hubdiff.errors import HubdiffError
from hubdiff.facts import CARD, HEADER, STARTED_FROM, card_facts, facts
from hubdiff.files import open_tree
from hubdiff.jobs.apply import apply
from hubdiff.jobs.check import Checked, check
from hubdiff.jobs.push import push_delta
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.verdict import REFUSE
from hubdiff.writer import disk_errors, write_whole

if TYPE_CHECKING:
    from hubdiff.lab.scores import TaskScore

_ROOM = 1 << 28  # bytes that anything beside the weights may take


@dataclass(frozen=True)
class Ran:
    """``folder`` is the item's; ``document`` what is in its result.json; ``needs`` the bytes of
    disk."""

    folder: str
    document: dict[str, Any]
    needs: int
    dry_run: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "needs": self.needs,
            "dry_run": self.dry_run,
            **self.document,
        }


def run(
    plan: str | Path,
    results: str | Path,
    *,
    item: str,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Ran:
    """Check an item of ``plan``, evaluate base, result and perhaps the tuned model, and make the
    delta on the new base, into ``results``/ID.

    Args:
        item: its id.
        device: as ``hubdiff.evaluate`` takes it.
        dry_run: only ask whether it fits the disk, and what check says.

    Of several scales the best on every second example is taken, and the others say what it is
    worth. ``result.json`` says how it went, also where it failed. Raises ``HubdiffError``.
    """
    found = planned_item(Path(plan), item)
    folder = Path(results) / found.id
    began = time.monotonic()
    root = Path(str(read_document(Path(plan)).get("config"))).parent
    work = _Run(found, root, folder, device, progress or Silent())
    try:
        document = work.document(dry_run)
    except HubdiffError as error:
        if not dry_run:
            _write(results, found, {"status": FAILED, "why": str(error)})
        raise
    document["seconds"] = round(time.monotonic() - began, 3)
    if not dry_run:
        _write(results, found, document)
    return Ran(str(folder), document, work.needs, dry_run)


def _write(results: str | Path, item: Item, document: Mapping[str, Any]) -> None:
    folder = Path(results) / item.id
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_document(results, item.id, RESULT, {"item": item.as_json(), **document})


@dataclass
class _Run:
    item: Item
    root: Path  # where relative task files begin
    folder: Path
    device: str
    progress: Progress
    needs: int = 0

    def document(self, dry_run: bool) -> dict[str, Any]:
        self._preflight()
        checked = check(f"hf://{self.item.source}", f"hf://{self.item.base}")
        said: dict[str, Any] = {"check": _said(checked)}
        if checked.verdict.level == REFUSE:
            return {**said, "status": REFUSED, "why": checked.verdict.why}
        if dry_run:
            return {**said, "status": RAN, "why": None}
        if self.item.evaluation.tasks:
            measured = self._measure()
        else:
            measured = _Measured(self.item.scales[0], {}, [], ())
        if self.item.publish.kind == DELTA_KIND and self.item.publish.mode != "none":
            self._make_delta(measured)
        return {
            **said,
            "status": RAN,
            "why": None,
            "scale": measured.scale,
            "scores": measured.scores,
            "curve": measured.curve,
        }

    def _preflight(self) -> None:
        """What the disk must hold at once: of a delta the result that it is made from as well, of a
        merged model the shard that is being uploaded."""
        planned = apply(
            f"hf://{self.item.source}",
            f"hf://{self.item.base}",
            output=self.folder / "planned",
            dry_run=True,
        ).plan
        sizes = [file["bytes"] for file in planned["files"]]
        delta = planned["read"]["delta"]
        if self.item.publish.kind == DELTA_KIND:
            self.needs = sum(sizes) + delta + _ROOM
        else:
            self.needs = max(sizes) + _ROOM
        place = tempfile.gettempdir()
        room = min(self.item.disk_gb * 1e9, shutil.disk_usage(place).free)
        if self.needs > room:
            raise HubdiffError(
                f"{self.item.family}/{self.item.delta} on {self.item.base} needs "
                f"{self.needs / 1e9:.1f} GB of disk, and {room / 1e9:.1f} GB are there",
                next_step="Choose a larger runner and say so in limits.disk_gb, or publish the "
                "result as: merged, which needs room for one shard.",
            )

    def _measure(self) -> _Measured:
        from hubdiff.jobs.bench import Asked, Bench, Subject

        asked = self.item.evaluation
        tasks = tuple(self._task(task) for task in asked.tasks)
        bench = Bench(
            Asked(
                tasks,
                None,
                asked.limit,
                asked.chat_template,
                asked.batch,
                1234,
                self.device,
                False,
                "accelerate",
            ),
            self.progress,
        )
        delta, base = (
            open_tree(ModelRef.parse(f"hf://{ref}"), cache=False)
            for ref in (self.item.source, self.item.base)
        )

        def scores(subject: Subject) -> tuple[TaskScore, ...]:
            made = bench.evaluate(subject)
            assert made is not None  # one process: the command line sees to it
            return made.scores

        before = scores(Subject.of(base))
        if len(self.item.scales) > 1:
            _require_halves(asked.tasks, before)  # before the hours that the others take
        tried = {s: scores(Subject.of(base, [(delta, 1.0)], s)) for s in self.item.scales}
        tuned = None
        if self.item.gate.tuned is not None:
            ref = ModelRef.parse(f"hf://{self.item.gate.tuned}")
            tuned = scores(Subject.of(open_tree(ref, cache=False)))
        bench.finish()
        return _chosen(self.item, before, tried, tuned)

    def _task(self, task: str) -> str:
        return str(self.root / task) if task.endswith((".yaml", ".yml")) else task

    def _make_delta(self, measured: _Measured) -> None:
        """result − new base, of the result that is written for it and removed again."""
        delta = self.folder / DELTA
        with tempfile.TemporaryDirectory(prefix="hubdiff-") as scratch:
            merged = Path(scratch) / f"{self.item.base.partition('@')[0].rpartition('/')[2]}-tuned"
            apply(
                f"hf://{self.item.source}",
                f"hf://{self.item.base}",
                output=merged,
                scale=measured.scale,
                device=self.device,
                progress=self.progress,
            )
            _name_start(merged, self.item.source)
            push_delta(
                merged,
                delta,
                base=f"hf://{self.item.base}",
                force=True,
                progress=self.progress,
            )
            self._write_card(delta, merged, measured)

    def _write_card(self, delta: Path, merged: Path, measured: _Measured) -> None:
        """The card as it will stand in the repo where the delta goes, with its scores."""
        document = json.loads((delta / MANIFEST).read_bytes())
        tuned, base = (
            facts(open_tree(ModelRef.parse(ref), cache=False)).card_data
            for ref in (merged, f"hf://{self.item.base}")
        )
        to = self.item.publish.to
        text = delta_card(document, repo=to, tuned_card=tuned, base_card=base)
        if measured.taken:
            from hubdiff.lab.score_card import with_scores

            text = with_scores(text, str(to), measured.taken, "lm-evaluation-harness")
        write_whole(delta / CARD, text.encode())


def _name_start(model: Path, source: str) -> None:
    """The card of a result says which delta it began with, so that the lineage of the new delta
    leads back to the old one."""
    import yaml

    path = model / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    repo, _, commit = source.partition("@")
    known = facts(open_tree(ModelRef.parse(f"hf://{source}")))
    closed = known.gated or known.private
    start = {"name": repo, "repo": repo, "commit": commit, "closed": closed}
    head = yaml.safe_dump({**card_facts(text), STARTED_FROM: start}, sort_keys=False)
    body = HEADER.sub("", text, count=1)
    write_whole(path, f"---\n{head}---\n{body}".encode())


def _said(checked: Checked) -> dict[str, Any]:
    said = checked.as_json()
    return {"verdict": checked.verdict.level, "why": checked.verdict.why} | {
        key: said[key] for key in ("findings", "forecast")
    }


@dataclass(frozen=True)
class _Measured:
    """``scores``: of base, result and tuned, task by task; ``curve``: the gate's task at every
    scale; ``taken`` the scores of the chosen scale as the harness gave them."""

    scale: float
    scores: dict[str, Any]
    curve: list[dict[str, Any]]
    taken: tuple[TaskScore, ...]


def _chosen(
    item: Item,
    before: Sequence[TaskScore],
    tried: Mapping[float, Sequence[TaskScore]],
    tuned: Sequence[TaskScore] | None,
) -> _Measured:
    from hubdiff.lab.scale_search import halves

    tasks = item.evaluation.tasks
    at = tasks.index(str(item.gate.task))
    half = len(tried) > 1
    scale = item.scales[0]
    if half:
        choosing = {s: halves([found[at]])[0] for s, found in tried.items()}
        scale = max(choosing, key=lambda s: (choosing[s], -abs(s - 1)))
    sides = {"base": before, "result": tried[scale], "tuned": tuned}
    scores = {
        side: found and dict(zip(tasks, (_value(score, half) for score in found), strict=True))
        for side, found in sides.items()
    }
    curve = [{"scale": s, "value": _number(found[at].value)} for s, found in tried.items()]
    return _Measured(scale, scores, curve, tuple(tried[scale]))


def _require_halves(tasks: Sequence[str], scores: Sequence[TaskScore]) -> None:
    for task, score in zip(tasks, scores, strict=True):
        if len({number % 2 for _, number in score.outcomes}) < 2:
            raise HubdiffError(
                f"one half of the examples of {task} can't choose a scale: its score is no mean "
                "over them, or there is one only",
                next_step="Give one scale, or a task with accuracy or exact match.",
            )


def _value(score: TaskScore, half: bool) -> dict[str, Any]:
    """The score; with ``half`` on the examples that chose no scale."""
    value, stderr, examples = score.value, score.stderr, score.examples
    if half:
        from hubdiff.lab.scale_search import held_out

        found = list(held_out(score).values())
        examples, value = len(found), sum(found) / len(found)
        variance = sum((one - value) ** 2 for one in found) / max(1, examples - 1)
        stderr = math.sqrt(variance / examples)
    return {
        "value": _number(value),
        "stderr": stderr,
        "higher_is_better": score.higher_is_better,
        "examples": examples,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
