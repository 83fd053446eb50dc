"""Side files: everything of a model repo that is not its weights.

Pure functions on paths and content ids; nothing here reads a file. Two questions are answered:
which files of a tuned repo a delta carries (``classify``), and where each side file of a result
comes from (``result_sidecars``). What is inside a merged ``config.json`` is ``configs.py``'s job.

The rule is a three-way merge: the tune is what happened between source base and tuned, and it is
replayed on the target. What the tune did not touch stays the target's.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

# Above this a "side file" is data of its own, and the delta would be no smaller than the model.
LARGEST_SIDE_FILE = 256 * 10**6

MERGED_FILES = ("config.json", "generation_config.json")
_WEIGHT_INDEX = ".safetensors.index.json"

# Reason → patterns, tried in order on the lower-cased path. "dir/" means "a folder of that name
# anywhere in the path", a pattern without "/" is matched against the file name.
_NOT_CARRIED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("the Hub writes its own", (".gitattributes",)),
    ("git's own data, not part of the model", (".git/",)),
    ("a local cache, not part of the model", (".cache/", "__pycache__/")),
    ("hubdiff writes its own record of a result", ("hubdiff-result.json",)),
    ("a training checkpoint, not the model", ("checkpoint-*/", "global_step*/")),
    (
        "training state (optimizer, scheduler, random generators), not the model",
        (
            "optimizer*.pt",
            "optimizer*.bin",
            "optimizer*.pth",
            "optimizer*.safetensors",
            "scheduler.pt",
            "scheduler.bin",
            "scaler.pt",
            "rng_state*.pt",
            "rng_state*.pth",
            "random_states_*.pkl",
            "training_args.bin",
        ),
    ),
    ("another copy of the weights (ONNX)", ("onnx/", "*.onnx", "*.onnx_data*", "*.onnx.data")),
    ("another copy of the weights (OpenVINO)", ("openvino/", "openvino*.xml", "openvino*.bin")),
    (
        "another copy of the weights (Core ML)",
        ("coreml/", "*.mlpackage/", "*.mlmodelc/", "*.mlmodel", "*.mlpackage"),
    ),
    ("another copy of the weights (TensorFlow)", ("saved_model/", "*.h5", "*.keras", "*.tflite")),
    ("another copy of the weights (Flax)", ("*.msgpack",)),
    ("another copy of the weights (GGUF)", ("*.gguf", "*.ggml", "*.llamafile")),
    ("another copy of the weights (rust-bert)", ("*.ot",)),
    ("another copy of the weights (NeMo)", ("*.nemo",)),
    (
        "another copy of the weights, as a pickle (can run code when opened)",
        ("*.bin", "*.pt", "*.pth", "*.ckpt"),
    ),
    ("a pickle (can run code when opened)", ("*.pkl", "*.pickle", "*.joblib", "*.dill")),
    # A stale index is worse than none.
    (
        "an index of weights that are not carried",
        ("*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json"),
    ),
    (
        "belongs to an adapter, whose weights are not the checkpoint's own",
        ("adapter_model.safetensors", "adapter_config.json"),
    ),
    ("another copy of the weights (safetensors outside the checkpoint)", ("*.safetensors",)),
)


@dataclass(frozen=True)
class Carried:
    """A file that travels with the delta and comes back byte for byte."""


@dataclass(frozen=True)
class NotCarried:
    """A file that stays behind; ``reason`` is for people, in plain words."""

    reason: str


def classify(path: str, size: int, weights: Collection[str] = ()) -> Carried | NotCarried:
    """Whether a delta carries ``path`` (``size`` bytes) of a tuned repo.

    ``weights`` are the paths of the checkpoint's own safetensors files: they are always carried,
    whatever they are called. Python files are carried as files; hubdiff never runs them.
    """
    if path in weights:
        return Carried()
    for reason, patterns in _NOT_CARRIED:
        if any(_matches(path.lower(), pattern) for pattern in patterns):
            return NotCarried(reason)
    if size > LARGEST_SIDE_FILE:
        return NotCarried(f"larger than {LARGEST_SIDE_FILE // 10**6} MB and not the weights")
    return Carried()


def _matches(path: str, pattern: str) -> bool:
    *folders, name = path.split("/")
    if pattern.endswith("/"):
        return any(fnmatch.fnmatchcase(folder, pattern[:-1]) for folder in folders)
    return fnmatch.fnmatchcase(name, pattern)


# --- where the side files of a result come from -------------------------------------------------


@dataclass(frozen=True)
class SideFile:
    """One side file of a result and where its bytes come from; ``note`` says what a reader should
    know about the choice, or is None when there was none to make."""

    path: str
    source: Literal["tuned", "target", "merged"]
    note: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A file of the tuned model or the target that the result does not get, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class SidePlan:
    """Every side file of a result, by path, and every file left out."""

    files: tuple[SideFile, ...]
    left_out: tuple[LeftOut, ...]


def result_sidecars(
    base_files: Mapping[str, Hashable],
    tuned_files: Mapping[str, Hashable],
    target_files: Mapping[str, Hashable],
    *,
    weights: Collection[str] = (),
) -> SidePlan:
    """Say where each side file of a result comes from.

    The three mappings give a content id (sha256, git blob id, …) by path; ids are only compared.
    ``weights`` are the target's own weight files; they and every safetensors index are written by
    the merge, so they are not mentioned here.
    """
    files: list[SideFile] = []
    left_out: list[LeftOut] = []
    for path in sorted({*tuned_files, *target_files}):
        if path in weights or path.endswith(_WEIGHT_INDEX):
            continue
        placed = _place(path, base_files, tuned_files, target_files)
        if isinstance(placed, SideFile):
            files.append(placed)
        elif placed is not None:
            left_out.append(placed)
    return SidePlan(tuple(_note_mixed_tokenizer(files, tuned_files, target_files)), tuple(left_out))


def _place(
    path: str,
    base: Mapping[str, Hashable],
    tuned: Mapping[str, Hashable],
    target: Mapping[str, Hashable],
) -> SideFile | LeftOut | None:
    if path.lower() == "readme.md":
        return LeftOut(path, "the result gets a card of its own")
    verdict = classify(path, size=0)  # size limits what a delta carries, not what a target has
    if isinstance(verdict, NotCarried):
        return LeftOut(path, verdict.reason) if path in target else None
    if path not in tuned:
        dropped = "the tune deleted it; the target's is kept" if path in base else None
        return SideFile(path, "target", dropped)
    touched = path not in base or base[path] != tuned[path]
    if path not in target:
        if touched:
            return SideFile(path, "tuned")
        return LeftOut(path, "the tune left it as in its base, and the target does not have it")
    if not touched or tuned[path] == target[path]:
        return SideFile(path, "target")
    if path in MERGED_FILES:
        return SideFile(path, "merged")
    if path in base and base[path] == target[path]:
        return SideFile(path, "tuned")
    return SideFile(path, "tuned", "the target has another version of it; the tuned one is used")


_TOKENIZER = re.compile(
    r"(tokenizer.*|vocab\..*|merges\.txt|added_tokens\.json|special_tokens_map\.json|.*\.model|"
    r"sentencepiece.*|tiktoken.*|.*\.tiktoken)"
)


def _note_mixed_tokenizer(
    files: list[SideFile], tuned: Mapping[str, Hashable], target: Mapping[str, Hashable]
) -> list[SideFile]:
    """Tokenizer files belong together: say so when a result gets some from either side."""
    tokenizer = [file for file in files if _TOKENIZER.fullmatch(file.path)]
    if not any(file.source == "tuned" for file in tokenizer):
        return files
    apart = {f for f in tokenizer if f.source == "target" and tuned.get(f.path) != target[f.path]}
    return [_mixed(file) if file in apart else file for file in files]


def _mixed(file: SideFile) -> SideFile:
    note = "the target's, while other tokenizer files are the tuned model's: check that they agree"
    return replace(file, note=f"{file.note}; {note}" if file.note else note)
