"""The examples of a fine-tune: a file or a dataset of the Hub, as prompts and what should follow.

Three shapes are read, by the names of the columns: ``prompt`` and ``completion`` (texts, or
messages), ``messages`` (a conversation, of which every turn of the assistant is an example), and
``text`` (all of which is learnt).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.errors import HubdiffError

if TYPE_CHECKING:
    from datasets import Dataset

_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SHAPES = "prompt and completion, messages, or text"


def read_examples(source: str | Path, *, chat_template: bool, cache: Path) -> Dataset:
    """The examples at ``source``, a file or ``org/name`` with ``:split`` (``train`` unless given).
    ``chat_template``: whether the tokenizer has one, which messages need. ``cache``: where what was
    read is kept. Raises ``HubdiffError``."""
    dataset = _load(str(source), str(cache))
    columns = set(dataset.column_names)
    if {"prompt", "completion"} <= columns:
        kept = dataset.select_columns(["prompt", "completion"])
        if isinstance(kept[0]["prompt"], list):
            _require_template(source, chat_template)
        return kept
    if "messages" in columns:
        _require_template(source, chat_template)
        return _turns(dataset.select_columns(["messages"]), source)
    if "text" in columns:
        return dataset.select_columns(["text"])
    raise HubdiffError(
        f"{source} has the columns {', '.join(sorted(columns))}; wanted are {_SHAPES}",
        next_step="Rename its columns; datasets.Dataset.rename_column does it.",
    )


def _load(source: str, cache: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(source)
    try:
        if path.suffix in _FILES and path.is_file():
            kind = _FILES[path.suffix]
            dataset = load_dataset(kind, data_files=str(path), split="train", cache_dir=cache)
        elif path.exists() or source.count("/") != 1:
            raise HubdiffError(
                f"{source} is no dataset",
                next_step=f"Give a file ({', '.join(_FILES)}) or org/name of the Hub.",
            )
        else:
            name, _, split = source.partition(":")
            dataset = load_dataset(name, split=split or "train", cache_dir=cache)
    except HubdiffError:
        raise
    except (OSError, ValueError, DatasetsError, RuntimeError) as error:
        raise HubdiffError(
            f"{source} can't be read as a dataset: {error}",
            next_step="Each line of a .jsonl file is one JSON object, all with the same fields.",
        ) from error
    if not len(dataset):
        raise HubdiffError(f"{source} holds no example", next_step="Check the file, or the split.")
    return dataset


def _require_template(source: str | Path, there: bool) -> None:
    if not there:
        raise HubdiffError(
            f"{source} holds messages, and the base's tokenizer has no chat template to write them "
            "out with",
            next_step="Put chat_template.jinja beside its tokenizer (that of its instruct model), "
            "or give prompt and completion as texts.",
        )


def _turns(dataset: Dataset, source: str | Path) -> Dataset:
    """One example for every turn of the assistant: what came before it is the prompt."""

    def split(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        prompts, completions = [], []
        for messages in rows["messages"]:
            for number, message in enumerate(messages):
                if number and message.get("role") == "assistant":
                    prompts.append(messages[:number])
                    completions.append([message])
        return {"prompt": prompts, "completion": completions}

    made = dataset.map(split, batched=True, remove_columns=["messages"])
    if not len(made):
        raise HubdiffError(
            f"no conversation of {source} has a turn of the assistant",
            next_step='A turn is {"role": "assistant", "content": "…"}, after one of the user.',
        )
    return made
