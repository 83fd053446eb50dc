"""recycle: Algorithm 1 of Lin et al. 2025 over a list of bases, each fine-tuned from its
predecessor's Δ.

What a step begins with is in the output's ``recycle.json`` before it begins, and what it made when
that is whole. So a step whose folder stands there under the same inputs is finished, and one that
was stopped goes on.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hubdiff.checkpoint import MANIFEST, open_checkpoint
from hubdiff.delta import open_delta_tree
from hubdiff.errors import HubdiffError, NotAdvised, OutputExists, RepoNotFound
from hubdiff.files import FileTree, open_tree
from hubdiff.hashing import hash_bytes
from hubdiff.jobs.check import check
from hubdiff.jobs.finetune import (
    MASTER,
    RECIPE,
    data_identity,
    finetune,
    model_identity,
    require_extra,
    training_folder,
)
from hubdiff.jobs.push import push_delta
from hubdiff.jobs.recycle_report import (
    key_numbers,
    report_of,
    training_of,
    write_report,
)
from hubdiff.lab.recycling import Plan, Step, read_plan, steps_of, wrong
from hubdiff.manifest import manifest_json, read_manifest
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.summary import summarise
from hubdiff.verdict import REFUSE
from hubdiff.writer import disk_errors, only_run, refuse_place, write_whole

STATE = "recycle.json"
DONE, TRAINED, BEGUN, TO_DO, AGAIN = "done", "trained", "begun", "to do", "to be made again"
_FOREIGN = ".gitattributes", "README.md"  # what the Hub's web page puts into a new repo


@dataclass(frozen=True)
class Recycled:
    """What recycle made, or with ``dry_run`` would make. ``report`` is that of report.json;
    ``states`` how far each step was when the run began and ``goes_to`` where its Δ goes, by its
    name."""

    output: str
    dry_run: bool
    report: dict[str, Any]
    states: dict[str, str]
    goes_to: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        steps = [
            {**step, "was": self.states[step["name"]], "delta_goes_to": self.goes_to[step["name"]]}
            for step in self.report["steps"]
        ]
        document = {"output": self.output, "dry_run": self.dry_run}
        return {**document, **self.report, "steps": steps}


def recycle(
    plan: str | Path,
    *,
    dry_run: bool = False,
    force: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Recycled:
    """Fine-tune a list of base versions, each from its base with the Δ of the version before on it.

    Args:
        plan: a YAML file, as the README's chapter on recycle describes it.
        dry_run: tell the steps only. Nothing is written.
        force: also start from a delta that ``check`` refuses, make again what the plan now has
            otherwise, and replace what stands at the places of models and deltas.
        command: the command line, for the cards.

    Bases are pinned when they are first seen. A run that was stopped goes on when it is called the
    same way again; bases may be added to the end of the list. The tuned models stay in the plan's
    output, with a report; each Δ goes where the plan says, or stays there too. Needs
    ``pip install "hubdiff[finetune]"``. Raises ``HubdiffError``.
    """
    require_extra()
    chosen = read_plan(plan)
    steps = steps_of(chosen)
    with disk_errors(chosen.output):
        state = _State.read(chosen.output / STATE)
        if state is None and chosen.output.exists():
            _refuse_foreign(chosen.output)
    job = _Recycle(chosen, steps, state or _State(), force, command, progress or Silent())
    if dry_run:
        job.prepare()
        return job.outcome(dry_run=True)
    with only_run(chosen.output):
        job.prepare()
        job.run()
    return job.outcome(dry_run=False)


def _refuse_foreign(output: Path) -> None:
    if not output.is_dir() or any(not path.name.startswith(".") for path in output.iterdir()):
        raise OutputExists(
            f"{output} is there already, and it is not the output of a recycle",
            next_step="Choose another output.",
        )


@dataclass
class _State:
    """What a run remembers: the pins of the plan's refs, and of each step, by its name, ``inputs``,
    ``check``, ``trained``, ``pushing`` and ``delta``, each from when it was so."""

    pins: dict[str, str] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> _State | None:
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            return cls(dict(document["pins"]), dict(document["steps"]))
        except (ValueError, TypeError, KeyError) as error:
            raise HubdiffError(
                f"{file} can't be read: it is not what recycle wrote",
                next_step="Bring it back, or choose another output.",
            ) from error

    def write(self, file: Path) -> None:
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps(vars(self), indent=2) + "\n").encode())


class _Recycle:
    """One run of a plan."""

    def __init__(
        self,
        plan: Plan,
        steps: tuple[Step, ...],
        state: _State,
        force: bool,
        command: Sequence[str] | None,
        progress: Progress,
    ) -> None:
        self._plan, self._steps, self._state = plan, steps, state
        self._force, self._command, self._progress = force, command, progress
        self._data = data_identity(plan.data)
        self._anew: list[Step] = []  # steps that are made again, and
        self._anew_deltas: list[Step] = []  # those of which only the Δ is
        self._states: dict[str, str] = {}
        self._contents: dict[str, str] = {}

    def outcome(self, *, dry_run: bool) -> Recycled:
        goes_to = {
            step.name: self._plan.shown(step.delta or self._target(step)) for step in self._steps
        }
        return Recycled(str(self._plan.output), dry_run, self._report(), self._states, goes_to)

    def _report(self) -> dict[str, Any]:
        return report_of(self._plan, self._steps, self._state.steps, self._state.pins)

    # --- before anything is trained: nothing is written here ---

    def prepare(self) -> None:
        """Pin, and refuse what would stop the run later."""
        for step in self._steps:
            self._pin(step)
        self._refuse_bases()
        self._refuse_leftovers()
        for step in self._steps:
            self._compare(step)
        self._refuse_targets()
        self._states = {step.name: self._how_far(step) for step in self._steps}

    def _pin(self, step: Step) -> None:
        for ref in (step.base, step.tuned, step.delta):
            if ref is None or (ref in self._state.pins and self._how_far(step) == DONE):
                continue
            tree = open_tree(ModelRef.parse(self._state.pins.get(ref, ref)), cache=False)
            if ref == step.delta:
                self._refuse_delta(step, tree)
            else:
                with open_checkpoint(tree):  # refused now, not after the trainings before it
                    pass
            self._state.pins[ref] = str(tree.pin.again)

    def _refuse_delta(self, step: Step, tree: FileTree) -> None:
        """A Δ is that of its base: on another it would not be M*_1 − M_1."""
        manifest, base = read_manifest(tree), ModelRef.parse(self._state.pins[step.base])
        same = base.repo is not None and base.repo == manifest.base.repo
        if same and base.revision == manifest.base.commit:
            return
        if not check(tree.pin.again, self._state.pins[step.base]).own_base:
            raise wrong(
                self._plan.file,
                "bases[1]",
                f"has the delta {tree.pin}, which was not made from {base}",
                f"Give its own base, {manifest.base.repo or manifest.base.name}.",
            )

    def _refuse_leftovers(self) -> None:
        """Steps that were begun and that the plan has no more."""
        planned = {step.name for step in self._steps}
        for name in [name for name in self._state.steps if name not in planned]:
            self._refuse_unless_forced(name, "is no step of the plan any more", "is forgotten")
            del self._state.steps[name]

    def _refuse_bases(self) -> None:
        """A base that is there twice, or that the output lies in."""
        seen: dict[str, int] = {}
        for step in self._steps:
            pin = self._state.pins[step.base]
            if Path(pin) in (self._plan.output, *self._plan.output.parents):
                raise wrong(
                    self._plan.file,
                    "output",
                    f"lies in the base {self._plan.shown(pin)}",
                    "Choose another output.",
                )
            if seen.setdefault(pin, step.number) != step.number:
                raise wrong(
                    self._plan.file,
                    "bases",
                    f"has {self._plan.shown(pin)} twice, as {seen[pin]} and {step.number}",
                    "List each base version once.",
                )

    def _wanted(self, step: Step) -> dict[str, Any]:
        """What decides on the outcome of a step. That of the step before is not there where it is
        not known yet."""
        pins, shown = self._state.pins, self._plan.shown
        wanted: dict[str, Any] = {"base": shown(pins[step.base]), "start": step.start}
        for name, ref in (("tuned", step.tuned), ("delta", step.delta)):
            if ref is not None:
                wanted[name] = shown(pins[ref])
        if step.trains:
            wanted |= {"data": self._data, "recipe": self._plan.recipe.as_json()}
            if "delta" not in self._state.steps.get(step.name, {}):
                wanted["content of its base"] = self._content(pins[step.base])
        before = self._state.steps.get(step.start or "", {}).get("delta")
        if step.start is None or before:
            wanted["delta before"] = before and before["identity"]
        return wanted

    def _content(self, base: str) -> str:
        """What tells a folder as it is now from what it was when a step began; a repo is pinned. A
        finished step needs its base no more."""
        ref = ModelRef.parse(base)
        if base not in self._contents:
            self._contents[base] = (
                base
                if ref.path is None
                else model_identity(open_tree(ref, cache=False), self._progress)
            )
        return self._contents[base]

    def _compare(self, step: Step) -> None:
        """What there is of a step must be of this plan, and still be there."""
        record = self._state.steps.get(step.name)
        if record is None:
            if step.trains:
                refuse_place(self._place(step), self._reads(), force=self._force)
            return
        wanted = self._wanted(step)
        differ = _differ(wanted, record["inputs"])
        if any(one.name == step.start for one in self._anew):
            differ = ["delta before"]
        gone = self._gone(step, record)
        what = f"was begun with {_another(differ)}" if differ else gone
        if what:
            self._refuse_unless_forced(step.name, what)
            self._anew.append(step)
            return
        target = record.get("target")
        if target not in (None, self._plan.shown(self._target(step))):
            self._remake_delta(step, f"has its delta in {target}, not where the plan says now")
        elif "delta" in record and not self._is_there(record["delta"]):
            self._remake_delta(step, f"lacks its delta: {record['delta']['ref']} is not as it was")

    def _remake_delta(self, step: Step, what: str) -> None:
        self._refuse_unless_forced(step.name, what)
        (self._anew if step.delta else self._anew_deltas).append(step)

    def _refuse_unless_forced(self, name: str, what: str, forced: str = "is made again") -> None:
        if not self._force:
            raise HubdiffError(
                f"{name} {what}",
                next_step="Bring back what was, or give the plan another output; --force makes it, "
                "and what began with it, again.",
            )
        self._progress.note(f"{name} {forced}: it {what}")

    def _gone(self, step: Step, record: dict[str, Any]) -> str | None:
        place = self._place(step)
        for path, size in record.get("trained", {}).get("files", {}).items():
            file = place / path
            if not file.is_file() or file.stat().st_size != size:
                return f"lacks what was trained: {file} is not as it was"
        return None

    def _is_there(self, delta: dict[str, Any]) -> bool:
        try:
            return self._identity(self._plan.resolved(delta["ref"])) == delta["identity"]
        except HubdiffError:
            return False

    def _identity(self, ref: str) -> str:
        tree = open_tree(ModelRef.parse(ref), cache=False)
        read_manifest(tree)
        return hash_bytes(tree.read_bytes(MANIFEST))

    def _refuse_targets(self) -> None:
        """Deltas that are still to be made must find a place, and a token where it is a repo."""
        asked = False
        for step in self._steps:
            record = self._state.steps.get(step.name, {})
            again = step in self._anew or step in self._anew_deltas
            if step.delta or (("delta" in record or "target" in record) and not again):
                continue
            target = ModelRef.parse(self._target(step))
            if target.path is not None:
                refuse_place(target.path, self._reads(), force=self._force or step.push is None)
                continue
            if not asked:
                from hubdiff.hub import require_token

                require_token()
                asked = True
            if not self._force:
                _refuse_used(target)

    def _how_far(self, step: Step) -> str:
        record = self._state.steps.get(step.name)
        if step in self._anew:
            return AGAIN
        if record is None:
            return TO_DO
        if "delta" in record and step not in self._anew_deltas:
            return DONE
        return TRAINED if "trained" in record or step.tuned else BEGUN

    # --- the run ---

    def run(self) -> None:
        for step in self._anew:
            self._drop(step)
        for step in self._anew_deltas:
            self._state.steps[step.name].pop("target", None)
            self._state.steps[step.name].pop("delta", None)
        self._keep()
        recipe = yaml.safe_dump(self._plan.recipe.as_json(), sort_keys=False)
        with disk_errors(self._plan.output):
            (self._plan.output / RECIPE).write_text(recipe, encoding="utf-8")
        for step in self._steps:
            self._run(step)
            write_report(self._report(), self._plan.output)

    def _run(self, step: Step) -> None:
        record = self._begin(step)
        if step.trains and "trained" not in record:
            self._train(step, record)
        if "delta" not in record:
            self._make_delta(step, record)

    def _begin(self, step: Step) -> dict[str, Any]:
        """The step's record: with other inputs than it had, a new one. A new one is written only
        where no model stands, so that one which stands under a record is what it says."""
        wanted, record = self._wanted(step), self._state.steps.get(step.name)
        differ = _differ(wanted, record["inputs"]) if record is not None else []
        if differ:
            self._refuse_unless_forced(step.name, f"was begun with {_another(differ)}")
            self._drop(step)
            record = None
        if record is None:
            if step.trains:
                self._clear(self._place(step))
            record = self._state.steps[step.name] = {"inputs": wanted}
            self._keep()
        return record

    def _train(self, step: Step, record: dict[str, Any]) -> None:
        place, pins = self._place(step), self._state.pins
        before = self._state.steps[step.start]["delta"] if step.start else None
        start = before and self._plan.resolved(before["ref"])
        if start and not place.is_dir():
            self._check(step, record, start)
        if not place.is_dir():
            self._progress.note(f"{step.name}: fine-tuning {self._plan.shown(pins[step.base])}")
            finetune(
                _given(pins[step.base]),
                data=self._plan.data,
                output=place,
                from_delta=start and _given(start),
                recipe=self._plan.output / RECIPE,
                force=self._force,
                command=self._command,
                progress=self._progress,
            )
            _let_go()
        shutil.rmtree(training_folder(place), ignore_errors=True)
        files = sorted(place.rglob("*.safetensors"))
        sizes = {path.relative_to(place).as_posix(): path.stat().st_size for path in files}
        record["trained"] = {"files": sizes, **training_of(place)}
        self._keep()

    def _check(self, step: Step, record: dict[str, Any], start: str) -> None:
        """Ask whether the Δ suits the base, and write down the answer."""
        base = self._state.pins[step.base]
        checked = check(_given(start), _given(base), progress=self._progress)
        record["check"] = key_numbers(checked.as_json())
        self._keep()
        if checked.verdict.level == REFUSE and not self._force:
            write_report(self._report(), self._plan.output)
            raise NotAdvised(
                f"{step.name}: the delta of {step.start} is not put on {self._plan.shown(base)}: "
                f"{checked.verdict.why}",
                next_step="What is finished is kept. Take that base out of the plan, or run the "
                "same command with --force to train from there all the same.",
            )

    def _make_delta(self, step: Step, record: dict[str, Any]) -> None:
        given = step.delta and self._state.pins[step.delta]
        ref = given or self._push(step, record)
        record["delta"] = self._described(ref)
        self._keep()

    def _push(self, step: Step, record: dict[str, Any]) -> str:
        """Publish the Δ; its ref. Once its target is written down, what stands in a folder there is
        of this run, and is made again where it was not known to be finished."""
        target, pins = self._target(step), self._state.pins
        repo = ModelRef.parse(target).repo
        is_folder = repo is None
        ours = is_folder and ("target" in record or step.push is None)
        record["target"] = self._plan.shown(target)
        self._keep()
        tuned = self._place(step) if step.trains else Path()
        pushed = push_delta(
            tuned if step.trains else _given(pins[step.tuned or ""]),
            _given(target),
            base=_given(pins[step.base]),
            tuned_master=tuned / MASTER if (tuned / MASTER).is_dir() else None,
            private=self._plan.private and not is_folder,
            force=self._force or ours,
            progress=self._progress,
        )
        return target if is_folder else f"hf://{repo}@{pushed.commit}"

    def _described(self, ref: str) -> dict[str, Any]:
        with open_delta_tree(open_tree(ModelRef.parse(ref), cache=False)) as delta:
            document = json.loads(manifest_json(delta.manifest))
            summary = summarise(document)
        squares = sum(tensor["delta_norm"] ** 2 for tensor in document["tensors"])
        return {
            "ref": self._plan.shown(ref),
            "identity": self._identity(ref),
            "bytes": summary.delta_bytes,
            "norm": math.sqrt(squares),
            "relative_norm": summary.relative_norm,
        }

    # --- places ---

    def _keep(self) -> None:
        self._state.write(self._plan.output / STATE)

    def _place(self, step: Step) -> Path:
        return self._plan.output / step.name

    def _target(self, step: Step) -> str:
        return step.push or str(self._plan.output / f"{step.name}-delta")

    def _reads(self) -> list[Path]:
        """The folders that this run reads."""
        pins = [ModelRef.parse(pin).path for pin in self._state.pins.values()]
        data = Path(self._plan.data)
        return [path for path in (*pins, data if data.is_file() else None) if path is not None]

    def _drop(self, step: Step) -> None:
        """Forget a step, and then remove its model: until a new record says what is to stand there,
        nothing there counts."""
        self._state.steps.pop(step.name, None)
        self._keep()
        if step.trains:
            self._clear(self._place(step))

    def _clear(self, place: Path) -> None:
        refuse_place(place, self._reads(), force=self._force)
        with disk_errors(place):
            if place.is_dir():
                shutil.rmtree(place)


def _given(ref: str) -> str | Path:
    """As the other jobs take it: a folder is a path, whatever its name looks like."""
    path = ModelRef.parse(ref).path
    return ref if path is None else path


def _differ(wanted: dict[str, Any], inputs: dict[str, Any]) -> list[str]:
    return [name for name in wanted if inputs.get(name) != wanted[name]]


def _another(differ: Sequence[str]) -> str:
    return f"another {' and '.join(differ)}"


def _refuse_used(target: ModelRef) -> None:
    """Raise where a repo holds something: nobody's delta is replaced by a slip in a plan."""
    try:
        files = set(open_tree(target, cache=False).files()) - set(_FOREIGN)
    except RepoNotFound:
        return
    if files:
        what = "a delta" if MANIFEST in files else min(files)
        raise OutputExists(
            f"{target} holds {what} already, which is not of this run",
            next_step="Push to another repo, or replace what it holds with --force.",
        )


def _let_go() -> None:
    """Of a trained model, which lies in circles: the next one needs its memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
