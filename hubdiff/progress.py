"""How long work tells its caller how far it is. The library never prints; the CLI draws."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def start(self, what: str, total: int, unit: str = "") -> None:
        """A phase begins; ``total`` is in bytes, or in a ``unit`` of many ("steps")."""

    def advance(self, count: int) -> None:
        """``count`` more of them are done. Called from one thread."""

    def finish(self) -> None:
        """The phase is over."""

    def note(self, text: str) -> None:
        """Something the user should know, in a sentence."""


class Silent:
    """No one is watching."""

    def start(self, what: str, total: int, unit: str = "") -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass
