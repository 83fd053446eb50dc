"""Plans and what jobs leave of their items, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hubdiff.backport.config import Evaluation, Gate, Publish
from hubdiff.backport.items import Item, item_key

COMMIT = "c" * 40


def make_item(
    number: int = 1,
    *,
    family: str = "toy",
    delta: str = "math",
    base: str = "org/base",
    mode: str = "branch",
    to: str | None = "me/ports",
    attempt: int = 1,
    **gate: Any,
) -> Item:
    source, weights = f"me/math-delta@{'a' * 40}", f"{number:064x}"
    return Item(
        item_key(source, weights),
        family,
        delta,
        source,
        f"{base}@{number:040x}",
        weights,
        "recycle",
        (0.6, 0.8, 1.0),
        Evaluation(("sums",)),
        Gate(**{"task": "sums", "min": 0.5, **gate}),
        Publish(to, "delta", mode),
        "5" * 64,
        14,
        attempt,
    )


def write_plan(folder: Path, *items: Item, adopt: tuple[Item, ...] = (), **more: Any) -> Path:
    document = {
        "version": 1,
        "config": "hubdiff.yaml",
        "items": [item.as_json() for item in items],
        "adopt": [item.as_json() for item in adopt],
        "waiting": 0,
        "skipped": [],
        "bases": {},
        "deltas": {},
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "plan.json"
    place.write_text(json.dumps(document))
    return place


def ran(one: Item, /, value: float = 0.7, base: float = 0.4, **more: Any) -> dict[str, Any]:
    """A result as ``run`` writes it."""
    return {
        "version": 1,
        "item": one.as_json(),
        "status": "ran",
        "why": None,
        "check": {"verdict": "go", "why": "the same layout", "findings": [], "forecast": None},
        "scale": 0.8,
        "scores": {
            "base": {"sums": {"value": base, "stderr": 0.02}},
            "result": {"sums": {"value": value, "stderr": 0.02}},
            "tuned": None,
        },
        "curve": [
            {"scale": 0.6, "value": value - 0.1},
            {"scale": 0.8, "value": value},
            {"scale": 1.0, "value": value - 0.05},
        ],
        "seconds": 1.5,
        **more,
    }


def published(item: Item, hub: str = "https://huggingface.co", **more: Any) -> dict[str, Any]:
    to = item.publish.to
    return {
        "id": item.id,
        "to": to,
        "as": "delta",
        "mode": item.publish.mode,
        "branch": item.branch,
        "commit": COMMIT,
        "url": f"{hub}/{to}/tree/{COMMIT}",
        "pr_url": None,
        "reused": False,
        **more,
    }


def leave(results: Path, item: Item, **files: Any) -> Path:
    """Write RESULTS/ID; ``files`` by name without the ending, as documents, text or bytes."""
    folder = results / item.id
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / f"{name}.json").write_bytes(data)
    return folder


def leave_done(results: Path, item: Item, **more: Any) -> Path:
    return leave(results, item, result=ran(item, **more), published=published(item))
