"""Text that others wrote, put safely into Markdown: names, reasons, refs from manifests and cards.

Each function returns Markdown that shows its argument and does nothing else: no HTML, no link, no
table cell, heading or fence opens or closes because of what a name contains.
"""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote

# Always: \ ` * [ ] < > & | ~ $. "_" unless inside a word, ":" before "//" (a bare link), and what
# starts a block (heading, list, quote, rule) at the beginning.
_SPECIAL = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<!.)[#+=-]")
_NUMBERED = re.compile(r"\A(\d{1,9})([.)])(?!\S)")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def one_line(value: str) -> str:
    """``value`` without line breaks, control characters or invisible marks that reorder text."""
    return "".join(
        " " if char.isspace() else "" if unicodedata.category(char)[0] == "C" else char
        for char in value
    ).strip()


def text(value: object) -> str:
    """Running text: every character that means something in Markdown where it stands is escaped,
    so that ordinary words stay legible in the source too."""
    return _NUMBERED.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", one_line(str(value))))


def code(value: object) -> str:
    """An inline code span, whatever backticks or pipes the text holds; usable in table cells."""
    shown = one_line(str(value)).replace("|", "\\|")
    if not shown:
        return "(empty)"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown[0] == "`" or shown[-1] == "`" else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def block(content: str, language: str = "") -> str:
    """A fenced block that its content can't leave."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", content)), default=0))
    return f"{fence}{language}\n{content}\n{fence}"


def is_repo_id(name: object) -> bool:
    """Whether ``name`` is spelled like a repo of the Hub, so that it may go into links and
    metadata."""
    return isinstance(name, str) and len(name) <= 200 and _REPO.fullmatch(name) is not None


def repo_link(repo: str, commit: str | None = None) -> str:
    """A link to a repo, at its commit where there is one; a mere name when it is not a repo id."""
    if not is_repo_id(repo):
        return code(repo)
    if commit is None or not _COMMIT.fullmatch(commit):
        return f"[{code(repo)}](https://huggingface.co/{quote(repo)})"
    tree = f"https://huggingface.co/{quote(repo)}/tree/{commit}"
    return f"[{code(repo)}]({tree}) at commit `{commit[:12]}`"
