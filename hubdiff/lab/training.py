"""One fine-tune by TRL: a recipe in the words of its trainer, metrics on the way, and a stop where
the loss is no number any more."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from hubdiff.errors import HubdiffError
from hubdiff.lab.recipe import Recipe
from hubdiff.names import EMBEDDINGS

if TYPE_CHECKING:
    from datasets import Dataset

LOGGED = ("loss", "learning_rate", "grad_norm")


class LossIsNoNumber(HubdiffError):
    """NaN or infinite: every step from here on would be lost too."""


class Trainer(SFTTrainer):
    """TRL's, without decay on embeddings, and with an eye on the loss."""

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        names: list[str] = super().get_decay_parameter_names(model)
        embeddings = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Embedding)
        }
        return [name for name in names if name not in embeddings and not name.endswith(EMBEDDINGS)]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._stop_unless(bool(torch.isfinite(loss)), "the loss")
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.require_numbers()
        super()._save_checkpoint(*args, **kwargs)

    def require_numbers(self) -> None:
        """Raise ``LossIsNoNumber`` where a weight is none: nothing of that may be kept."""
        assert self.model is not None
        trained = (p for p in self.model.parameters() if p.requires_grad)
        self._stop_unless(all(bool(torch.isfinite(p).all()) for p in trained), "a weight")

    def _stop_unless(self, fine: bool, what: str) -> None:
        """On all ranks, where one of them says so."""
        if torch.distributed.is_initialized():
            word = torch.tensor([float(fine)], device=self.args.device)
            torch.distributed.all_reduce(word, torch.distributed.ReduceOp.MIN)
            fine = bool(word.item())
        if not fine:
            raise LossIsNoNumber(
                f"{what} is no number after {self.state.global_step} steps",
                next_step="Lower learning_rate, or look for examples that break it. The same "
                "command goes on from the last checkpoint; another recipe starts anew, with "
                "--force.",
            )


def settings(recipe: Recipe, folder: Path, ranks: int) -> SFTConfig:
    """The recipe in TRL's words. ``ranks`` are the processes that share a batch."""
    share = recipe.micro_batch * ranks
    if recipe.batch % share:
        raise HubdiffError(
            f"a batch of {recipe.batch} does not divide into {ranks} devices with "
            f"{recipe.micro_batch} examples each",
            next_step="Set batch to a multiple of micro_batch times the number of devices.",
        )
    cuda = torch.cuda.is_available()
    known = {field.name for field in fields(SFTConfig)}
    # transformers renames it; the old name warns.
    again = min({"activation_checkpointing", "gradient_checkpointing"} & known)
    renamed: dict[str, Any] = {again: recipe.gradient_checkpointing}
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // share,
        max_length=recipe.length,
        optim="adamw_torch",
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=math.ceil(recipe.steps * recipe.warmup),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        packing=recipe.packing,
        **renamed,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        fp16=False,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_strategy="steps",
        save_steps=recipe.save_every,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=True,
    )
    # One process drives one device: the trainer would use every GPU it sees, each with a batch.
    config._n_gpu = min(config.n_gpu, 1)
    return config


class Metrics(TrainerCallback):
    """Writes what the trainer logs as JSON lines, and tells ``advance`` of every step."""

    def __init__(self, file: Path, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance
        self._began = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that goes on drops what was logged after the checkpoint that it goes on from."""
        kept = [line for line in read_metrics(self._file) if line["step"] <= state.global_step]
        self._file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        found = {name: logs[name] for name in LOGGED if name in (logs or {})}
        if state.is_world_process_zero and "loss" in found:
            line = {"step": state.global_step, **found}
            line["seconds"] = round(time.monotonic() - self._began, 3)
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """What was logged, in order; a line that was cut off is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def make_trainer(
    model: Any, tokenizer: Any, examples: Dataset, recipe: Recipe, folder: Path, callback: Metrics
) -> Trainer:
    """A trainer of ``model`` (all of its weights in float32) on ``examples``."""
    adapter = None
    if recipe.lora is not None:
        from peft import LoraConfig

        adapter = LoraConfig(
            r=recipe.lora.rank,
            lora_alpha=recipe.lora.alpha,
            lora_dropout=recipe.lora.dropout,
            target_modules=recipe.lora.targets
            if recipe.lora.targets == "all-linear"
            else recipe.lora.targets.split(","),
            task_type="CAUSAL_LM",
        )
        set_seed(recipe.seed)  # TRL 1.14 draws an adapter with no seed
    trainer = Trainer(
        model=model,
        args=settings(recipe, folder, ranks()),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    return trainer


@contextmanager
def memory_advice(model: Any, recipe: Recipe) -> Iterator[None]:
    """Say what would fit where a GPU's memory does not: AdamW in float32 holds 16 bytes for each
    weight (the weight, its gradient, two moments)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        weights = sum(parameter.numel() for parameter in model.parameters())
        ways = ["--set gradient_checkpointing=true", "a smaller length"]
        if recipe.micro_batch > 1:
            ways.insert(0, "--set micro_batch=1")
        if recipe.lora is None:
            ways += ["--set lora.rank=16", "more devices (accelerate launch with FSDP)"]
        raise HubdiffError(
            f"the GPU's memory is full: {weights:,} weights trained in float32 take "
            f"{16 * weights / 1e9:.1f} GB, and the examples come on top",
            next_step=f"Try {', '.join(ways)}.",
        ) from error


def ranks() -> int:
    """The processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. One that was cut off is removed: its state, which is
    written last, is not there."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(found):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
        else:
            return path
    return None
