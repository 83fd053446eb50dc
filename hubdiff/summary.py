"""The numbers of a delta, added up from its manifest: what cards and ``inspect`` show.

Nothing here is estimated; every number was measured when the delta was made. Sizes are bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubdiff.picture import relative_norm

_WEIGHTS = ("weights", "adapter")


@dataclass(frozen=True)
class Summary:
    """``portable_bytes`` and ``exact_bytes`` are the two layers on disk; ``tuned_bytes`` the tuned
    model's weight files. ``encodings`` is bytes of payload by encoding. ``changed`` … ``removed``
    count tensors; ``unchanged_share`` is the share of elements, of all tensors both sides have,
    whose bits are the same. ``relative_norm`` is ‖Δ‖/‖base‖ over those tensors. None: not known."""

    portable_bytes: int
    exact_bytes: int
    tuned_bytes: int
    encodings: dict[str, int]
    changed: int
    unchanged: int
    added: int
    removed: int
    unchanged_share: float | None
    relative_norm: float | None

    @property
    def delta_bytes(self) -> int:
        return self.portable_bytes + self.exact_bytes

    @property
    def size_share(self) -> float | None:
        """Delta over tuned weights."""
        return self.delta_bytes / self.tuned_bytes if self.tuned_bytes else None


def summarise(manifest: Mapping[str, Any]) -> Summary:
    """Add up a manifest. Missing parts count as nothing, so an older or partial one works too."""
    tensors = list(_items(manifest, "tensors"))
    common = [tensor for tensor in tensors if tensor.get("base_dtype") is not None]
    changed = [tensor for tensor in common if tensor.get("changed")]
    elements = sum(math.prod(tensor.get("shape") or ()) for tensor in common)
    touched = sum(tensor.get("changed") or 0 for tensor in common)
    layers = manifest.get("layers") or {}
    tuned = manifest.get("tuned") or {}
    return Summary(
        portable_bytes=_size([*_items(layers, "delta"), *_items(layers, "tail")]),
        exact_bytes=_size(_items(layers, "exact")),
        tuned_bytes=_size([f for f in _items(tuned, "files") if f.get("source") in _WEIGHTS]),
        encodings=_encodings(tensors),
        changed=len(changed),
        unchanged=len(common) - len(changed),
        added=len(tensors) - len(common),
        removed=len(manifest.get("removed") or ()),
        unchanged_share=1 - touched / elements if elements else None,
        relative_norm=relative_norm(common) if common else None,
    )


def _items(holder: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    return holder.get(name) or ()


def _size(files: Sequence[Mapping[str, Any]]) -> int:
    return sum(file.get("size") or 0 for file in files)


def _encodings(tensors: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of payload by encoding, all layers together, the largest first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        for part in _items(tensor, "parts"):
            sizes[str(part.get("encoding"))] += part.get("bytes") or 0
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def size_text(size: float) -> str:
    """Bytes for people, in powers of 1000 as the Hub shows them: ``1.7 GB``."""
    if size < 1000:
        return f"{size:.0f} byte{'s' * (round(size) != 1)}"
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5:  # from here on three digits would say 1e+03
            return f"{size:.3g} {unit}"
    return f"{size:.0f} TB"


def percent(share: float) -> str:
    """A share as a percentage, three digits; never rounded to the ``0 %`` or ``100 %`` it isn't."""
    if 0.9995 < share < 1:
        return f"{100 * share:.4f} %" if share < 0.999999 else "over 99.9999 %"
    return f"{100 * share:.3g} %"
