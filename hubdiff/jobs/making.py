"""A delta in the making: everything that its repo holds, from the layers to the manifest."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hubdiff._version import __version__
from hubdiff.adapter import CONFIG, Adapter
from hubdiff.card import PICTURE, delta_card
from hubdiff.checkpoint import MANIFEST, Checkpoint
from hubdiff.errors import NotWorthIt
from hubdiff.extract import Extracted, extract
from hubdiff.facts import facts
from hubdiff.files import FileTree
from hubdiff.floats import BYTES
from hubdiff.hashing import check_hash, hash_bytes
from hubdiff.jobs.together import hand_in
from hubdiff.manifest import (
    FileRecord,
    Lossy,
    Manifest,
    NotCarried,
    Side,
    TensorRecord,
    TunedFile,
    manifest_json,
)
from hubdiff.names import HEADS
from hubdiff.pair import Pair
from hubdiff.picture import layer_picture
from hubdiff.progress import Progress
from hubdiff.provenance import code_provenance
from hubdiff.ranks import Ranks
from hubdiff.refs import ModelRef
from hubdiff.rows import Cut, rest_hash, whole_name
from hubdiff.sample import FILE as SAMPLE
from hubdiff.sample import Sample, choose, encode
from hubdiff.sidecars import NotCarried as StaysBehind
from hubdiff.sidecars import classify
from hubdiff.summary import percent, size_text
from hubdiff.vocab import BASE_FILE as BASE_VOCABULARY
from hubdiff.vocab import FILE as VOCABULARY
from hubdiff.vocab import pack, same_vocabulary, vocabulary_of
from hubdiff.writer import Sink

if TYPE_CHECKING:
    from hubdiff.truncate import Truncation

DELTA_INDEX = "delta.safetensors.index.json"
# From this share of the compressed model on a delta is published only with ``force``. One of a few
# megabytes is a toy's, and costs nobody anything.
WORTH = 0.9
_NOT_ASKED = 16 << 20
BASE_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")


def name_of(tree: FileTree) -> str:
    """What people call a model: its repo, or the folder's own name (never its path)."""
    if tree.pin.repo is not None:
        return tree.pin.repo
    assert tree.pin.path is not None
    return tree.pin.path.resolve().name


class Making:
    """One delta in the making: fills a sink, remembers what went in."""

    def __init__(
        self,
        pair: Pair,
        adapter: Adapter | None,
        cuts: dict[str, Cut],
        sink: Sink,
        destination: ModelRef,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self._pair, self._adapter, self._cuts, self._sink = pair, adapter, cuts, sink
        self._destination, self._progress = destination, progress
        self._ranks = ranks
        self._sample = _choose_sample(pair, adapter)
        self._picture = b""
        self._same_tokens = False
        self.files: list[FileRecord] = []

    def run(self, plain: bool, truncation: Truncation | None, force: bool) -> Manifest | None:
        """The manifest; on other ranks than the first None."""
        if len(self._pair.tuned.shards) < self._ranks.size:
            self._progress.note(
                f"{len(self._pair.tuned.shards)} of the {self._ranks.size} ranks have work: a file "
                "of tuned is compared by one rank"
            )
        extracted, lossy = self._extract(plain, truncation)
        if not (force or plain or truncation or self._adapter or self._pair.master):
            _check_worth(extracted)
        for files in extracted.layers.values():
            for record in files:
                if record.path in extracted.here:
                    self._sink.finish(record)
                self.files.append(record)
        hand_in(self._ranks, self._sink, None, "storing the delta")
        return self._describe(extracted, lossy) if self._ranks.first else None

    def _describe(self, extracted: Extracted, lossy: Lossy | None) -> Manifest:
        """All that is no layer: side files, card and picture, and the manifest last."""
        if extracted.weight_map:
            self._put(DELTA_INDEX, _index(extracted))
        self._put(SAMPLE, _sample_file(self._sample, extracted))
        self._put_vocabulary()
        tuned_files, not_carried = self._tuned_side_files()
        self._base_configs()
        manifest = replace(self._manifest(extracted, tuned_files, not_carried), lossy=lossy)
        text = manifest_json(manifest)
        if not self._picture:
            self._draw(extracted.tensors)
        self._put(PICTURE, self._picture)
        self._put("README.md", self._card(json.loads(text)))
        self._put(MANIFEST, text.encode())
        return manifest

    def _extract(
        self, plain: bool, truncation: Truncation | None
    ) -> tuple[Extracted, Lossy | None]:
        pair, folder, progress = self._pair, self._sink.staging, self._progress
        if self._adapter is None and truncation is None:
            extracted = extract(
                pair,
                folder,
                plain=plain,
                sample=self._sample,
                progress=progress,
                ranks=self._ranks,
                # Of several ranks none has all tensors then.
                meanwhile=self._draw if self._ranks.size == 1 else None,
            )
            return extracted, None
        from hubdiff.factored import extract_adapter, extract_truncated

        if self._adapter is not None:
            return extract_adapter(self._adapter, folder, self._sample, progress), None
        assert truncation is not None
        return extract_truncated(pair, folder, truncation, self._sample, progress)

    def _draw(self, tensors: Sequence[TensorRecord]) -> None:
        file = io.BytesIO()
        layer_picture((asdict(record) for record in tensors), file)
        self._picture = file.getvalue()

    def _put(self, path: str, data: bytes) -> FileRecord:
        record = self._sink.put(path, data)
        self.files.append(record)
        return record

    def _put_vocabulary(self) -> None:
        """Which token stands for which row of the tuned model, and of the base where it is another.
        An adapter's repo often has no tokenizer, and then its rows are those of the base."""
        tuned, base = self._pair.tuned.tree, self._pair.base.tree
        ours = vocabulary_of(tuned)
        theirs = ours if same_vocabulary(tuned, base) else vocabulary_of(base)
        if ours is None and self._adapter is not None:
            ours = theirs
        if ours is None:
            return
        self._put(VOCABULARY, pack(ours))
        self._same_tokens = theirs == ours
        if theirs is not None and not self._same_tokens:
            self._put(BASE_VOCABULARY, pack(theirs))

    def _tuned_side_files(self) -> tuple[list[TunedFile], list[NotCarried]]:
        """Store what tuned has besides its weights, unless the base has the very same file. An
        adapter's are all stored: it is exported without its base."""
        tree, base = self._pair.tuned.tree, self._pair.base.tree
        carried: list[TunedFile] = []
        not_carried: list[NotCarried] = []
        for path, info in sorted(tree.files().items()):
            if path in self._pair.tuned.shards:
                continue
            verdict = classify(path, info.size, self._pair.tuned.shards)
            if isinstance(verdict, StaysBehind) and not (self._adapter and path == CONFIG):
                not_carried.append(NotCarried(path, info.size, verdict.reason))
                continue
            data = tree.read_bytes(path)
            record = FileRecord(path, len(data), hash_bytes(data))
            check_hash(record.sha256, info.sha256, f"{tree.pin}/{path}")
            same = self._adapter is None and _is_same(record, base)
            if not same:
                self._put(f"tuned/{path}", data)
            carried.append(TunedFile(**vars(record), source="base" if same else "delta"))
        return carried, not_carried

    def _base_configs(self) -> None:
        """The base's configs: the third side of a three-way merge on another target."""
        base = self._pair.base.tree
        for path in BASE_CONFIGS:
            if path in base.files():
                self._put(f"base/{path}", base.read_bytes(path))

    def _manifest(
        self, extracted: Extracted, side: list[TunedFile], not_carried: list[NotCarried]
    ) -> Manifest:
        pair = self._pair
        weights = [
            TunedFile(
                **vars(record),
                source="adapter" if self._adapter else "weights",
                header=pair.tuned.shards[record.path].raw,
            )
            for record in extracted.weights
        ]
        folder = pair.tuned.tree.pin.path
        provenance = code_provenance(folder) if folder is not None else None
        return Manifest(
            hubdiff_version=__version__,
            base=replace(
                _side(pair.base), files=extracted.base_files, side_files=_side_files(pair.base)
            ),
            tuned=_side(pair.tuned),
            tuned_files=(*weights, *side),
            not_carried=tuple(not_carried),
            tensors=extracted.tensors,
            removed=pair.removed,
            layers=extracted.layers,
            side_files=tuple(
                record
                for record in self.files
                if record.path.startswith(("tuned/", "base/"))
                or record.path in (DELTA_INDEX, SAMPLE, VOCABULARY, BASE_VOCABULARY)
            ),
            rename=pair.rename,
            same_tokens=self._same_tokens,
            rows=self._rows(),
            aliases=_aliases(extracted.tensors),
            adapter=self._adapter.tensors if self._adapter else None,
            sample=self._sample,
            not_portable_reason=pair.not_portable_reason,
            filters=asdict(pair.filters) if pair.filters else None,
            master=_side(pair.master) if pair.master else None,
            provenance=asdict(provenance) if provenance else None,
            started_from=_started_from(pair.tuned),
        )

    def _rows(self) -> dict[str, Cut]:
        """Where the vocabulary is cut, with what tells the base's rows behind from any others."""
        base = self._pair.base
        return {
            name: cut if cut.base is None else replace(cut, rest=rest_hash(base, name, cut.shared))
            for name, cut in self._cuts.items()
            if self._pair.filters.takes(name)
        }

    def _card(self, document: dict[str, Any]) -> bytes:
        text = delta_card(
            document,
            repo=self._destination.repo,
            name=self._destination.path.name if self._destination.path else None,
            tuned_card=facts(self._pair.tuned.tree).card_data,
            base_card=facts(self._pair.base.tree).card_data,
        )
        return text.encode()


def _check_worth(extracted: Extracted) -> None:
    """Raise ``NotWorthIt`` where nearly as little would hold the whole model, which everybody can
    load. Dense deltas and masters are asked for by name and for other reasons than their size."""
    size = sum(part.bytes for record in extracted.tensors for part in record.parts)
    if size < _NOT_ASKED or size < WORTH * extracted.compressed:
        return
    raise NotWorthIt(
        f"the delta would have {size_text(size)}, {percent(size / extracted.compressed)} of the "
        f"{size_text(extracted.compressed)} that the whole model compresses to: training moved "
        "the weights too far for a delta to be small",
        next_step="Publish the whole model; or publish the delta all the same with --force, "
        "or a smaller, lossy one with --rank or --energy.",
    )


def _is_same(record: FileRecord, base: FileTree) -> bool:
    """Whether the base has this file. Small files have no listed hash, so sizes go first."""
    info = base.files().get(record.path)
    if info is None or info.size != record.size:
        return False
    return record.sha256 == (info.sha256 or hash_bytes(base.read_bytes(record.path)))


def _side(checkpoint: Checkpoint) -> Side:
    pin, known = checkpoint.tree.pin, facts(checkpoint.tree)
    return Side(
        name=name_of(checkpoint.tree),
        repo=pin.repo,
        revision=pin.ref.revision,
        commit=pin.commit,
        licence=known.licence,
        gated=known.gated,
    )


def _started_from(tuned: Checkpoint) -> Side | None:
    start = facts(tuned.tree).start
    if start is None:
        return None
    return Side(start.name, start.repo, None, start.commit, None, start.closed)


def _side_files(base: Checkpoint) -> tuple[FileRecord, ...]:
    """The base's side files by content: what the tune changed is told by comparing with them."""
    tree = base.tree
    return tuple(
        FileRecord(path, info.size, info.sha256 or hash_bytes(tree.read_bytes(path)))
        for path, info in sorted(tree.files().items())
        if path not in base.shards
        and not isinstance(classify(path, info.size, base.shards), StaysBehind)
    )


def _aliases(records: Sequence[TensorRecord]) -> dict[str, str]:
    """Output heads that are the input embedding, bit for bit, before and after the tune."""
    aliases = {}
    for head in records:
        if not whole_name(head.tuned_name).endswith(HEADS):
            continue
        for other in records:
            same = other.name != head.name and other.tuned == head.tuned is not None
            if same and other.shape == head.shape and head.base in (None, other.base):
                aliases[head.name] = other.name
                break
    return aliases


def _choose_sample(pair: Pair, adapter: Adapter | None) -> Sample:
    """The blocks of every tensor that has a Δ of numbers."""
    bases = (
        {name: factors.base.entry for name, factors in adapter.factors.items()} if adapter else {}
    )
    bases |= {p.name: p.base.entry for p in pair.tensors.values() if p.base and p.is_float}
    dtypes = {entry.dtype for entry in bases.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    return choose({name: entry.count for name, entry in bases.items()}, dtype)


def _sample_file(sample: Sample, extracted: Extracted) -> bytes:
    values = [extracted.sampled[name] for name in sample.blocks]
    base = b"".join(base64.b64decode(one.base) for one in values)
    delta = b"".join(base64.b64decode(one.delta) for one in values)
    patterns = np.frombuffer(base, f"<u{BYTES[sample.dtype]}"), np.frombuffer(delta, "<u2")
    return encode(sample, *patterns)


def _index(extracted: Extracted) -> bytes:
    parts = (record.part("delta") for record in extracted.tensors)
    total = sum(part.bytes for part in parts if part)
    index = {"metadata": {"total_size": total}, "weight_map": extracted.weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
