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

FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SHAPES = "prompt and completion, messages, or text"


def read_examples(source: str | Path, *, chat_template: bool, cache: Path) -> Dataset:
    """The examples at ``source``, a file or ``org/name`` with ``:split`` (``train`` unless given).
    ``chat_template``: whether the tokenizer has one, which messages need. ``cache``: where what was
    read is kept. Raises ``HubdiffError``."""
    dataset = _load(str(source), str(cache))
    columns = set(dataset.column_names)
    for shape in (["prompt", "completion"], ["messages"], ["text"]):
        if not set(shape) <= columns:
            continue
        kept = dataset.select_columns(shape)
        found = {_check(row, f"example {number} of {source}") for number, row in enumerate(kept, 1)}
        if True in found:
            _require_template(source, chat_template)
        return _turns(kept, source) if shape == ["messages"] else kept
    raise HubdiffError(
        f"{source} has the columns {', '.join(sorted(columns))}; wanted are {_SHAPES}",
        next_step="Rename its columns; datasets.Dataset.rename_column does it.",
    )


def _load(source: str, cache: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(source)
    try:
        if path.suffix.lower() in FILES and path.is_file():
            kind = FILES[path.suffix.lower()]
            dataset = load_dataset(kind, data_files=str(path), split="train", cache_dir=cache)
        elif path.exists() or source.count("/") != 1:
            raise HubdiffError(
                f"{source} is no dataset",
                next_step=f"Give a file ({', '.join(FILES)}) or org/name of the Hub.",
            )
        else:
            name, _, split = source.partition(":")
            dataset = load_dataset(name, split=split or "train", cache_dir=cache)
    except HubdiffError:
        raise
    except (OSError, ValueError, DatasetsError, RuntimeError, StopIteration) as error:
        raise HubdiffError(
            f"{source} can't be read as a dataset: {error.__cause__ or error}",
            next_step="Each line of a .jsonl file is one JSON object, all with the same fields; a "
            ".csv file names its columns in the first line.",
        ) from error
    if not len(dataset):
        raise HubdiffError(f"{source} holds no example", next_step="Check the file, or the split.")
    return dataset


def _check(row: dict[str, Any], where: str) -> bool:
    """Whether the example is made of messages. Raises unless it is all texts, or all messages."""
    are_messages = [_is_messages(value) for value in row.values()]
    texts = [isinstance(value, str) for value in row.values()]
    if all(are_messages) or ("messages" not in row and all(texts)):
        return all(are_messages)
    raise HubdiffError(
        f"{where} is neither text nor messages: "
        + ", ".join(f"{name} is {str(value)[:40]!r}" for name, value in row.items()),
        next_step='Texts are strings; messages are lists of {"role": "…", "content": "…"}.',
    )


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and isinstance(item.get("role"), str)
        and isinstance(item.get("content"), str)
        for item in value
    )


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
