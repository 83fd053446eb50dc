"""finetune: supervised fine-tuning of a base, or of a base with a delta on it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.card import tuned_card
from hubdiff.checkpoint import MANIFEST, open_checkpoint
from hubdiff.delta import open_delta_tree
from hubdiff.errors import CannotApply, CheckpointError, HubdiffError
from hubdiff.facts import facts
from hubdiff.files import FileTree, open_tree
from hubdiff.hashing import hash_bytes, hash_reader, tensor_hash
from hubdiff.jobs.apply import apply
from hubdiff.jobs.load import model_class, usable
from hubdiff.jobs.push import Pushed, push_delta
from hubdiff.lab.recipe import PAPER, Recipe, read_recipe
from hubdiff.manifest import read_manifest
from hubdiff.progress import Progress, Silent
from hubdiff.ranks import is_first
from hubdiff.refs import ModelRef
from hubdiff.sidecars import Carried, classify
from hubdiff.writer import disk_errors, only_run, output_folder, refuse_place, write_whole

if TYPE_CHECKING:
    from datasets import Dataset

    from hubdiff.lab.training import Trainer

EXTRA = ("trl", "datasets", "accelerate", "peft")
METRICS, RECIPE, CURVE, CARD, MASTER = (
    *("metrics.jsonl", "recipe.yaml", "loss.png", "README.md", "master"),
)
_RUN = "run.json"
# Files beside the weights that config and tokenizer are read from.
_READ = (".json", ".jinja", ".model", "merges.txt", "vocab.txt")


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
        force: replace what stands at ``output``, and what another run of it left unfinished; also
            start from a delta that ``check`` refuses.

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
    _refuse_output(place, (tree, delta), (data, recipe), push_to, force)
    with only_run(place) if is_first() else nullcontext():
        from hubdiff.lab.quiet import quiet

        job = _Finetune(tree, delta, data, place, chosen, force, command, progress)
        with quiet():
            losses, examples, resumed = job.run()
    pushed = None
    if push_to is not None and is_first():
        master = place / MASTER if job.has_master else None
        try:
            pushed = push_delta(
                place,
                push_to,
                base=tree.pin.again,
                tuned_master=master,
                private=private,
                progress=progress,
            )
        except HubdiffError as error:
            words = f" --tuned-master {output}/{MASTER}" if master else ""
            raise HubdiffError(
                f"the tuned model is in {output}; its delta was not pushed: {error}",
                next_step=f"hubdiff push-delta {output} {push_to} --base {base}{words}",
            ) from error
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


def _refuse_output(
    place: Path,
    trees: Sequence[FileTree | None],
    files: Sequence[str | Path],
    push_to: str | Path | None,
    force: bool,
) -> None:
    """Before anything is trained: what would stop it from being kept, or what it would destroy."""
    folders = [tree.pin.path for tree in trees if tree is not None and tree.pin.path is not None]
    refuse_place(place, [*folders, *(Path(f) for f in files if Path(f).exists())], force=force)
    inside = next((f for f in folders if f.resolve() in place.resolve().parents), None)
    if inside is not None:
        raise HubdiffError(
            f"{place} lies in {inside}, which this command reads",
            next_step="Choose another place for the tuned model.",
        )
    if push_to is None:
        return
    destination = ModelRef.parse(push_to)
    if destination.path is None:
        from hubdiff.hub import require_token

        require_token()
    elif destination.path.absolute() == place:
        raise HubdiffError(
            f"{push_to} is where the tuned model goes", next_step="Give the delta another place."
        )
    else:
        refuse_place(destination.path.absolute(), folders, force=False)


def training_folder(place: Path) -> Path:
    """Where the training for ``place`` is while it goes on."""
    return place.parent / f".{place.name}.hubdiff-training"


def require_extra() -> None:
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise HubdiffError(
            f"fine-tuning needs {', '.join(missing)}, which is not installed",
            next_step="Run pip install 'hubdiff[finetune]'.",
        )


def usable_model(what: str) -> AbstractContextManager[None]:
    """``usable``, for what training or measuring starts from."""
    return usable(
        what,
        "Try it with transformers alone (from_pretrained); hubdiff never runs code that comes with "
        "a model.",
    )


def require_all(loading: Mapping[str, Any], where: str) -> None:
    """Raise where a model lacks weights: they would have been drawn at random."""
    missing = [*loading.get("missing_keys", ()), *loading.get("mismatched_keys", ())]
    if missing:
        raise CheckpointError(
            f"{where} lacks {missing[0]}"
            + (f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""),
            next_step="Give a model with a head for language modelling, whole.",
        )


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
        self.has_master = False
        self._work = training_folder(place)

    def run(self) -> tuple[tuple[float, ...], int, int]:
        """The losses, the number of examples, and the step that it went on from."""
        import torch
        from accelerate import PartialState
        from transformers import AutoTokenizer

        from hubdiff.lab.training import (
            Metrics,
            last_checkpoint,
            make_trainer,
            memory_advice,
            ranks,
            read_metrics,
            settings,
        )

        checkpoints = self._work / "checkpoints"
        settings(self._recipe, checkpoints, ranks())  # refused before anything is made
        processes = PartialState(cpu=not torch.cuda.is_available())
        with processes.main_process_first():
            if processes.is_main_process:
                self._begin()
        where = self._start()
        with usable_model("the base's tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(where[0], trust_remote_code=False, **where[1])
        with processes.main_process_first():
            examples = self._examples(tokenizer)
            last = last_checkpoint(checkpoints)
        resumed = int(last.name.partition("-")[2]) if last else 0
        if last:
            self._progress.note(f"going on from step {resumed:,}")
        model = self._model(where)
        self._progress.start("training", self._recipe.steps, "steps")
        metrics = Metrics(self._work / METRICS, self._progress.advance)
        with memory_advice(model, self._recipe):
            with usable_model("the data with the base's tokenizer"):
                trainer = make_trainer(
                    model, tokenizer, examples, self._recipe, checkpoints, metrics
                )
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.require_numbers()
        self._progress.finish()
        self._save(trainer, len(examples), read_metrics(self._work / METRICS))
        logged = read_metrics(self._place / METRICS) if is_first() else []
        return tuple(line["loss"] for line in logged), len(examples), resumed

    def _begin(self) -> None:
        """The folder of this run: new, or that of the same run, which was stopped."""
        run = {
            "base": model_identity(self._base, self._progress),
            "delta": self._delta and model_identity(self._delta, self._progress),
            "data": data_identity(self._data),
            "recipe": self._recipe.as_json(),
        }
        file = self._work / _RUN
        with disk_errors(self._work):
            if self._work.is_dir() and not _same_run(file, run):
                if any(self._work.glob("checkpoints/checkpoint-*")) and not self._force:
                    raise HubdiffError(
                        f"{self._work} holds the training of another run for {self._place.name}",
                        next_step="Run that one again to finish it, or drop it with --force.",
                    )
                shutil.rmtree(self._work)
            self._work.mkdir(parents=True, exist_ok=True)
            write_whole(file, (json.dumps(run, indent=2) + "\n").encode())
        if self._delta is not None and not (self._work / "start").is_dir():
            apply(
                self._delta.pin.again,
                self._base.pin.again,
                output=self._work / "start",
                force=self._force,
                progress=self._progress,
            )

    def _examples(self, tokenizer: Any) -> Dataset:
        """Those that teach something within the length."""
        from hubdiff.lab.examples import read_examples
        from hubdiff.lab.loss import tokenized

        found = read_examples(
            self._data, chat_template=bool(tokenizer.chat_template), cache=self._work / "data"
        )
        with usable_model("the data with the base's tokenizer"):
            tokens = tokenized(found, tokenizer, self._recipe.length)
        kept = [number for number, (ids, start) in enumerate(tokens) if len(ids) > start]
        if not kept:
            raise HubdiffError(
                f"no example of {self._data} has anything to learn within {self._recipe.length} "
                "tokens: the prompts fill them",
                next_step="Set a larger length.",
            )
        if len(kept) < len(found):
            gone = len(found) - len(kept)
            self._progress.note(f"{gone:,} examples are left out: their prompts fill the length")
        return found.select(kept)

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
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        with usable_model("the base's config"):
            config = AutoConfig.from_pretrained(where[0], trust_remote_code=False, **where[1])
        for name, value in vars(config).items():
            if isinstance(value, float) and name.endswith(("dropout", "pdrop", "dropout_prob")):
                setattr(config, name, self._recipe.dropout)
        config.dtype = torch.float32 if self._recipe.lora is None else config.dtype
        options: dict[str, Any] = {
            "config": config,
            "dtype": config.dtype,
            "trust_remote_code": False,
            "output_loading_info": True,
        }
        state = self._sum() if self._delta is not None else None
        with usable_model("the base"):
            if state is None:
                known: Any = AutoModelForCausalLM
                model, loading = known.from_pretrained(where[0], **options, **where[1])
            else:
                known = model_class(Path(where[0]))
                model, loading = known.from_pretrained(None, state_dict=state, **options)
        require_all(loading, where[0])
        for name in loading.get("unexpected_keys", ()):
            self._progress.note(f"{name} of the base is no part of the model, and is left out")
        # The base's own file is carried over; one that contradicts itself could not be saved.
        model.generation_config = GenerationConfig()
        return model

    def _sum(self) -> dict[str, Any] | None:
        """Base + Δ in float32: the base's dtype would round much of a small Δ away. None where rows
        are aligned or tensors added, which the model that was made for the start has."""
        from hubdiff.lab.line import Line

        assert self._delta is not None
        with (
            open_checkpoint(self._base) as base,
            open_delta_tree(self._delta) as delta,
        ):
            try:
                return Line.between(base, base, delta).at(0.0)
            except CannotApply:
                return None

    def _save(self, trainer: Trainer, examples: int, metrics: list[dict[str, Any]]) -> None:
        """The result, which takes its place when all of it is there."""
        result = self._work / "result"
        state = trainer.accelerator.get_state_dict(trainer.model)
        if not is_first():
            return
        shutil.rmtree(result, ignore_errors=True)
        with disk_errors(result):
            result.mkdir()
            if self._recipe.lora is None:
                self._save_weights(trainer, state, result)
            else:
                self._save_adapter(trainer, state, result)
            self._describe(result, examples, metrics)
            if self._place.exists():
                self._place.rename(self._work / "replaced")
            result.rename(self._place)
            shutil.rmtree(self._work, ignore_errors=True)

    def _save_weights(self, trainer: Trainer, state: dict[str, Any], result: Path) -> None:
        """The weights in the base's dtype, those in float32 beside them, and the side files of what
        training started from, which it does not change."""
        import torch

        start = self._work / "start"
        tree = open_tree(ModelRef.parse(start), cache=False) if self._delta else self._base
        with open_checkpoint(tree) as checkpoint:
            sizes: Counter[str] = Counter()
            for placed in checkpoint.tensors.values():
                sizes[placed.entry.dtype] += placed.entry.nbytes
            shards = checkpoint.shards
        (most, _), *_ = sizes.most_common(1)  # a buffer in float32 makes no float32 model
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if dtype != torch.float32:
            model.save_pretrained(result / MASTER, state_dict=state)
            self.has_master = True
            state = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in state.items()
            }
        model.save_pretrained(result, state_dict=state)
        for path, info in tree.files().items():
            side = path not in shards and not path.endswith(".safetensors.index.json")
            ours = path in (CARD, METRICS, CURVE, RECIPE)  # of the fine-tune that the base is
            if side and not ours and isinstance(classify(path, info.size, shards), Carried):
                (result / path).parent.mkdir(parents=True, exist_ok=True)
                (result / path).write_bytes(tree.read_bytes(path))

    def _save_adapter(self, trainer: Trainer, state: dict[str, Any], result: Path) -> None:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(result, state_dict=state)
        assert trainer.processing_class is not None
        trainer.processing_class.save_pretrained(result)
        file = result / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        pin = self._base.pin
        config["base_model_name_or_path"] = _side(self._base)["name"]
        config["revision"] = pin.commit
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # PEFT has a set
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

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
            "delta": self._delta and {**_side(self._delta), "closed": _is_closed(self._delta)},
            "data": Path(self._data).name if Path(self._data).exists() else str(self._data),
            "examples": examples,
            "recipe": recipe,
            "libraries": {name: _version(name) for name in ("trl", "transformers", "torch")},
            "losses": losses,
            "picture": CURVE,
            "command": list(self._command) if self._command else None,
            "master": self.has_master,
        }
        card = tuned_card(record, name=self._place.name, base_card=facts(self._base).card_data)
        (result / CARD).write_text(card, encoding="utf-8")
        for file in result.rglob("*"):
            if file.is_file():  # safetensors writes files that only their owner may read
                shutil.copymode(result / CARD, file)


def model_identity(tree: FileTree, progress: Progress) -> str:
    """What tells the model or delta of one run from that of another: a repo's pin; of a folder, in
    which another may lie later, the content of what training reads."""
    if tree.pin.path is None:
        return str(tree.pin)
    if MANIFEST in tree.files():
        return hash_bytes(tree.read_bytes(MANIFEST))  # which has the hashes of all others
    with open_checkpoint(tree) as base:
        read = {*base.shards, *(f for f in tree.files() if "/" not in f and f.endswith(_READ))}
    sizes = {path: tree.files()[path].size for path in sorted(read)}
    hashes = {}
    progress.start(f"hashing {tree.pin}", sum(sizes.values()))
    for path, size in sizes.items():
        with tree.open(path) as reader:
            hashes[path] = hash_reader(reader, tensor_hash())
        progress.advance(size)
    progress.finish()
    return hash_bytes(json.dumps(hashes).encode())


def data_identity(data: str | Path) -> str:
    """What tells the data of one run from that of another: a file's hash, a dataset's name."""
    path = Path(data)
    if not path.is_file():
        return str(data)
    tree = open_tree(ModelRef(repo=None, revision=None, path=path.parent.absolute()), cache=False)
    with tree.open(path.name) as reader:
        return hash_reader(reader)


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


def _is_closed(delta: FileTree) -> bool:
    """Whether a delta is for some people only, or what it was made of is."""
    known, manifest = facts(delta), read_manifest(delta)
    sides = (manifest.base, manifest.tuned, manifest.started_from)
    return known.gated or known.private or any(side.gated for side in sides if side)


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)
