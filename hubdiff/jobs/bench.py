"""Models put to the tasks of lm-evaluation-harness one after the other: what eval, compare and
tune-scale share."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.checkpoint import require_model
from hubdiff.errors import HubdiffError, OutputExists
from hubdiff.files import FileTree, open_tree
from hubdiff.jobs.finetune import require_all, usable_model
from hubdiff.jobs.load import load, model_class, model_side_files, result_side_files
from hubdiff.jobs.merging import choose_device
from hubdiff.lab.suites import wanted_tasks
from hubdiff.manifest import read_manifest
from hubdiff.progress import Progress, Silent
from hubdiff.ranks import is_first
from hubdiff.refs import ModelRef, parse_weighted
from hubdiff.writer import disk_errors, only_run, write_whole

if TYPE_CHECKING:
    from hubdiff.lab.harness import Tasks
    from hubdiff.lab.scores import TaskScore

RESULTS, SAMPLES = "results.json", "samples"
BACKENDS = ("accelerate", "vllm")


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a ``model`` and ``deltas`` on it, each pinned, with its weight."""

    model: FileTree
    deltas: tuple[tuple[FileTree, float], ...]
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str | Path, scale: float = 1.0) -> Subject:
        """MODEL, or MODEL+DELTA+… A folder may have a + in its name. Raises ``HubdiffError``."""
        words = [str(text)] if isinstance(text, Path) else str(text).split("+")
        words = [word.strip() for word in words]
        model = words.pop(0)
        while words and not Path(model).exists() and Path(f"{model}+{words[0]}").exists():
            model += f"+{words.pop(0)}"
        deltas = [parse_weighted(word) for word in words]
        if scale != 1.0 and not deltas:
            raise HubdiffError(
                f"{text} has no delta that a scale could be of",
                next_step="Write MODEL+DELTA, or leave the scale out.",
            )
        opened = tuple((open_tree(ref, cache=False), weight) for ref, weight in deltas)
        return cls.of(open_tree(ModelRef.parse(model), cache=False), opened, scale)

    @classmethod
    def of(
        cls, model: FileTree, deltas: Sequence[tuple[FileTree, float]] = (), scale: float = 1.0
    ) -> Subject:
        """Raises ``IsADelta``, or ``NotADelta`` and what else a manifest may be, where each should
        be the other."""
        require_model(model)
        for tree, _ in deltas:
            read_manifest(tree)
        return cls(model, tuple(deltas), scale)

    def __str__(self) -> str:
        words = [str(self.model.pin)]
        words += [f"{d.pin}:{w:g}" if w != 1 else str(d.pin) for d, w in self.deltas]
        return " + ".join(words)

    def named_deltas(self) -> list[tuple[str | Path, float]]:
        """As ``apply`` and ``load`` take them."""
        return [(tree.pin.again, weight) for tree, weight in self.deltas]

    def identity(self) -> list[Any]:
        """What answers depend on: pins, and of folders the files."""
        trees = [self.model, *(tree for tree, _ in self.deltas)]
        return [self.scale, *(w for _, w in self.deltas), *map(_identity, trees)]


@dataclass(frozen=True)
class Evaluated:
    """``limit``: how many examples of each task, None for all of them."""

    model: str
    scale: float
    scores: tuple[TaskScore, ...]
    limit: int | None
    chat_template: bool
    seconds: float
    libraries: Mapping[str, str]
    settings: Mapping[str, Any]
    samples: Mapping[str, list[dict[str, Any]]] = field(repr=False, default_factory=dict)
    card: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "scale": self.scale,
            "scores": [score.as_json() for score in self.scores],
            "limit": self.limit,
            "chat_template": self.chat_template,
            "seconds": round(self.seconds, 3),
            "libraries": dict(self.libraries),
            "settings": dict(self.settings),
            "card": self.card,
        }

    def write(self, folder: Path) -> None:
        """``results.json``, and for each task what was said to every example."""
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for task, lines in self.samples.items():
            text = "".join(json.dumps(line, default=_plain) + "\n" for line in lines)
            name = re.sub(r"[^\w.-]", "_", task)
            write_whole(folder / f"{SAMPLES}_{name}.jsonl", text.encode())
        write_whole(folder / RESULTS, (json.dumps(self.as_json(), indent=2) + "\n").encode())


def _plain(value: Any) -> Any:
    """numpy's numbers, and whatever else a task of the harness may have."""
    return value.item() if hasattr(value, "item") else str(value)


@dataclass(frozen=True)
class Asked:
    """Which tasks, and how they are put to a model: the arguments of ``evaluate``."""

    tasks: tuple[str, ...]
    suite: str | None
    limit: int | None
    chat_template: bool
    batch: int
    seed: int
    device: str
    spread: bool
    backend: str


class Bench:
    """Models evaluated on the same tasks, one after the other. Answers are kept until ``finish``,
    so that a stopped run goes on from them. Raises ``HubdiffError`` for what can't be asked."""

    def __init__(self, asked: Asked, progress: Progress | None = None) -> None:
        require_extra(asked.backend)
        if asked.batch < 1 or (asked.limit is not None and asked.limit < 1):
            raise HubdiffError(
                "there must be an example in each batch, and one of each task",
                next_step="Check --batch-size and --limit.",
            )
        if asked.backend == "vllm" and asked.device != "auto":
            raise HubdiffError(
                "vLLM chooses its devices itself, as it was built",
                next_step="Leave --device out; CUDA_VISIBLE_DEVICES says which GPUs it sees.",
            )
        wanted = wanted_tasks(list(asked.tasks), asked.suite)
        self._how = replace(asked, device=choose_device(asked.device))
        self._progress = progress or Silent()
        self._states: list[Path] = []
        # The harness takes seconds to import, and more to list the thousands of tasks that it has.
        self._progress.start("reading the tasks", len(wanted), "tasks")
        from hubdiff.lab.harness import Tasks
        from hubdiff.lab.quiet import quiet

        with quiet():
            self._tasks = Tasks(wanted, asked.seed, self._progress)
        self._progress.finish()

    def evaluate(self, subject: Subject) -> Evaluated | None:
        """None in processes that are not the first."""
        from hubdiff.lab.quiet import quiet

        state = _state(subject, self._how)
        self._states.append(state)
        with quiet(), only_run(state) if is_first() else nullcontext():
            made = _evaluate(subject, self._tasks, self._how, state, self._progress)
        gc.collect()  # a model is full of cycles: two of them would be in memory
        return made

    def finish(self) -> None:
        """All is kept elsewhere: the answers may go."""
        if not is_first():
            return
        for state in self._states:
            with suppress(OutputExists), only_run(state):  # another run may be at it by now
                shutil.rmtree(state, ignore_errors=True)


def require_extra(backend: str = BACKENDS[0]) -> None:
    if backend not in BACKENDS:
        raise HubdiffError(
            f"there is no backend {backend!r}", next_step=f"Use {' or '.join(BACKENDS)}."
        )
    missing = [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]
    if missing:
        raise HubdiffError(
            f"evaluating needs {', '.join(missing)}, which is not installed",
            next_step="Run pip install 'hubdiff[eval]'.",
        )
    if backend == "vllm":
        _require_vllm()


def _require_vllm() -> None:
    """Under its own name: the harness looks for the distribution too, not for the module only."""
    install = "Run pip install vllm, or use --backend accelerate."
    if find_spec("vllm") is None:
        raise HubdiffError("vllm is not installed", next_step=install)
    try:
        version("vllm")
    except PackageNotFoundError as error:
        raise HubdiffError(
            "vllm is installed under another name, by which lm-evaluation-harness does not find it",
            next_step=install,
        ) from error


def require_output(path: Path) -> None:
    """A folder that can be written, made where there is none."""
    if path.exists() and not path.is_dir():
        raise HubdiffError(f"{path} is no folder", next_step="Give another --output.")
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def _identity(tree: FileTree) -> list[Any]:
    pin = tree.pin
    if pin.path is None:
        return [pin.repo, pin.commit]
    files = sorted(path for path in pin.path.rglob("*") if path.is_file())
    stats = [(str(path), path.stat()) for path in files]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _state(subject: Subject, how: Asked) -> Path:
    """Where answers are kept: for this model, asked in this way, with these libraries."""
    from hubdiff.hub import home

    # How many at a time is left out: whoever ran out of memory goes on with fewer.
    asked = [how.device, how.backend, how.chat_template, how.seed]
    words = json.dumps([subject.identity(), asked, _libraries(how)])
    key = hashlib.sha256(words.encode()).hexdigest()[:24]
    return home() / "hubdiff" / "evaluations" / key


def _libraries(how: Asked) -> dict[str, str]:
    backend = ("vllm",) if how.backend == "vllm" else ()
    return {name: version(name) for name in ("lm_eval", "transformers", "torch", *backend)}


def _evaluate(
    subject: Subject, tasks: Tasks, how: Asked, state: Path, progress: Progress
) -> Evaluated | None:
    began = time.monotonic()
    with disk_errors(state):
        state.mkdir(parents=True, exist_ok=True)
    progress.note(f"evaluating {subject}")
    with _memory_advice(subject, how), _model(subject, how, progress) as model:
        found = tasks.run(
            model,
            limit=how.limit,
            chat_template=how.chat_template,
            answers=state / "answers",
        )
    if found is None:
        return None
    return Evaluated(
        str(subject),
        subject.scale,
        tasks.scores(found),
        how.limit,
        how.chat_template,
        time.monotonic() - began,
        _libraries(how),
        {
            "device": how.device,
            "backend": how.backend,
            "batch": how.batch,
            "seed": how.seed,
            "dtype": str(getattr(model.model, "dtype", "")).removeprefix("torch."),
        },
        found["samples"],
    )


@contextmanager
def _model(subject: Subject, how: Asked, progress: Progress) -> Iterator[Any]:
    """The model as the harness takes it."""
    with tempfile.TemporaryDirectory(prefix="hubdiff-") as small:
        if how.backend == "vllm":
            yield _vllm(subject, Path(small), how)
            return
        from hubdiff.lab.harness import Model

        folder = Path(small)
        _side_files(subject, folder)
        if not model_class(folder).can_generate():
            raise HubdiffError(
                f"{subject} is no language model that writes: the harness has no questions for it",
                next_step="Give a model with a head for language modelling.",
            )
        with usable_model(f"the config or the tokenizer of {subject}"):
            model = Model(
                folder,
                lambda device: _load(subject, folder, device),
                progress,
                device=how.device,
                parallelize=how.spread,
                batch_size=how.batch,
            )
        if how.chat_template and not model.tokenizer.chat_template:
            raise HubdiffError(
                f"the tokenizer of {subject} has no chat template",
                next_step="Leave --apply-chat-template out, or put chat_template.jinja beside it.",
            )
        yield model


def _side_files(subject: Subject, folder: Path) -> None:
    if subject.deltas:
        place, scale = subject.model.pin.again, subject.scale
        result_side_files(subject.named_deltas(), place, folder, scale=scale)
    else:
        model_side_files(subject.model, folder)


def _load(subject: Subject, folder: Path, device: str) -> Any:
    where = None if device == "cpu" else device
    if subject.deltas:
        return load(
            subject.named_deltas(),
            subject.model.pin.again,
            scale=subject.scale,
            device_map=where,
            dtype="auto",
        )
    pin = subject.model.pin
    with usable_model(str(subject)):
        model, loading = model_class(folder).from_pretrained(
            str(pin.path or pin.repo),
            revision=pin.commit or "main",
            dtype="auto",
            device_map=where,
            trust_remote_code=False,
            output_loading_info=True,
        )
    require_all(loading, str(pin))
    return model


@contextmanager
def _memory_advice(subject: Subject, how: Asked) -> Iterator[None]:
    """Say what would fit where a GPU's memory does not."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        size = sum(info.size for path, info in subject.model.files().items() if _weights(path))
        ways = [f"--batch-size {how.batch // 2}"] if how.batch > 1 else []
        ways += [] if how.spread else ["--spread over several GPUs"]
        ways = [" or ".join(ways) + ", which goes on from the answers there are"] if ways else []
        raise HubdiffError(
            f"the memory of {how.device} is full: the weights of {subject} take "
            f"{size / 1e9:.1f} GB, and the requests come on top",
            next_step=f"Try {'; or '.join([*ways, '--device cpu'])}.",
        ) from error


def _weights(path: str) -> bool:
    return path.endswith(".safetensors")


def _vllm(subject: Subject, folder: Path, how: Asked) -> Any:
    """vLLM reads a folder: that of the merged model lies in memory where there is room."""
    # It logs on stdout, which is for the scores.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch
    from lm_eval.models.vllm_causallms import VLLM

    from hubdiff.jobs.apply import apply

    over = torch.cuda.device_count() if how.spread else 1
    wanted = {"batch_size": how.batch, "seed": how.seed, "tensor_parallel_size": max(1, over)}
    place = str(subject.model.pin.path or subject.model.pin.repo)
    revision = subject.model.pin.commit or "main"
    if subject.deltas:
        size = sum(info.size for info in subject.model.files().values())
        shared = Path("/dev/shm")
        if shared.is_dir() and shutil.disk_usage(shared).free > 1.2 * size:
            folder = Path(tempfile.mkdtemp(prefix="hubdiff-", dir=shared))
        try:
            apply(
                subject.named_deltas(),
                subject.model.pin.again,
                output=folder / "model",
                scale=subject.scale,
                force=True,
            )
            return VLLM(str(folder / "model"), **wanted)
        finally:
            if folder.parent == shared:
                shutil.rmtree(folder, ignore_errors=True)
    return VLLM(place, revision=revision, **wanted)
