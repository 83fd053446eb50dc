"""The manifest, ``hubdiff.json``: what a delta is made of, as typed values ⇄ JSON.

Parsing checks every field before anything else trusts it: types, hashes, paths, dtypes, shapes, and
that the parts fit together. Unknown fields are ignored, so that a minor addition stays readable; a
higher ``format_version`` is refused. FORMAT.md specifies the fields.
"""

from hubdiff.manifest.document import (
    FORMAT_VERSION,
    LAYERS,
    manifest_json,
    parse_manifest,
    read_manifest,
    side_json,
)
from hubdiff.manifest.records import (
    GROUPS,
    LOW_RANK,
    PROBE_BYTES,
    AdapterTensor,
    FileRecord,
    Lossy,
    LowRank,
    MadeFile,
    Manifest,
    NotCarried,
    Part,
    Side,
    TensorRecord,
    TunedFile,
    WrittenFile,
    sampled_counts,
    written_file,
)

__all__ = [
    "FORMAT_VERSION",
    "GROUPS",
    "LAYERS",
    "LOW_RANK",
    "PROBE_BYTES",
    "AdapterTensor",
    "FileRecord",
    "Lossy",
    "LowRank",
    "MadeFile",
    "Manifest",
    "NotCarried",
    "Part",
    "Side",
    "TensorRecord",
    "TunedFile",
    "WrittenFile",
    "manifest_json",
    "parse_manifest",
    "read_manifest",
    "sampled_counts",
    "side_json",
    "written_file",
]
