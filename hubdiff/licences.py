"""Licences that a delta or a result inherits, ranked and worded: a help for readers, not legal
advice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

UNKNOWN = "unknown"

# Least to most restrictive, as the Hub spells licences. A licence not listed ranks with "other":
# custom terms, to be read. No licence at all ranks last: nothing is granted.
_ORDER = (
    *("cc0-1.0", "unlicense", "wtfpl", "pddl", "mit-0", "0bsd"),
    *("mit", "isc", "zlib", "bsd*", "bsl-1.0", "ncsa", "postgresql", "artistic-2.0", "ms-pl"),
    *("ecl-2.0", "afl-3.0", "apache-2.0", "cdla-permissive*", "cc-by-[234].*", "odc-by"),
    *("mpl-2.0", "lgpl*", "epl*", "eupl*", "ofl-1.1", "cdla-sharing*", "lppl*"),
    *("cc-by-sa*", "odbl", "osl-3.0", "gpl*", "agpl*"),
    *("*openrail*", "*-rail-*"),
    *("cc-by-nd*", "fair-noncommercial-research-license", "cc-by-nc*", "*amlr", "intel-research"),
    *("gemma", "llama*", "other"),
    UNKNOWN,
)

# What a card on the Hub may say for ``license``; any other id makes it refuse the card.
_HUB_IDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown
unlicense wtfpl zlib
"""
HUB_LICENCES = frozenset(_HUB_IDS.split())


def strictest(licences: Iterable[str | None]) -> str:
    """The most restrictive of some licences, as its owner spells it; ``None`` and an empty list
    count as ``"unknown"``, the strictest of all. A card may list several, separated by commas."""
    names = [name.strip() for text in licences for name in (text or UNKNOWN).split(",")]
    return max((name or UNKNOWN for name in names), key=_rank, default=UNKNOWN)


def _rank(licence: str) -> int:
    name = licence.lower()
    matches = (i for i, pattern in enumerate(_ORDER) if fnmatchcase(name, pattern))
    return next(matches, _ORDER.index("other"))


@dataclass(frozen=True)
class Side:
    """One thing that licences are inherited from: how a sentence calls it ("base"), its licence,
    and whether its terms must be accepted on the Hub."""

    name: str
    licence: str | None
    gated: bool = False


def licence_note(sides: Sequence[Side]) -> str:
    """Plain words on what ``sides`` hand down, gating included."""
    if not sides:
        return "No licence is stated for what this was made from."
    strict = strictest(side.licence for side in sides)
    if strict != UNKNOWN and len({side.licence for side in sides}) == 1:
        words = [f"{_list(sides)} {_are(sides)} under {_name(strict)}; so is this."]
    else:
        each = [f"the {side.name} is {_under(side.licence)}" for side in sides]
        words = [f"T{_and(each)[1:]}; the terms of each apply."]
        if strict == UNKNOWN:
            words.append("Where no licence is stated, ask the owner before you use or share it.")
        else:
            words.append(f"The strictest is {_name(strict)}.")
    gated = [side for side in sides if side.gated]
    if gated:
        words.append(
            f"{_list(gated)} {_are(gated)} gated: accept the terms on the Hub first. "
            "They hold here too."
        )
    return " ".join(words)


def _list(sides: Sequence[Side]) -> str:
    return f"T{_and([f'the {side.name}' for side in sides])[1:]}"


def _are(sides: Sequence[Side]) -> str:
    return "is" if len(sides) == 1 else "are"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def _under(licence: str | None) -> str:
    if licence is None or licence == UNKNOWN:
        return "without a stated licence"
    return f"under {_name(licence)}"


def _name(licence: str) -> str:
    return "a licence of its own (other)" if licence == "other" else licence


# --- what must be said with every copy, and what does not go together ---------------------------

# Of Meta's licences, the name under which each is granted.
_LLAMAS = {
    "llama2": "Llama 2 is licensed under the LLAMA 2 Community License",
    "llama3": "Meta Llama 3 is licensed under the Meta Llama 3 Community License",
    "llama3.1": "Llama 3.1 is licensed under the Llama 3.1 Community License",
    "llama3.2": "Llama 3.2 is licensed under the Llama 3.2 Community License",
    "llama3.3": "Llama 3.3 is licensed under the Llama 3.3 Community License",
    "llama4": "Llama 4 is licensed under the Llama 4 Community License",
}
_GEMMA = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)
# Licences that let nobody add a restriction, and those that do restrict use.
_FREE = ("gpl*", "agpl*", "cc-by-sa*")
_RESTRICTING = ("*openrail*", "*-rail-*", "cc-by-nc*", "cc-by-nd*", "*amlr", "gemma", "llama*")
_NO_DERIVATIVES = ("cc-by-nd*", "cc-by-nc-nd*")
# Each wants what is made of it under itself; two of different families can't both have that.
_SHARE_ALIKE = {"gpl-2.0": "GPL 2", "gpl*": "GPL", "agpl*": "GPL", "cc-by-sa*": "CC BY-SA"}
_SHARE_ALIKE |= {"cc-by-nc-sa*": "CC BY-NC-SA", "odbl": "ODbL", "osl-3.0": "OSL"}


def notices(licences: Iterable[str | None]) -> list[str]:
    """What some licences ask to be said with every copy, word for word; those known here."""
    found: dict[str, None] = {}
    for licence in _each(licences):
        if licence in _LLAMAS:
            granted = f"{_LLAMAS[licence]}, Copyright © Meta Platforms, Inc. All Rights Reserved."
            found |= dict.fromkeys(
                [granted] if licence == "llama2" else ["Built with Llama", granted]
            )
        if licence == "gemma":
            found[_GEMMA] = None
    return list(found)


def conflicts(sides: Sequence[Side]) -> list[str]:
    """Terms among ``sides`` that contradict each other, in words. hubdiff resolves none of them."""
    known = [(side.name, licence) for side in sides for licence in _each([side.licence])]
    found: dict[str, None] = {}
    for name, licence in known:
        if _like(licence, _NO_DERIVATIVES):
            found[f"the {name} is under {licence}, which forbids sharing what is made of it"] = None
    for name, licence in known:
        for other, second in known:
            if _like(licence, _FREE) and _like(second, _RESTRICTING):
                found[
                    f"the {name} is under {licence}, which allows no further restrictions, and the "
                    f"{other} is under {second}, which makes some"
                ] = None
    families = {_family(licence): (name, licence) for name, licence in known if _family(licence)}
    if len({name for name, _ in families.values()}) > 1:
        each = _and([f"the {name} ({licence})" for name, licence in families.values()])
        found[f"{each} each want what is made of them under their own licence"] = None
    return list(found)


def _each(licences: Iterable[str | None]) -> list[str]:
    names = [name.strip().lower() for text in licences for name in (text or "").split(",")]
    return [name for name in dict.fromkeys(names) if name]


def _like(licence: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(licence, pattern) for pattern in patterns)


def _family(licence: str) -> str | None:
    return next((f for pattern, f in _SHARE_ALIKE.items() if fnmatchcase(licence, pattern)), None)
