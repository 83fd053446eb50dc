"""The plan of a recycling: which bases, in which order, trained how, and the steps that it means.

Algorithm 1 of Lin et al. 2025, for bases M_1 … M_n: M*_1 = FT(M_1), then M*_i = FT(M_i + Δ_{i−1}).
Iteratively Δ_{i−1} = M*_{i−1} − M_{i−1}; directly Δ_{i−1} = FT(M_{i−1}) − M_{i−1}, so that every
base but the last is trained by itself as well.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubdiff.errors import HubdiffError, RefError
from hubdiff.lab.examples import FILES
from hubdiff.lab.recipe import PAPER, Recipe, read_recipe
from hubdiff.refs import ModelRef

ITERATIVE, DIRECT = "iterative", "direct"
_KEYS = ("method", "data", "recipe", "set", "output", "push", "private", "bases")
_BASE_KEYS = ("base", "push", "tuned", "delta")
_NEXT = "The README's chapter on recycle has a plan to start from."


@dataclass(frozen=True)
class Version:
    """One base of the list. ``push`` is where its Δ goes; ``tuned`` or ``delta`` is the fine-tune
    of it that there is already."""

    base: str
    push: str | None = None
    tuned: str | None = None
    delta: str | None = None


@dataclass(frozen=True)
class Plan:
    """``folder`` is that of the plan file: relative paths begin there, those in here are absolute.
    ``data`` and refs are as ``finetune`` takes them."""

    file: str
    folder: Path
    method: str
    data: str
    recipe: Recipe
    output: Path
    private: bool
    versions: tuple[Version, ...]

    def shown(self, ref: str) -> str:
        """What is written down: a folder as seen from the plan file, so that both may move."""
        if os.path.isabs(ref):
            return f"./{os.path.relpath(ref, self.folder)}"
        return ref.removeprefix("hf://")

    def resolved(self, shown: str) -> str:
        """The ref that ``shown`` was made of."""
        if shown.startswith("./"):
            return os.path.normpath(self.folder / shown)
        return f"hf://{shown}"


@dataclass(frozen=True)
class Step:
    """One model with its Δ. ``name`` is its folder in the plan's output. Training begins from
    ``base``, or from that with the Δ of the step ``start`` on it; where ``tuned`` or ``delta`` is
    given there is none. ``number`` is that of the base, from 1. ``push`` is where the Δ goes;
    without it it stays in the output."""

    name: str
    number: int
    base: str
    start: str | None
    push: str | None
    tuned: str | None = None
    delta: str | None = None

    @property
    def trains(self) -> bool:
        return self.tuned is None and self.delta is None


def steps_of(plan: Plan) -> tuple[Step, ...]:
    """The steps in their order. Raises ``HubdiffError`` where two Δs would go to one place."""
    found = tuple(_steps(plan))
    names = [step.name for step in found]
    for step in found:
        if step.push is not None and ModelRef.parse(step.push).path is not None:
            _refuse_place(plan, step.push, names)
    places = Counter(step.push for step in found if step.push is not None)
    place, times = next(iter(places.most_common(1)), ("", 0))
    if times > 1:
        raise wrong(plan.file, "push", f"sends {times} deltas to {plan.shown(place)}", _TELL_APART)
    return found


_TELL_APART = (
    "Write {name} or {number} where the names are to differ, such as me/{name}-{number}-delta, or "
    "give a base a push of its own."
)


def _steps(plan: Plan) -> Iterator[Step]:
    start = None
    for number, version in enumerate(plan.versions, 1):
        name = f"{number}-{_name(version.base)}"
        last = number == len(plan.versions)
        push = _filled(version.push, number, version.base)
        alone = None
        if plan.method == DIRECT and not last and start is not None:
            beside = push and f"{push}-direct"
            alone = Step(f"{name}-direct", number, version.base, None, beside)
            yield alone
        yield Step(name, number, version.base, start, push, version.tuned, version.delta)
        start = alone.name if alone else name


def _name(base: str) -> str:
    """What people call a base: its repo's own name, or its folder's."""
    ref = ModelRef.parse(base)
    text = ref.path.name if ref.path is not None else str(ref.repo).rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip(".-") or "base"


def _filled(push: str | None, number: int, base: str) -> str | None:
    return push and push.replace("{name}", _name(base)).replace("{number}", str(number))


def _refuse_place(plan: Plan, push: str, names: Collection[str]) -> None:
    """Where an output or a model goes, or a folder around it, no delta may go."""
    place, output = Path(push), plan.output
    models = [output / name for name in names]
    if any(place == one or place in one.parents or one in place.parents for one in models):
        raise wrong(
            plan.file,
            "push",
            f"sends a delta to {plan.shown(push)}, where a tuned model is to be",
            "Write a folder of its own, such as ./deltas/{name}.",
        )


# --- reading ---


def read_plan(file: str | Path) -> Plan:
    """The plan in a YAML file. Raises ``HubdiffError``, which names the file and the key."""
    path = Path(file)
    document = _mapping(_yaml(path), str(file), "the plan", _KEYS)
    folder = Path(os.path.abspath(path)).parent
    reader = _Reader(str(file), folder)
    method = document.get("method", ITERATIVE)
    if method not in (ITERATIVE, DIRECT):
        raise wrong(str(file), "method", f"is {method!r}, not {ITERATIVE} or {DIRECT}")
    push = reader.push(document.get("push"), "push")
    versions = reader.versions(document.get("bases"), push)
    recipe = reader.recipe(document.get("recipe", PAPER), document.get("set"))
    if recipe.lora is not None and len(versions) > 1:
        raise wrong(
            str(file),
            "set",
            "asks for an adapter (lora), which is of the base it was trained on, and from the "
            "second base on that is no base that anybody has",
            "Leave lora out of the recipe: recycle trains all weights.",
        )
    private = document.get("private", False)
    if not isinstance(private, bool):
        raise wrong(str(file), "private", f"is {private!r}, not true or false")
    return Plan(
        file=str(file),
        folder=folder,
        method=method,
        data=reader.data(document.get("data")),
        recipe=recipe,
        output=Path(reader.path(reader.text(document.get("output"), "output"))),
        private=private,
        versions=versions,
    )


def wrong(file: str, key: str, what: str, next_step: str | None = _NEXT) -> HubdiffError:
    return HubdiffError(f"{file}: {key} {what}", next_step=next_step)


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HubdiffError(
            f"{path} can't be read: {error.strerror}", next_step="Give the path of a plan."
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise HubdiffError(f"{path} is not YAML: {error}", next_step=_NEXT) from error


def _mapping(value: Any, file: str, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong(file, where, f"is {value!r}, no mapping of names to values")
    for key in value:
        if key not in known:
            raise wrong(file, where, f"has the key {key!r}; known are {', '.join(known)}")
    return value


@dataclass(frozen=True)
class _Reader:
    """The values of a plan, each checked, with paths made absolute."""

    file: str
    folder: Path

    def versions(self, value: Any, push: str | None) -> tuple[Version, ...]:
        if not isinstance(value, list) or not value:
            what = "is missing" if value is None else f"is {value!r}"
            raise wrong(self.file, "bases", f"{what}: it is the list of the base versions")
        found = tuple(self._version(item, f"bases[{n}]", push) for n, item in enumerate(value, 1))
        late = next((n for n, one in enumerate(found, 1) if n > 1 and (one.tuned or one.delta)), 0)
        if late:
            raise wrong(
                self.file,
                f"bases[{late}]",
                "has a fine-tune already (tuned or delta), which only the first base may have",
                "Begin the list with the last base that has one.",
            )
        if len(found) == 1 and found[0].delta is not None:
            raise wrong(
                self.file, "bases", "has one base, with its delta: there is nothing to do",
                "Add the base that the delta is to be brought to.",
            )  # fmt: skip
        return found

    def _version(self, value: Any, key: str, push: str | None) -> Version:
        if isinstance(value, str):
            return Version(self._ref(value, key), push)
        entry = _mapping(value, self.file, key, _BASE_KEYS)
        if "tuned" in entry and "delta" in entry:
            raise wrong(self.file, key, "has both tuned and delta", "Give one of the two.")
        own = self.push(entry.get("push"), f"{key}.push")
        if "delta" in entry and own is not None:
            raise wrong(self.file, key, "has a delta, and where to push it", "Leave push out.")
        refs = {
            name: self._ref(entry[name], f"{key}.{name}")
            for name in ("tuned", "delta")
            if name in entry
        }
        base = self._ref(entry.get("base"), f"{key}.base")
        return Version(base, None if "delta" in refs else own or push, **refs)

    def text(self, value: Any, key: str) -> str:
        if value is None:
            raise wrong(self.file, key, "is missing")
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise wrong(self.file, key, f"is {value!r}, not a text")
        return value

    def path(self, text: str) -> str:
        return os.path.normpath(self.folder / os.path.expanduser(text))

    def _ref(self, value: Any, key: str) -> str:
        """As ``ModelRef.parse`` reads it, from the plan's folder instead of the current one."""
        text = self.text(value, key)
        if _is_path(text) or (self.folder / text).is_dir():
            return self.path(text)
        return self._repo(text, key)

    def push(self, value: Any, key: str) -> str | None:
        """A folder is written as a path: whether there is one must not decide what is a repo."""
        if value is None:
            return None
        text = self.text(value, key)
        if "{" in text.replace("{name}", "").replace("{number}", ""):
            raise wrong(self.file, key, f"is {text!r}; in braces it takes {{name}} and {{number}}")
        if _is_path(text):
            return self.path(text)
        self._repo(text.replace("{name}", "name").replace("{number}", "1"), key)
        return f"hf://{text.removeprefix('hf://')}"

    def _repo(self, text: str, key: str) -> str:
        ref = f"hf://{text.removeprefix('hf://')}"
        try:
            ModelRef.parse(ref)
        except RefError as error:
            raise wrong(self.file, key, f"is wrong: {error}", error.next_step) from error
        return ref

    def data(self, value: Any) -> str:
        text = self.text(value, "data")
        path = Path(self.path(text))
        if path.is_file():
            return str(path)
        repo = text.partition(":")[0]
        if path.suffix.lower() in FILES or _is_path(text) or repo.count("/") != 1:
            raise wrong(
                self.file,
                "data",
                f"is {text!r}, and there is no file {path}",
                "Give a file, relative to the plan, or org/name[:split] of the Hub.",
            )
        return text

    def recipe(self, source: Any, settings: Any) -> Recipe:
        text = self.text(source, "recipe")
        on_top = _mapping_of(settings, self.file)
        try:
            chosen = read_recipe(text if text == PAPER else self.path(text))
        except HubdiffError as error:
            raise wrong(self.file, "recipe", f"is wrong: {error}", error.next_step) from error
        if not on_top:
            return chosen
        source = PAPER if text == PAPER else self.path(text)
        try:
            return read_recipe(source, [f"{key}={json.dumps(on_top[key])}" for key in on_top])
        except (HubdiffError, TypeError) as error:
            known = error.next_step if isinstance(error, HubdiffError) else None
            raise wrong(self.file, "set", f"is wrong: {error}", known) from error


def _mapping_of(settings: Any, file: str) -> Mapping[str, Any]:
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise wrong(file, "set", f"is {settings!r}, no mapping of names to values")
    return settings


def _is_path(text: str) -> bool:
    return text in (".", "..") or text.startswith(("./", "../", "~")) or os.path.isabs(text)
