"""``hubdiff.yaml``: what is watched, what is ported, and what a result has to show.

The file is held against ``templates/hubdiff.schema.json``; what a schema can't say is asked here.
Errors name the file, the line and the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hubdiff.card import template
from hubdiff.errors import HubdiffError, RefError
from hubdiff.refs import ModelRef

CONFIG, SCHEMA = "hubdiff.yaml", "hubdiff.schema.json"
_NEXT = "The README's chapter on keeping a fine-tune on the newest base has one to start from."
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Discover:
    """Where bases of a family turn up; None: not there. ``match`` is for the whole of a repo's own
    name, without the author."""

    collection: str | None = None
    author: str | None = None
    match: str | None = None
    new_version: bool = False


@dataclass(frozen=True)
class Evaluation:
    """``tasks`` as ``hubdiff eval`` takes them; files relative to the config."""

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    chat_template: bool = False
    batch: int = 8


@dataclass(frozen=True)
class Gate:
    """What a result has to show; None: not asked for. ``task`` is one of the evaluation's."""

    task: str | None = None
    min: float | None = None
    max_drop: float | None = None
    recovery: float | None = None
    tuned: str | None = None


@dataclass(frozen=True)
class Publish:
    """``to`` is a repo; ``kind`` delta or merged; ``mode`` pr, branch or none; ``public``: also
    what is made of gated or private repos."""

    to: str | None
    kind: str
    mode: str
    public: bool = False


@dataclass(frozen=True)
class DeltaPolicy:
    """One delta of a family: ``source`` is ``org/name@commit``."""

    name: str
    source: str
    policy: str
    scales: tuple[float, ...]
    evaluation: Evaluation
    gate: Gate
    publish: Publish


@dataclass(frozen=True)
class Family:
    """``bases`` are refs, the oldest first."""

    name: str
    bases: tuple[str, ...]
    discover: Discover
    deltas: tuple[DeltaPolicy, ...]


@dataclass(frozen=True)
class Limits:
    """``items`` of one run, ``attempts`` at one item, GB of disk that a runner has."""

    items: int = 5
    attempts: int = 3
    disk_gb: float = 14


@dataclass(frozen=True)
class Config:
    """``file`` as it was named."""

    file: str
    families: tuple[Family, ...]
    limits: Limits

    def outputs(self) -> frozenset[str]:
        """Repos that hubdiff itself fills or that hold deltas: never bases."""
        deltas = [delta for family in self.families for delta in family.deltas]
        sources = {delta.source.partition("@")[0] for delta in deltas}
        return frozenset(sources | {d.publish.to for d in deltas if d.publish.to})


def read_config(file: str | Path) -> Config:
    """Raises ``HubdiffError``, which names line and key."""
    text = _text(Path(file))
    lines = _Lines(str(file), text)
    _check_schema(lines)
    config = Config(
        str(file),
        tuple(_family(name, value) for name, value in lines.document["families"].items()),
        Limits(**lines.document.get("limits", {})),
    )
    for problem_path, what in _contradictions(config):
        raise lines.error(problem_path, what)
    return config


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise HubdiffError(f"{path} is larger than 1 MiB", next_step=_NEXT)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise HubdiffError(
            f"{path} can't be read: {error.strerror}",
            next_step="Run hubdiff init-ci to write one, or give --config FILE.",
        ) from error
    except ValueError as error:
        raise HubdiffError(f"{path} is not UTF-8: {error}", next_step=_NEXT) from error


class _Lines:
    """A YAML document that knows where its keys stand."""

    def __init__(self, file: str, text: str) -> None:
        import yaml

        self.file = file
        try:
            self._root = yaml.compose(text, Loader=yaml.SafeLoader)
            self.document: Any = yaml.safe_load(text)
            self._refuse_doubles(self._root, [])
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise HubdiffError(f"{file} is not YAML: {error}", next_step=_NEXT) from error

    def error(self, path: Sequence[str | int], what: str) -> HubdiffError:
        where = ".".join(map(str, path)) or "the document"
        return HubdiffError(f"{self.file}:{self._line(path)}: {where} {what}", next_step=_NEXT)

    def _line(self, path: Sequence[str | int]) -> int:
        """Of the key at ``path``, or of the nearest one above it that there is."""
        node, line = self._root, 1
        for step in path:
            found = _child(node, step)
            if found is None:
                break
            key, node = found
            line = key.start_mark.line + 1
        return line

    def _refuse_doubles(self, node: Any, path: list[str]) -> None:
        """PyYAML takes the last of two equal keys without a word."""
        seen = set()
        for key, value in _pairs(node):
            if key.value in seen:
                line = key.start_mark.line + 1
                where = ".".join([*path, key.value])
                raise HubdiffError(
                    f"{self.file}:{line}: {where} stands there twice", next_step=_NEXT
                )
            seen.add(key.value)
            self._refuse_doubles(value, [*path, key.value])


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    return list(node.value) if node is not None and node.id == "mapping" else []


def _child(node: Any, step: str | int) -> tuple[Any, Any] | None:
    """The node of a key, which tells the line, and that of its value."""
    if isinstance(step, int):
        found = node.value[step] if node is not None and node.id == "sequence" else None
        return (found, found) if found is not None else None
    return next(((key, value) for key, value in _pairs(node) if key.value == step), None)


def _check_schema(lines: _Lines) -> None:
    if find_spec("jsonschema") is None:
        raise HubdiffError(
            "reading hubdiff.yaml needs jsonschema, which is not installed",
            next_step="Run pip install 'hubdiff[backport]'.",
        )
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    validator = Draft202012Validator(
        json.loads(template(SCHEMA)), format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    error = best_match(validator.iter_errors(lines.document))
    if error is None:
        return
    path = list(error.absolute_path)
    if error.validator == "additionalProperties":
        unknown = next(key for key in error.instance if key not in error.schema["properties"])
        known = ", ".join(error.schema["properties"])
        raise lines.error([*path, str(unknown)], f"is not a key that hubdiff knows: {known}")
    raise lines.error(path, _words(error))


def _words(error: Any) -> str:
    comment = str(error.schema.get("$comment", "")) if isinstance(error.schema, dict) else ""
    if comment.startswith("hubdiff: ") and error.validator == "pattern":
        return comment.removeprefix("hubdiff: ")
    if error.validator == "anyOf" and "discover" in json.dumps(error.schema.get("anyOf")):
        return "names no bases: give bases, discover or both"
    if error.validator in ("required", "dependentRequired"):
        return f"is not complete: {error.message}"
    return f"is wrong: {error.message}"


def _family(name: str, value: Mapping[str, Any]) -> Family:
    return Family(
        name,
        tuple(value.get("bases", ())),
        Discover(**value.get("discover", {})),
        tuple(_delta(key, one) for key, one in value["deltas"].items()),
    )


def _delta(name: str, value: Mapping[str, Any]) -> DeltaPolicy:
    asked = dict(value.get("eval", {}))
    asked["tasks"] = tuple(asked.get("tasks", ()))
    gate = Gate(**value.get("gate", {}))
    if gate.task is None and asked["tasks"]:
        gate = Gate(**{**vars(gate), "task": asked["tasks"][0]})
    publish = value["publish"]
    return DeltaPolicy(
        name,
        value["source"],
        value.get("policy", "recycle"),
        tuple(float(scale) for scale in value.get("scales", (1.0,))),
        Evaluation(**asked),
        gate,
        Publish(
            publish.get("to"),
            publish.get("as", "delta"),
            publish["mode"],
            publish.get("public", False),
        ),
    )


def _contradictions(config: Config) -> Iterator[tuple[list[str | int], str]]:
    """What a schema can't see."""
    sources: dict[str, str] = {}
    for family in config.families:
        here: list[str | int] = ["families", family.name]
        for number, base in enumerate(family.bases):
            yield from _no_ref(base, [*here, "bases", number])
        for delta in family.deltas:
            there = [*here, "deltas", delta.name]
            if delta.source in sources:
                yield [*there, "source"], f"is that of {sources[delta.source]} too"
            sources[delta.source] = f"{family.name}.{delta.name}"
            yield from _delta_contradictions(delta, there)


def _no_ref(ref: str | None, path: list[str | int]) -> Iterator[tuple[list[str | int], str]]:
    try:
        ModelRef.parse(f"hf://{ref or 'a/b'}")
    except RefError:
        yield path, f"is {ref!r}, which the Hub takes for no name"


def _delta_contradictions(
    delta: DeltaPolicy, there: list[str | int]
) -> Iterator[tuple[list[str | int], str]]:
    tasks, gate = delta.evaluation.tasks, delta.gate
    yield from _no_ref(delta.source, [*there, "source"])
    yield from _no_ref(gate.tuned, [*there, "gate", "tuned"])
    yield from _no_ref(delta.publish.to, [*there, "publish", "to"])
    if not tasks and len(delta.scales) > 1:
        yield [*there, "scales"], "has several scales, and no eval that could choose one"
    numbers = (gate.min, gate.max_drop, gate.recovery)
    if not tasks and any(number is not None for number in numbers):
        yield [*there, "gate"], "asks for scores, and there is no eval that would measure them"
    if tasks and gate.task not in tasks:
        yield [*there, "gate", "task"], f"is {gate.task!r}, which is not one of eval.tasks"
