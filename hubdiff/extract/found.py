"""What a comparison found: of one file of the tuned model, as ranks tell each other, and of all."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

from hubdiff.layers import LayerFile
from hubdiff.manifest import FileRecord, Part, TensorRecord


@dataclass(frozen=True)
class Sampled:
    """The values at a tensor's blocks of the sample: patterns of the base in the sample's dtype, of
    Δ in BF16, in base64 so that ranks can tell each other."""

    base: str
    delta: str

    @classmethod
    def of(cls, base: bytes, delta: bytes) -> Sampled:
        return cls(*(base64.b64encode(data).decode() for data in (base, delta)))


@dataclass(frozen=True)
class Extracted:
    """What ``extract`` found and wrote. ``weights`` are the tuned shards, ``base_files`` the
    base's, by content; ``compressed`` is about how many bytes the tuned tensors themselves would
    take in the encodings of deltas; ``sampled`` is by the base's names. Of the ``layers``, the
    files that are ``here`` were written by this rank; all the rest is the same on every rank."""

    tensors: tuple[TensorRecord, ...]
    layers: dict[str, tuple[FileRecord, ...]]
    weight_map: dict[str, str]
    weights: tuple[FileRecord, ...]
    base_files: tuple[FileRecord, ...]
    here: frozenset[str]
    compressed: int
    sampled: dict[str, Sampled]


Layers = dict[str, tuple[LayerFile, ...]]  # by group


@dataclass(frozen=True)
class Compared:
    """One file of the tuned model: by content, its tensors, and their layers once these are
    finished."""

    weights: FileRecord
    tensors: tuple[TensorRecord, ...]
    compressed: int
    sampled: dict[str, Sampled]
    layers: Layers = field(default_factory=dict)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Compared:
        return cls(
            FileRecord(**document["weights"]),
            tuple(_tensor(record) for record in document["tensors"]),
            document["compressed"],
            {name: Sampled(**values) for name, values in document["sampled"].items()},
            {
                group: tuple(
                    LayerFile(FileRecord(**file["record"]), tuple(file["tensors"]))
                    for file in files
                )
                for group, files in document["layers"].items()
            },
        )


def _tensor(document: dict[str, Any]) -> TensorRecord:
    parts = tuple(Part(**{**p, "layers": tuple(p["layers"])}) for p in document["parts"])
    return TensorRecord(**{**document, "shape": tuple(document["shape"]), "parts": parts})
