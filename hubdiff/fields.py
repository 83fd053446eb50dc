"""Checked reading of the manifest's JSON: a field is asked for together with what it must be.

A check is a function from the raw value to the checked one that raises ``WrongField``; ``Fields``
turns that into a ``BadManifest`` that says which field of which file is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from hubdiff.errors import BadManifest, UnsafePath
from hubdiff.files import safe_path

T = TypeVar("T")


class WrongField(Exception):
    """Says what a field should have been."""


class Fields:
    """A JSON object with a memory of where it stands, for messages that name the field."""

    def __init__(self, document: Any, where: str, trail: str) -> None:
        self._where, self._trail = where, trail
        if not isinstance(document, dict):
            raise self.bad("", "is not an object")
        self._document = document

    def __contains__(self, key: str) -> bool:
        return key in self._document

    def bad(self, key: str, what: str) -> BadManifest:
        name = f"{self._trail}{key}".rstrip(".")
        return bad_manifest(self._where, f"field {name!r} {what}" if name else what)

    def get(self, key: str, check: Callable[[Any], T]) -> T:
        if key not in self._document:
            raise self.bad(key, "is missing")
        try:
            return check(self._document[key])
        except WrongField as wrong:
            raise self.bad(key, f"is {short(self._document[key])}, not {wrong}") from None
        except UnsafePath as error:
            raise self.bad(key, f"is no safe path ({error})") from error

    def child(self, key: str) -> Fields:
        return Fields(self.get(key, mapping), self._where, f"{self._trail}{key}.")

    def optional_child(self, key: str) -> Fields | None:
        return self.child(key) if self.get(key, optional(mapping)) is not None else None

    def children(self, key: str) -> list[Fields]:
        items = self.get(key, array)
        return [
            Fields(item, self._where, f"{self._trail}{key}[{i}].") for i, item in enumerate(items)
        ]


def typed(kind: type[T], words: str) -> Callable[[Any], T]:
    def check(value: Any) -> T:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise WrongField(words)
        return value

    return check


boolean = typed(bool, "true or false")
mapping: Callable[[Any], dict[str, Any]] = typed(dict, "an object")
array: Callable[[Any], list[Any]] = typed(list, "a list")


def string(value: Any) -> str:
    # JSON can spell half a surrogate pair, which can neither be printed nor written to a file.
    if not isinstance(value, str) or any(0xD800 <= ord(char) < 0xE000 for char in value):
        raise WrongField("a string")
    return value


def nothing(value: Any) -> None:
    if value is not None:
        raise WrongField("null (the tensor has no base)")


def natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise WrongField("a whole number from 0")
    return value


def positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise WrongField("a whole number from 1")
    return value


def number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e300:  # NaN and Infinity out, too
        raise WrongField("a number from 0")
    return float(value)


def finite(value: Any) -> float:
    if type(value) not in (int, float) or not -1e300 < value < 1e300:
        raise WrongField("a finite number")
    return float(value)


def naturals(value: Any) -> list[int]:
    return [natural(item) for item in array(value)]


def strings(value: Any) -> list[str]:
    return [string(item) for item in array(value)]


def string_map(value: Any) -> dict[str, str]:
    return {string(k): string(v) for k, v in mapping(value).items()}


def path(value: Any) -> str:
    return safe_path(string(value))


def matching(pattern: re.Pattern[str], words: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise WrongField(words)
        return value

    return check


digest = matching(re.compile(r"[0-9a-f]{64}"), "a hash of 64 hex digits")


def one_of(*values: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in values:
            raise WrongField(f"one of {', '.join(values)}")
        return str(value)

    return check


def optional(check: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else check(value)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def bad_manifest(where: str, what: str) -> BadManifest:
    return BadManifest(
        f"{where}: {what}",
        next_step="The delta is damaged; ask its author to push it again.",
    )
