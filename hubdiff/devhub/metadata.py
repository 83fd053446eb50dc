"""What the Hub derives from a repo's files: its card, its tags, its safetensors summary."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n?---\s*(?:\n|\Z)", re.DOTALL)
MAX_HEADER_BYTES = 100 << 20


class BadCard(ValueError):
    pass


def parse_card(readme: str) -> dict[str, Any]:
    """The YAML at the top of a README; {} where there is none."""
    found = FRONT_MATTER.match(readme.replace("\r\n", "\n"))
    if found is None:
        return {}
    try:
        card = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise BadCard(str(error)) from None
    if not isinstance(card, dict):
        raise BadCard("the metadata must be a mapping")
    plain: dict[str, Any] = json.loads(json.dumps(card, default=str))
    return plain


def card_tags(card: dict[str, Any], paths: Iterable[str]) -> list[str]:
    """The card's own tags and those the Hub adds; lineage is searched through the last ones."""
    tags = [str(tag) for tag in _listed(card.get("tags"))]
    if library := card.get("library_name"):
        tags.append(str(library))
    if any(path.endswith(".safetensors") for path in paths):
        tags.append("safetensors")
    tags += [str(language) for language in _listed(card.get("language"))]
    tags += [f"dataset:{name}" for name in _listed(card.get("datasets"))]
    bases = _listed(card.get("base_model"))
    tags += [f"base_model:{base}" for base in bases]
    tags += [f"base_model:{relation(card)}:{base}" for base in bases]
    tags += [f"license:{name}" for name in _listed(card.get("license"))]
    tags.append("region:us")
    return list(dict.fromkeys(tags))


def relation(card: dict[str, Any]) -> str:
    """The card's word, or the Hub's guess: several bases are a merge, peft is an adapter."""
    if stated := card.get("base_model_relation"):
        return str(stated)
    if len(_listed(card.get("base_model"))) > 1:
        return "merge"
    return "adapter" if card.get("library_name") == "peft" else "finetune"


def base_models(card: dict[str, Any]) -> dict[str, Any] | None:
    bases = _listed(card.get("base_model"))
    if not bases:
        return None
    return {"relation": relation(card), "models": [{"id": base} for base in bases]}


def check_card(readme: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors, then warnings, as ``validate-yaml`` reports them."""
    try:
        card = parse_card(readme)
    except BadCard as error:
        return [f"YAML: {error}"], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for name in ("tags", "datasets", "base_model", "license", "language"):
        if not all(isinstance(item, str) for item in _listed(card.get(name))):
            errors.append(f'"{name}" must be a string or a list of strings')
    if repo_type == "model" and not isinstance(card.get("library_name", ""), str):
        errors.append('"library_name" must be a string')
    return errors, []


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def safetensors_header(read: Callable[[int, int], bytes]) -> dict[str, Any] | None:
    """The header of a safetensors file, through ``read(start, end)``; None if it has none."""
    start = read(0, 8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES:
        return None
    try:
        header = json.loads(read(8, 8 + length))
    except ValueError:
        return None
    return header if isinstance(header, dict) else None


def count_parameters(headers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for header in headers:
        for name, tensor in header.items():
            if name != "__metadata__":
                counts[tensor["dtype"]] += math.prod(tensor["shape"])
    return {"parameters": dict(counts), "total": counts.total()}
