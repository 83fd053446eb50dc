"""inspect: what a delta is, from its manifest alone. Never imports torch, nor numpy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hubdiff.files import open_tree
from hubdiff.manifest import Manifest, manifest_json, read_manifest, side_json
from hubdiff.picture import LayerRow, group_by_layer
from hubdiff.refs import ModelRef
from hubdiff.summary import Summary, summarise


@dataclass(frozen=True)
class Inspection:
    """A delta described. ``delta`` is where it was read, pinned to a commit; ``manifest`` is all it
    says of itself; ``summary`` and ``layers`` are that added up, in bytes and ‖Δ‖/‖base‖."""

    delta: str
    manifest: Manifest

    @cached_property
    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(manifest_json(self.manifest))
        return document

    @property
    def summary(self) -> Summary:
        return summarise(self._document)

    @property
    def layers(self) -> list[LayerRow]:
        return group_by_layer(self._document["tensors"])

    def as_json(self) -> dict[str, Any]:
        manifest, summary = self.manifest, self.summary
        return {
            "delta": self.delta,
            "hubdiff_version": manifest.hubdiff_version,
            "base": side_json(manifest.base),
            "tuned": side_json(manifest.tuned),
            "master": side_json(manifest.master) if manifest.master else None,
            "portable": manifest.not_portable_reason is None,
            "not_portable_reason": manifest.not_portable_reason,
            "rebuilds_tuned": manifest.no_rebuild_reason is None,
            "adapter": manifest.adapter is not None,
            "lossy": manifest.lossy and asdict(manifest.lossy),
            "filters": manifest.filters,
            "bytes": {
                "delta": summary.delta_bytes,
                "portable": summary.portable_bytes,
                "exact": summary.exact_bytes,
                "tuned_weights": summary.tuned_bytes,
                "encodings": summary.encodings,
            },
            "tensors": {
                "changed": summary.changed,
                "unchanged": summary.unchanged,
                "added": [record.name for record in manifest.tensors if record.added],
                "removed": list(manifest.removed),
            },
            "unchanged_share": summary.unchanged_share,
            "relative_norm": summary.relative_norm,
            "layers": [asdict(row) for row in self.layers],
            "rename": asdict(manifest.rename) if manifest.rename else None,
            "aliases": manifest.aliases,
            "not_carried": [asdict(file) for file in manifest.not_carried],
            "provenance": manifest.provenance,
        }


def inspect(delta: str | Path, *, cache: bool = False) -> Inspection:
    """Describe the delta at a ref or in a folder. Reads its manifest, no weights. ``cache`` keeps
    what is downloaded in the local Hub cache. Raises ``HubError``, ``NotADelta``, ``NewerFormat``
    or ``BadManifest``."""
    tree = open_tree(ModelRef.parse(delta), cache=cache)
    return Inspection(str(tree.pin), read_manifest(tree))
