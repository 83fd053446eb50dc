"""finetune: supervised fine-tuning of a base, or of a base with a delta on it."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.card import tuned_card
from hubdiff.checkpoint import open_checkpoint
from hubdiff.errors import HubdiffError
from hubdiff.facts import facts
from hubdiff.files import FileTree, open_tree
from hubdiff.hashing import hash_reader
from hubdiff.jobs.apply import apply
from hubdiff.jobs.push import Pushed, push_delta
from hubdiff.lab.recipe import PAPER, Recipe, read_recipe
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.sidecars import Carried, classify
from hubdiff.writer import disk_errors, only_run, output_folder, refuse_place

if TYPE_CHECKING:
    from hubdiff.lab.training import Trainer

EXTRA = ("trl", "datasets", "accelerate", "peft")
METRICS, RECIPE, CURVE, CARD, MASTER = (
    *("metrics.jsonl", "recipe.yaml", "loss.png", "README.md", "master"),
)
_RUN = "run.json"


@dataclass(frozen=True)
class Finetuned:
    """What finetune made. ``losses`` as they were logged; ``resumed`` the step it went on from, or
    0; ``pushed`` the delta, where one was asked for."""

    output: str
    base: str
    delta: str | None
    examples: int
    recipe: Recipe
    losses: tuple[float, ...]
    resumed: int
    seconds: float
    pushed: Pushed | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "base": self.base,
            "delta": self.delta,
            "examples": self.examples,
            "recipe": self.recipe.as_json(),
            "losses": list(self.losses),
            "resumed": self.resumed,
            "seconds": round(self.seconds, 3),
            "pushed": self.pushed and self.pushed.as_json(),
        }


def finetune(
    base: str | Path,
    *,
    data: str | Path,
    output: str | Path,
    from_delta: str | Path | None = None,
    recipe: str | Path = PAPER,
    settings: Sequence[str] = (),
    push_to: str | Path | None = None,
    private: bool = False,
    force: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Finetuned:
    """Fine-tune ``base`` on ``data`` into the folder ``output``, by TRL.

    Args:
        base: a ref (``org/name``, ``org/name@revision``) or a folder.
        data: a file (.jsonl, .json, .csv, .parquet) or ``org/name[:split]`` of the Hub, with the
            columns ``prompt`` and ``completion`` (of which only the completion is learnt),
            ``messages`` (only what the assistant says) or ``text``.
        from_delta: a delta to put on the base first: training starts from their sum.
        recipe: ``paper`` (that of Lin et al. 2025) or a YAML file; ``settings`` are ``key=value``
            on top of it (``hubdiff.lab.recipe.Recipe`` has the keys).
        push_to: publish tuned − base as a delta too, from the float32 weights.
        private: make that repo private, if it is new.
        force: replace what stands at ``output``; also start from a delta that ``check`` refuses.

    All weights are trained in float32 and kept so in ``output/master``, beside those in the base's
    own dtype. A run that was stopped goes on from its last checkpoint when it is called the same
    way again. ``accelerate launch -m hubdiff finetune …`` uses several devices. Needs
    ``pip install "hubdiff[finetune]"``. Raises ``HubdiffError``.
    """
    require_extra()
    began, progress = time.monotonic(), progress or Silent()
    chosen = read_recipe(recipe, settings)
    if chosen.lora is not None and from_delta is not None:
        raise HubdiffError(
            "an adapter is of the base it was trained on, and with --from-delta that is no base "
            "that anybody has",
            next_step="Apply the delta first, and fine-tune the result.",
        )
    place = output_folder(output).path
    assert place is not None
    place = place.absolute()
    tree = open_tree(ModelRef.parse(base), cache=False)
    delta = open_tree(ModelRef.parse(from_delta), cache=False) if from_delta is not None else None
    reads = [t.pin.path for t in (tree, delta) if t is not None and t.pin.path is not None]
    refuse_place(place, reads, force=force)
    with only_run(place) if _first() else nullcontext():
        from hubdiff.lab.training import quiet

        job = _Finetune(tree, delta, data, place, chosen, force, command, progress)
        with quiet():
            losses, examples, resumed = job.run()
    pushed = None
    if push_to is not None and _first():
        master = place / MASTER if (place / MASTER).is_dir() else None
        pushed = push_delta(
            place, push_to, base=base, tuned_master=master, private=private, progress=progress
        )
    return Finetuned(
        str(output),
        str(tree.pin),
        str(delta.pin) if delta is not None else None,
        examples,
        chosen,
        losses,
        resumed,
        time.monotonic() - began,
        pushed,
    )


def require_extra() -> None:
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise HubdiffError(
            f"fine-tuning needs {', '.join(missing)}, which is not installed",
            next_step="Run pip install 'hubdiff[finetune]'.",
        )


def _first() -> bool:
    """Whether this is the process that writes, of those that accelerate started."""
    return int(os.environ.get("RANK", 0)) == 0


class _Finetune:
    """One fine-tune in the making, in a folder beside the one that it will be."""

    def __init__(
        self,
        base: FileTree,
        delta: FileTree | None,
        data: str | Path,
        place: Path,
        recipe: Recipe,
        force: bool,
        command: Sequence[str] | None,
        progress: Progress,
    ) -> None:
        self._base, self._delta, self._data, self._place = base, delta, data, place
        self._recipe, self._force, self._command = recipe, force, command
        self._progress = progress
        self._work = place.parent / f".{place.name}.hubdiff-training"

    def run(self) -> tuple[tuple[float, ...], int, int]:
        """The losses, the number of examples, and the step that it went on from."""
        from accelerate import PartialState
        from transformers import AutoTokenizer
        from transformers.trainer_utils import get_last_checkpoint

        from hubdiff.lab.examples import read_examples
        from hubdiff.lab.training import Metrics, make_trainer, read_metrics

        processes = PartialState()
        with processes.main_process_first():
            if processes.is_main_process:
                self._begin()
        where = self._start()
        tokenizer = AutoTokenizer.from_pretrained(*where[:1], **where[1])
        examples = read_examples(
            self._data, chat_template=bool(tokenizer.chat_template), cache=self._work / "data"
        )
        checkpoints = self._work / "checkpoints"
        last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        resumed = int(last.rpartition("-")[2]) if last else 0
        if last:
            self._progress.note(f"going on from step {resumed:,}")
        model = self._model(where)
        self._progress.start("training", self._recipe.steps, "steps")
        metrics = Metrics(self._work / METRICS, self._progress.advance)
        with _memory_advice(model, self._recipe):
            trainer = make_trainer(model, tokenizer, examples, self._recipe, checkpoints, metrics)
            trainer.train(resume_from_checkpoint=last)
        self._progress.finish()
        self._save(trainer, len(examples), read_metrics(self._work / METRICS))
        logged = read_metrics(self._place / METRICS) if _first() else []
        return tuple(line["loss"] for line in logged), len(examples), resumed

    def _begin(self) -> None:
        """The folder of this run: new, or that of the same run, which was stopped."""
        run = {
            "base": str(self._base.pin),
            "delta": self._delta and str(self._delta.pin),
            "data": self._data_identity(),
            "recipe": self._recipe.as_json(),
        }
        file = self._work / _RUN
        with disk_errors(self._work):
            if self._work.is_dir() and not _same_run(file, run):
                raise HubdiffError(
                    f"{self._work} holds the training of another run for {self._place.name}",
                    next_step="Run that one again to finish it, or delete the folder.",
                )
            self._work.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        if self._delta is not None and not (self._work / "start").is_dir():
            pins = (
                pin.path or f"{pin.repo}@{pin.commit}" for pin in (self._delta.pin, self._base.pin)
            )
            delta, base = pins
            apply(
                delta,
                base,
                output=self._work / "start",
                force=self._force,
                progress=self._progress,
            )

    def _data_identity(self) -> str:
        path = Path(self._data)
        if not path.is_file():
            return str(self._data)
        tree = open_tree(
            ModelRef(repo=None, revision=None, path=path.parent.absolute()), cache=False
        )
        with tree.open(path.name) as reader:
            return hash_reader(reader)

    def _start(self) -> tuple[str, dict[str, Any]]:
        """What training starts from, as ``from_pretrained`` takes it."""
        if self._delta is not None:
            return str(self._work / "start"), {}
        pin = self._base.pin
        if pin.path is not None:
            return str(pin.path), {}
        return str(pin.repo), {"revision": pin.commit}

    def _model(self, where: tuple[str, dict[str, Any]]) -> Any:
        """The model, in float32, or as it is under an adapter, with the recipe's dropout."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(where[0], trust_remote_code=False, **where[1])
        for name, value in vars(config).items():
            if isinstance(value, float) and name.endswith(("dropout", "pdrop", "dropout_prob")):
                setattr(config, name, self._recipe.dropout)
        dtype = torch.float32 if self._recipe.lora is None else "auto"
        return AutoModelForCausalLM.from_pretrained(
            where[0], config=config, dtype=dtype, trust_remote_code=False, **where[1]
        )

    def _save(self, trainer: Trainer, examples: int, metrics: list[dict[str, Any]]) -> None:
        """The result, which takes its place when all of it is there."""
        result = self._work / "result"
        state = trainer.accelerator.get_state_dict(trainer.model)
        if not _first():
            return
        shutil.rmtree(result, ignore_errors=True)
        with disk_errors(result):
            result.mkdir()
            if self._recipe.lora is None:
                self._save_weights(trainer, state, result)
            else:
                self._save_adapter(trainer, result)
            self._describe(result, examples, metrics)
            if self._place.exists():
                shutil.rmtree(self._place)
            result.rename(self._place)
            shutil.rmtree(self._work, ignore_errors=True)

    def _save_weights(self, trainer: Trainer, state: dict[str, Any], result: Path) -> None:
        """The weights in the base's dtype, those in float32 beside them, and the side files of what
        training started from, which it does not change."""
        import torch

        start = self._work / "start"
        tree = open_tree(ModelRef.parse(start), cache=False) if self._delta else self._base
        with open_checkpoint(tree) as checkpoint:
            dtypes = {placed.entry.dtype for placed in checkpoint.tensors.values()}
            shards = checkpoint.shards
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(
            next(iter(dtypes)) if len(dtypes) == 1 else "", torch.float32
        )
        model = trainer.accelerator.unwrap_model(trainer.model)
        if dtype != torch.float32:
            model.save_pretrained(result / MASTER, state_dict=state)
            state = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in state.items()
            }
        model.save_pretrained(result, state_dict=state)
        for path, info in tree.files().items():
            side = path not in shards and not path.endswith(".safetensors.index.json")
            if side and path != CARD and isinstance(classify(path, info.size, shards), Carried):
                (result / path).parent.mkdir(parents=True, exist_ok=True)
                (result / path).write_bytes(tree.read_bytes(path))

    def _save_adapter(self, trainer: Trainer, result: Path) -> None:
        trainer.save_model(str(result))
        file = result / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        pin = self._base.pin
        config["base_model_name_or_path"] = pin.repo or str(pin.path)
        config["revision"] = pin.commit
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (result / "training_args.bin").unlink(missing_ok=True)

    def _describe(self, result: Path, examples: int, metrics: list[dict[str, Any]]) -> None:
        import yaml

        from hubdiff.lab.curve import loss_curve

        if (self._work / METRICS).is_file():
            shutil.copyfile(self._work / METRICS, result / METRICS)
        recipe = self._recipe.as_json()
        (result / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        losses = [line["loss"] for line in metrics if math.isfinite(line["loss"])]
        if losses:
            loss_curve(metrics, result / CURVE)
        record = {
            "base": _side(self._base),
            "delta": _side(self._delta) if self._delta is not None else None,
            "data": Path(self._data).name if Path(self._data).exists() else str(self._data),
            "examples": examples,
            "recipe": recipe,
            "libraries": {name: _version(name) for name in ("trl", "transformers", "torch")},
            "losses": losses,
            "picture": CURVE,
            "command": list(self._command) if self._command else None,
            "master": (result / MASTER).is_dir(),
        }
        card = tuned_card(record, name=self._place.name, base_card=facts(self._base).card_data)
        (result / CARD).write_text(card, encoding="utf-8")
        for file in result.rglob("*"):
            if file.is_file():  # safetensors writes files that only their owner may read
                shutil.copymode(result / CARD, file)


def _again(tree: FileTree) -> str | Path:
    """A ref to the very same commit, or folder."""
    pin = tree.pin
    return pin.path if pin.path is not None else f"{pin.repo}@{pin.commit}"


def _same_run(file: Path, run: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(run)))
    except (OSError, ValueError):
        return False


def _side(tree: FileTree) -> dict[str, Any]:
    known, pin = facts(tree), tree.pin
    name = pin.repo or (pin.path.resolve().name if pin.path else "")
    return {
        "name": name,
        "repo": pin.repo,
        "commit": pin.commit,
        "licence": known.licence,
        "gated": known.gated,
    }


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


class _memory_advice:  # noqa: N801 - used as a context manager
    """Says what would fit where a GPU's memory does not: AdamW in float32 holds 16 bytes for each
    weight (the weight, its gradient, two moments)."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self._weights = sum(parameter.numel() for parameter in model.parameters())
        self._recipe = recipe

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            return
        needed = 16 * self._weights / 1e9
        ways = ["--set gradient_checkpointing=true", "a smaller length"]
        if self._recipe.micro_batch > 1:
            ways.insert(0, "--set micro_batch=1")
        if self._recipe.lora is None:
            ways += ["--set lora.rank=16", "more devices (accelerate launch with FSDP)"]
        raise HubdiffError(
            f"the GPU's memory is full: {self._weights:,} weights trained in float32 take "
            f"{needed:.1f} GB, and the examples come on top",
            next_step=f"Try {', '.join(ways)}.",
        ) from error
