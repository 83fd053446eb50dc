"""The demo: a fine-tune travels to a newer base, on this machine alone.

A loopback Hub, a toy family trained on the spot (``toy_family.py``), and then nothing but commands
that a user types, each in a process of its own with an empty cache. It checks what it shows: every
file that comes back has the content id the Hub lists, and the newer base does the task only with
the delta. Otherwise it raises. About a minute on two cores; no account, no network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.errors import HubdiffError, IntegrityError, OutputExists
from hubdiff.progress import Progress, Silent
from hubdiff.summary import percent, size_text, summarise
from hubdiff.toy_family import (
    TUNED,
    V1,
    V2,
    Example,
    Recipe,
    answers,
    exact_match,
    held_out,
    train_family,
)

if TYPE_CHECKING:
    from hubdiff.devhub import DevHub

OWNER = "demo"
DELTA, REBUILT, RESULT = f"{TUNED}-delta", f"{TUNED}-rebuilt", "toy-v2-sort"
EXAMPLES_SHOWN = 3

_PROGRAMS = {"hubdiff": "hubdiff", "hf": "huggingface_hub.cli.hf"}


@dataclass(frozen=True)
class Step:
    """A command and how many bytes of the Hub's files it read, by repo."""

    name: str
    command: str
    read: dict[str, int]


@dataclass(frozen=True)
class Answered:
    """One held-out example, and what the models say."""

    prompt: str
    v2: str
    result: str
    tuned: str


@dataclass(frozen=True)
class DemoResult:
    """What happened. Scores are shares of ``examples`` held-out words with exactly the right
    answer; sizes are bytes. ``model_bytes`` are one model's weights, ``delta_bytes`` the layers;
    ``restored`` files came back with the content the Hub lists. ``card`` and ``picture`` are the
    delta's, where the folder was kept."""

    v2: float
    result: float
    tuned: float
    examples: int
    answers: tuple[Answered, ...]
    model_bytes: int
    delta_bytes: int
    restored: tuple[str, ...]
    steps: tuple[Step, ...]
    card: Path | None
    picture: Path | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        document = asdict(self)
        for name in ("card", "picture"):
            document[name] = str(document[name]) if document[name] else None
        return document | {"seconds": round(self.seconds, 1)}

    def lines(self) -> list[str]:
        return [*self._score_lines(), "", *self._byte_lines(), "", *self._closing_lines()]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _score_lines(self) -> list[str]:
        rows = [(V2, self.v2), (f"{V2} + Δ", self.result), (f"{V1}, fine-tuned", self.tuned)]
        said = [[f"{a.prompt}{text}" for text in (a.v2, a.result, a.tuned)] for a in self.answers]
        return [
            f"Exact match on {self.examples} words that training never saw:",
            *(
                f"  {name:20} {value:7.2f}   {'   '.join(texts)}"
                for (name, value), texts in zip(rows, zip(*said, strict=True), strict=True)
            ),
        ]

    def _byte_lines(self) -> list[str]:
        share = percent(self.delta_bytes / self.model_bytes)
        rows = [
            (step.name, size_text(sum(step.read.values())), _sources(step)) for step in self.steps
        ]
        return [
            f"The weights of one model are {size_text(self.model_bytes)}, the delta "
            f"{size_text(self.delta_bytes)} ({share}). Read from the Hub, side files included:",
            *(f"  {name:20} {total:>7}   {sources}" for name, total, sources in rows),
        ]

    def _closing_lines(self) -> list[str]:
        lines = [
            f"On its own base the delta gave back {len(self.restored)} files of {OWNER}/{TUNED}, "
            "each with the hash that the Hub lists for it.",
            "All this is a toy: a million parameters, trained in seconds at 50 times the usual "
            "learning rate of a fine-tune. Hence its large delta: the size follows how far "
            "training moved the weights.",
        ]
        if self.card is not None:
            lines.append(f"The delta's card is {self.card}, its picture {self.picture}.")
        else:
            lines.append("Nothing was kept; hubdiff demo --keep DIR keeps models, delta and card.")
        return [*lines, f"{self.seconds:.0f} s in all."]


def demo(
    folder: Path | None = None, *, progress: Progress | None = None, recipe: Recipe | None = None
) -> DemoResult:
    """Run the demo in ``folder``, which must be new or empty, or in a temporary one.

    ``progress.note`` gets every command before it runs (``$ hubdiff …``) and what it says. Raises
    ``HubdiffError``, also when a file came back wrong or the skill did not travel.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        hub = stack.enter_context(_devhub())
        if folder is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hubdiff-demo-")))
        else:
            place = _empty(folder)
        return _Demo(hub, place, progress or Silent(), recipe or Recipe()).run(
            began, kept=folder is not None
        )


def _devhub() -> DevHub:
    missing = [name for name in ("lz4", "starlette", "uvicorn") if not _is_here(name)]
    if missing:
        raise HubdiffError(
            f"the demo's loopback Hub needs {', '.join(missing)}",
            next_step="Run pip install 'hubdiff[devhub]'.",
        )
    from hubdiff.devhub import DevHub

    return DevHub(users={OWNER: "hf_demo"})


def _is_here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _empty(folder: Path) -> Path:
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExists(
            f"{folder} is not an empty folder", next_step="Give --keep a new folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Demo:
    def __init__(self, hub: DevHub, folder: Path, progress: Progress, recipe: Recipe) -> None:
        self._hub, self._folder = hub, folder
        self._note, self._recipe = progress.note, recipe

    def run(self, began: float, *, kept: bool) -> DemoResult:
        self._note(f"a Hub of its own at {self._hub.url}")
        train_family(self._folder, OWNER, self._recipe, self._note)
        for name in (V1, V2, TUNED):
            self._run("hf", "upload", f"{OWNER}/{name}", name)
        steps = (
            self._step("push-delta", f"{OWNER}/{TUNED}", f"{OWNER}/{DELTA}"),
            # The folder: who has the base already reads only the delta.
            self._step("apply", f"{OWNER}/{DELTA}", "--to", f"./{V1}", "--output", REBUILT),
            self._step(
                "apply",
                f"{OWNER}/{DELTA}",
                "--to",
                f"{OWNER}/{V2}",
                "--push-to",
                f"{OWNER}/{RESULT}",
            ),
        )
        for name in (DELTA, RESULT):
            self._run("hf", "download", f"{OWNER}/{name}", "--local-dir", name)
        delta = self._folder / DELTA
        manifest = json.loads((delta / "hubdiff.json").read_text(encoding="utf-8"))
        restored = check_files(self._folder / REBUILT, self._listed(TUNED), manifest)
        sizes = summarise(manifest)
        examples = held_out(self._recipe.examples)
        said = {name: answers(self._folder / name, examples) for name in (V2, RESULT, TUNED)}
        scores = {name: exact_match(texts, examples) for name, texts in said.items()}
        check_scores(scores[V2], scores[RESULT], scores[TUNED], self._recipe)
        return DemoResult(
            v2=scores[V2],
            result=scores[RESULT],
            tuned=scores[TUNED],
            examples=len(examples),
            answers=_shown(examples, said),
            model_bytes=sizes.tuned_bytes,
            delta_bytes=sizes.delta_bytes,
            restored=restored,
            steps=steps,
            card=delta / "README.md" if kept else None,
            picture=delta / "layers.png" if kept else None,
            seconds=time.monotonic() - began,
        )

    def _step(self, *arguments: str) -> Step:
        """A hubdiff command, with what it read."""
        self._hub.log.clear()
        command = self._run("hubdiff", *arguments)
        repos = {record.repo for record in self._hub.log if record.repo}
        read = {repo: self._hub.log.bytes_served(repo) for repo in sorted(repos)}
        name = f"apply to {arguments[3]}" if arguments[0] == "apply" else arguments[0]
        return Step(name, command, {repo: size for repo, size in read.items() if size})

    def _run(self, program: str, *arguments: str) -> str:
        """One command as a user types it; its output goes to the notes."""
        command = shlex.join([program, *arguments])
        self._note(f"$ {command}")
        done = subprocess.run(
            [sys.executable, "-m", _PROGRAMS[program], *arguments],
            cwd=self._folder,
            env=_environment(self._hub),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            raise HubdiffError(
                f"{command} failed with exit code {done.returncode}:\n{done.stderr.strip()}",
                next_step="This is a bug of hubdiff's: please report it with this output.",
            )
        for line in done.stdout.splitlines():
            self._note(f"  {line}" if line else "")
        return command

    def _listed(self, name: str) -> dict[str, str]:
        """What the Hub lists of a repo: sha256 of its large files, git's blob id of the others."""
        # Not through huggingface_hub: it read this process's HF_ENDPOINT when it was imported.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{self._hub.url}/api/models/{OWNER}/{name}?blobs=true") as answer:
            files = json.load(answer)["siblings"]
        return {
            file["rfilename"]: file["lfs"]["sha256"] if "lfs" in file else file["blobId"]
            for file in files
        }


def _environment(hub: DevHub) -> dict[str, str]:
    """The loopback Hub as the only Hub, no cache, and this hubdiff, installed or not."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
    }
    paths = [str(Path(__file__).resolve().parents[1]), kept.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    plain = {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    return kept | hub.environment() | plain


def check_files(folder: Path, listed: dict[str, str], manifest: dict[str, Any]) -> tuple[str, ...]:
    """The files of ``folder`` that are what the Hub lists: all that the delta carries."""
    left_out = {file["path"] for file in manifest["tuned"]["not_carried"]}
    restored = []
    for path, expected in sorted(listed.items()):
        if path in left_out:
            continue
        file = folder / path
        data = file.read_bytes() if file.is_file() else b""
        if expected not in (_sha256(data), _blob_id(data)):
            raise IntegrityError(
                f"{path} of the rebuilt {TUNED} is not the file the Hub lists",
                next_step="This is a bug of hubdiff's: please report it.",
            )
        restored.append(path)
    return tuple(restored)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_scores(v2: float, result: float, tuned: float, recipe: Recipe) -> None:
    """Raise ``HubdiffError`` unless the skill is there, was learnt, and came with the delta."""
    if v2 <= recipe.most_without and min(result, tuned) >= recipe.least_with:
        return
    raise HubdiffError(
        f"the skill did not travel: exact match is {v2:.2f} for {V2}, {result:.2f} for {V2} + Δ, "
        f"{tuned:.2f} for the fine-tuned {V1}",
        next_step="Report it, with the versions of Python and torch.",
    )


def _shown(examples: Sequence[Example], said: dict[str, list[str]]) -> tuple[Answered, ...]:
    return tuple(
        Answered(example.prompt, said[V2][i], said[RESULT][i], said[TUNED][i])
        for i, example in enumerate(examples[:EXAMPLES_SHOWN])
    )


def _sources(step: Step) -> str:
    return ", ".join(f"{repo} {size_text(size)}" for repo, size in step.read.items())
