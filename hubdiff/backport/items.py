"""Items: one delta to be put on one base. They travel from stage to stage as JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubdiff.backport.config import DeltaPolicy, Evaluation, Gate, Publish
from hubdiff.errors import HubdiffError
from hubdiff.writer import write_whole

PLAN_VERSION = 1
RECYCLE, BACKPORT = "recycle", "backport"
# What `run` leaves of an item, for the stages after it: they decide and publish, and load none of
# what makes deltas.
RESULT, DELTA = "result.json", "delta"
RAN, REFUSED, FAILED = "ran", "refused", "failed"
DELTA_KIND = "delta"
_ID = re.compile(r"[0-9a-f]{12}")
_MOST_BYTES = 64 << 20  # of a plan or a result


@dataclass(frozen=True)
class Item:
    """``source`` is the delta and ``base`` what it is put on, both ``org/name@commit``; ``weights``
    the digest of the base's. ``direction``: recycle, onto a newer base than the delta's own, or
    backport. ``settings`` is a digest of all that decides about it; ``attempt`` counts from 1."""

    key: str
    family: str
    delta: str
    source: str
    base: str
    weights: str
    direction: str
    scales: tuple[float, ...]
    evaluation: Evaluation
    gate: Gate
    publish: Publish
    settings: str
    disk_gb: float
    attempt: int = 1

    @property
    def id(self) -> str:
        """Short enough for the name of a branch and a job."""
        return self.key[:12]

    @property
    def branch(self) -> str:
        """Where it goes in its repo on the Hub, always the same."""
        return f"hubdiff/{self.id}"

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}


def item_key(source: str, weights: str) -> str:
    """Of content alone: the same delta on the same weights is the same item, whatever either is
    called and wherever a card was edited."""
    return hashlib.sha256(f"{source.partition('@')[2]} {weights}".encode()).hexdigest()


def weights_digest(files: Mapping[str, str]) -> str | None:
    """Of a model's safetensors files, path → sha256; None where it has none."""
    weights = sorted((p, sha) for p, sha in files.items() if p.endswith(".safetensors"))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest() if weights else None


def settings_digest(delta: DeltaPolicy) -> str:
    """Of what decides about an item: when it changes, what was rejected or failed begins anew."""
    parts = [delta.scales, asdict(delta.evaluation), asdict(delta.gate), asdict(delta.publish)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object that a stage before wrote. Raises ``HubdiffError``."""
    try:
        if path.is_symlink() or path.stat().st_size > _MOST_BYTES:
            raise HubdiffError(f"{path} is no file that hubdiff wrote")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise HubdiffError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise HubdiffError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("version") != PLAN_VERSION:
        raise HubdiffError(
            f"{path} is not of version {PLAN_VERSION}",
            next_step="Let the same version of hubdiff write and read it.",
        )
    return document


def write_document(results: str | Path, item: str, name: str, content: Mapping[str, Any]) -> None:
    """A JSON file of an item's folder. Raises ``HubdiffError``."""
    text = json.dumps({"version": PLAN_VERSION, **content}, indent=2)
    write_whole(Path(results) / item / name, (text + "\n").encode())


def item_of(value: Any, where: str) -> Item:
    """An item out of JSON, checked: it may come from a job that ran somebody's code. Raises
    ``HubdiffError``."""
    try:
        fields = {name: kind for name, kind in value.items() if name != "id"}
        item = Item(
            **{
                **fields,
                "scales": tuple(map(float, fields["scales"])),
                "evaluation": Evaluation(
                    **{**fields["evaluation"], "tasks": tuple(fields["evaluation"]["tasks"])}
                ),
                "gate": Gate(**fields["gate"]),
                "publish": Publish(**fields["publish"]),
            }
        )
        texts = (item.family, item.delta, item.source, item.base, item.weights, item.settings)
        sound = all(isinstance(text, str) for text in texts)
        right = item.key == item_key(item.source, item.weights)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise HubdiffError(f"{where} holds an item that can't be read: {error!r}") from error
    if not (sound and right):
        raise HubdiffError(f"{where} holds an item whose key is not that of its content")
    return item


def planned_item(plan: Path, wanted: str) -> Item:
    """The item of a plan with the id ``wanted``. Raises ``HubdiffError``."""
    listed = read_document(plan).get("items")
    if not isinstance(listed, list):
        raise HubdiffError(
            f"{plan} is no plan", next_step="hubdiff watch --output FILE writes one."
        )
    items = [item_of(value, str(plan)) for value in listed]
    if not _ID.fullmatch(wanted):
        raise HubdiffError(f"{wanted!r} is not the id of an item: 12 hex digits")
    found = next((item for item in items if item.id == wanted), None)
    if found is None:
        known = ", ".join(item.id for item in items) or "none"
        raise HubdiffError(f"{plan} has no item {wanted}", next_step=f"It has: {known}.")
    return found
