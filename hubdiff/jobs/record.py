"""What a result says of itself: its record and the message of its commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hubdiff._version import __version__
from hubdiff.checkpoint import MANIFEST
from hubdiff.facts import facts
from hubdiff.files import FileTree
from hubdiff.hashing import hash_bytes
from hubdiff.manifest import WrittenFile
from hubdiff.pair import Filters
from hubdiff.plan import OWN_BASE, MergePlan, Weighted, WholeFile
from hubdiff.verdict import Verdict


def result_record(
    plan: MergePlan,
    filters: Filters,
    command: Sequence[str] | None,
    files: Sequence[WrittenFile],
    verdict: Verdict | None,
) -> dict[str, Any]:
    """What goes into the file of a result that says how it was made; ``files`` are those written
    here, with their hashes, ``verdict`` that on the target (None: on the own base)."""
    target, described = facts(plan.target.tree), plan.as_json()
    return {
        "hubdiff_version": __version__,
        "case": plan.case,
        "reason": plan.reason,
        "scale": described["scale"],
        "method": described["method"],
        "filters": asdict(filters) if filters else None,
        "check": verdict and verdict.as_json(),
        "deltas": [_described(item) for item in plan.deltas],
        "target": {
            **_identity(plan.target.tree),
            "licence": target.licence,
            "gated": target.gated,
            "files": [_content(plan.target.tree, path) for path in plan.target.shards],
        },
        "command": list(command) if command else None,
        "side_files": [
            {"path": file.path, "source": _source(file, plan), "note": file.note}
            for file in plan.files
        ],
        "left_out": described["left_out"],
        "added": described["added"],
        "kept": described["kept"],
        "vocabulary": described["vocabulary"],
        "notes": described["notes"],
        "files": [asdict(file) for file in files],
    }


def result_message(plan: MergePlan) -> str:
    """The title of the commit."""
    names = [_identity(item.delta.tree)["name"] for item in plan.deltas]
    if plan.case == OWN_BASE:
        return f"Rebuild of {plan.deltas[0].delta.manifest.tuned.name} from {names[0]}"
    deltas = ", ".join(
        name if item.weight == 1 else f"{name} × {item.weight:g}"
        for name, item in zip(names, plan.deltas, strict=True)
    )
    method = f" ({plan.method})" if plan.method else ""
    scale = "" if plan.scale.one == 1.0 else f" at scale {plan.scale}"
    return f"{deltas} applied to {_identity(plan.target.tree)['name']}{method}{scale}"


def _source(file: WholeFile, plan: MergePlan) -> str:
    """Whose a side file is, in the words of the record."""
    source = {"target": "target", "delta": "tuned", "made": "merged"}[file.origin]
    owner = next((item.name for item in plan.deltas if item.delta is file.delta), None)
    return f"{source} ({owner})" if owner and len(plan.deltas) > 1 else source


def _described(item: Weighted) -> dict[str, Any]:
    """A delta, as the record has it."""
    tree, manifest = item.delta.tree, item.delta.manifest
    return {
        **_identity(tree),
        "manifest_sha256": hash_bytes(tree.read_bytes(MANIFEST)),
        "weight": item.weight,
        "base": _without_files(asdict(manifest.base)),
        "tuned": _without_files(asdict(manifest.tuned)),
    }


def _identity(tree: FileTree) -> dict[str, Any]:
    pin = tree.pin
    name = pin.repo or (pin.path.resolve().name if pin.path else "")
    return {"name": name, "repo": pin.repo, "revision": pin.ref.revision, "commit": pin.commit}


def _content(tree: FileTree, path: str) -> dict[str, Any]:
    """A file by size, and by sha256 where one is listed: a folder's weights are not read for it."""
    info = tree.files()[path]
    return {"path": path, "size": info.size, "sha256": info.sha256}


def _without_files(side: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in side.items() if k not in ("files", "side_files")}
