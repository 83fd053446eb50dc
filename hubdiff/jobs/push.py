"""push-delta: Δ = tuned − base, published as a repo or a folder of its own."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hubdiff._version import __version__
from hubdiff.adapter import CONFIG, Adapter, is_adapter, open_adapter, place_adapter
from hubdiff.card import PICTURE, delta_card
from hubdiff.checkpoint import MANIFEST, Checkpoint, open_checkpoint, read_json
from hubdiff.errors import CannotDiff, NotWorthIt, RefError
from hubdiff.extract import Extracted, extract
from hubdiff.facts import RepoFacts, facts, keeps_private, note_problems
from hubdiff.files import FileTree
from hubdiff.floats import BYTES
from hubdiff.hashing import check_hash, hash_bytes
from hubdiff.jobs.together import conclude, glimpse, hand_in, open_alike, publish
from hubdiff.manifest import (
    FileRecord,
    Lossy,
    Manifest,
    NotCarried,
    Side,
    TensorRecord,
    TunedFile,
)
from hubdiff.names import HEADS
from hubdiff.pair import Filters, Pair, pair_models
from hubdiff.picture import layer_picture, prepare
from hubdiff.progress import Progress, Silent
from hubdiff.provenance import code_provenance
from hubdiff.ranks import ALONE, Ranks
from hubdiff.refs import ModelRef
from hubdiff.rows import Cut, cut_models, rest_hash, whole_name
from hubdiff.sample import FILE as SAMPLE
from hubdiff.sample import Sample, choose, encode
from hubdiff.sidecars import NotCarried as StaysBehind
from hubdiff.sidecars import classify
from hubdiff.summary import percent, size_text
from hubdiff.vocab import BASE_FILE as BASE_VOCABULARY
from hubdiff.vocab import FILE as VOCABULARY
from hubdiff.vocab import pack, same_vocabulary, vocabulary_of
from hubdiff.writer import DELTA, Published, Sink, open_sink

if TYPE_CHECKING:
    from hubdiff.truncate import Truncation

DELTA_INDEX = "delta.safetensors.index.json"
# From this share of the compressed model on a delta is published only with ``force``. One of a few
# megabytes is a toy's, and costs nobody anything.
WORTH = 0.9
_NOT_ASKED = 16 << 20
BASE_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Pushed:
    """What push-delta did, or with ``dry_run`` would do (sizes of the delta are then unknown).
    ``where`` is the repo or folder; ``url`` the commit's page, ``pr_url`` the pull request's."""

    where: str
    base: str
    tuned: str
    dry_run: bool
    tuned_bytes: int
    base_bytes: int
    files: tuple[FileRecord, ...] = ()
    seconds: float = 0.0
    url: str | None = None
    commit: str | None = None
    pr_url: str | None = None
    manifest: Manifest | None = None

    @property
    def delta_bytes(self) -> int:
        """Bytes of the layer files."""
        if self.manifest is None:
            return 0
        return sum(file.size for files in self.manifest.layers.values() for file in files)

    def as_json(self) -> dict[str, Any]:
        document = {
            "where": self.where,
            "base": self.base,
            "tuned": self.tuned,
            "dry_run": self.dry_run,
            "read": {"tuned": self.tuned_bytes, "base": self.base_bytes},
        }
        if not self.dry_run:
            lossy = self.manifest.lossy if self.manifest else None
            document |= {
                "delta_bytes": self.delta_bytes,
                "error": lossy and lossy.error,
                "files": [asdict(file) for file in self.files],
                "seconds": round(self.seconds, 3),
                "url": self.url,
                "commit": self.commit,
                "pr_url": self.pr_url,
            }
        return document


def push_delta(
    tuned: str | Path,
    repo: str | Path,
    *,
    base: str | Path | None = None,
    plain: bool = False,
    tuned_master: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    private: bool = False,
    public: bool = False,
    pr: bool = False,
    force: bool = False,
    cache: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Pushed:
    """Publish Δ = ``tuned`` − ``base`` as ``repo``.

    Args:
        tuned, base: refs (``org/name``, ``org/name@revision``, ``hf://…``) or folders. ``base``
            defaults to the ``base_model`` of tuned's card. ``tuned`` may be a LoRA adapter of PEFT:
            its factors are kept as they are, and ``base`` defaults to the one its config names.
        repo: where to publish; a path writes the same files into that folder instead.
        plain: dense tensors in the model's dtype instead of the packed encoding.
        tuned_master: the same fine-tune in float32; a better Δ for transfer at small learning
            rates. Own-base rebuilds still give ``tuned``, bit by bit.
        rank, energy: store matrices as the factors of a truncated SVD, of this rank or holding this
            share (between 0 and 1) of each matrix's ‖Δ‖². Smaller and lossy: such a delta adds and
            rebuilds nothing; the error is measured and recorded. One whole matrix is in memory.
        include, exclude: globs on base tensor names. Such a delta can't rebuild ``tuned``.
        private: make the repo private, if it is new.
        public: make it public also where base or tuned is gated or private. Without it such a
            delta is private, since whoever reads it has part of what was gated.
        force: replace a folder that exists; publish a delta that is hardly smaller than the model.
        cache: keep what is downloaded in the local Hub cache.
        ranks: the processes that share the work, each of which makes this call: under torchrun,
            what ``with hubdiff.ranks.join() as ranks`` gives. The bytes don't depend on how many
            there are. By default this process does all of it.

    Raises ``HubdiffError``. Peak memory does not depend on the size of the models.
    """
    began = time.monotonic()
    progress = ranks.watched(progress or Silent())
    truncation = _truncation(rank, energy, plain)
    destination = ModelRef.parse(repo)
    cache = cache and not dry_run  # a dry run reads no weights
    trees = _open_trees(tuned, base, tuned_master, cache, ranks)
    tuned_tree = trees[0]
    assert tuned_tree is not None
    adapted, filters = is_adapter(tuned_tree), Filters.of(include, exclude)
    if adapted and (truncation or plain or tuned_master is not None or filters):
        raise CannotDiff(
            f"{tuned_tree.pin} is an adapter, which is published whole and as it is",
            next_step="Leave out --rank, --energy, --plain, --tuned-master, --include and "
            "--exclude; apply can leave tensors out.",
        )
    if ranks.size > 1 and (adapted or truncation):
        raise CannotDiff(
            "a delta of factors (an adapter, --rank, --energy) is made by one process, and "
            f"torchrun started {ranks.size}",
            next_step="Run it without torchrun.",
        )
    with ExitStack() as stack:
        one = open_adapter(tuned_tree) if adapted else None
        if one is not None:
            stack.callback(one.close)
        one = one or stack.enter_context(open_checkpoint(tuned_tree))
        other, master = (
            stack.enter_context(open_checkpoint(tree)) if tree else None for tree in trees[1:]
        )
        assert other is not None
        adapter = place_adapter(one, other) if adapted else None
        cuts: dict[str, Cut] = {}
        if adapter is None:
            cut = cut_models(one, other, master)
            cuts = cut.cuts
        pair = adapter.pair if adapter else pair_models(cut.tuned, cut.base, cut.master, filters)
        plan = _plan(pair, cuts, destination, dry_run, again=truncation is not None)
        if dry_run:
            return plan
        ranks.agree("what to compare", lambda: _fingerprint(pair, plain))
        for note in adapter.notes if adapter else ():
            progress.note(note)
        reads = [checkpoint.tree for checkpoint in (one, other, master) if checkpoint]
        known = [facts(tree) for tree in reads]
        note_problems(known, progress)
        # A model that was trained from a closed delta has part of what that has.
        known += [RepoFacts(gated=said.start.closed) for said in known if said.start]
        private = keeps_private(known, destination, private, public, progress)
        with open_sink(
            destination, DELTA, reads=reads, force=force, private=private, pr=pr, ranks=ranks
        ) as sink:
            push = _Push(pair, adapter, cuts, sink, destination, progress, ranks)
            manifest = push.run(plain, truncation, force)
            published = Published("")
            if ranks.first:
                message = f"Delta of {_name(one.tree)} over {_name(other.tree)}"
                published = publish(ranks, sink, message)
            done = conclude(
                ranks,
                {**asdict(published), "files": [asdict(file) for file in push.files]},
                "finishing the delta",
            )
    return replace(
        plan,
        **{**done, "files": tuple(FileRecord(**file) for file in done["files"])},
        seconds=time.monotonic() - began,
        manifest=manifest,
    )


def _open_trees(
    tuned: str | Path,
    base: str | Path | None,
    master: str | Path | None,
    cache: bool,
    ranks: Ranks,
) -> list[FileTree | None]:
    """Tuned, base and masters. Rank 0 alone reads the card that names the base."""
    (tuned_tree,) = open_alike(ranks, [ModelRef.parse(tuned)], cache=cache)
    base_ref = ModelRef.parse(base) if base is not None else None
    if base_ref is None and ranks.first:
        assert tuned_tree is not None
        base_ref = _default_base(tuned_tree, is_adapter(tuned_tree))
    master_ref = ModelRef.parse(master) if master is not None else None
    return [tuned_tree, *open_alike(ranks, [base_ref, master_ref], cache=cache)]


def _fingerprint(pair: Pair, plain: bool) -> str:
    """What ranks must compare alike."""
    sides = [side for side in (pair.tuned, pair.base, pair.master) if side]
    parts = [
        __version__,
        [glimpse(side) for side in sides],
        [[p.name, p.tuned_name, p.base is None] for p in pair.tensors.values()],
        plain,
    ]
    return hash_bytes(json.dumps(parts).encode())


def _truncation(rank: int | None, energy: float | None, plain: bool) -> Truncation | None:
    if rank is None and energy is None:
        return None
    from hubdiff.truncate import Truncation

    wrong = None
    if rank is not None and energy is not None:
        wrong = "--rank and --energy are two answers to one question"
    elif plain:
        wrong = "--plain stores Δ whole, --rank and --energy store factors"
    elif rank is not None and rank < 1:
        wrong = f"the rank {rank} is no whole number from 1"
    elif energy is not None and not 0 < energy < 1:
        wrong = f"the energy {energy} does not lie between 0 and 1"
    if wrong is not None:
        raise CannotDiff(wrong, next_step="Give one of --rank R, --energy E and --plain.")
    return Truncation(rank, energy)


def _plan(
    pair: Pair, cuts: dict[str, Cut], destination: ModelRef, dry_run: bool, *, again: bool
) -> Pushed:
    """``again``: the matrices are read a second time, to be factorised. Of tensors that are cut the
    base's rows behind are read too, for their hash."""
    pairs = pair.tensors.values()
    behind = 0
    for name, cut in cuts.items():
        if cut.base is not None and cut.shared and pair.filters.takes(name):
            row = pair.base.tensors[name].entry.nbytes // cut.shared
            behind += (cut.base - cut.shared) * row
    twice = [p for p in pairs if again and p.is_float and len(p.tuned.entry.shape) >= 2]
    return Pushed(
        where=str(destination),
        base=str(pair.base.tree.pin),
        tuned=str(pair.tuned.tree.pin),
        dry_run=dry_run,
        tuned_bytes=sum(header.file_size for header in pair.tuned.shards.values())
        + sum(p.tuned.entry.nbytes for p in twice),
        base_bytes=sum(p.base.entry.nbytes for p in (*pairs, *twice) if p.base) + behind,
    )


def _default_base(tuned: FileTree, adapted: bool) -> ModelRef:
    if not adapted:
        return _base_from_card(tuned)
    config = read_json(tuned, CONFIG)
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(named, str) or not named:
        raise CannotDiff(
            f"{tuned.pin}/{CONFIG} names no base model",
            next_step="Say which one with --base.",
        )
    return _repo_named(f"{named}@{revision}" if isinstance(revision, str) else named, tuned, CONFIG)


def _base_from_card(tuned: FileTree) -> ModelRef:
    known = facts(tuned)
    named = known.base_model
    if len(named) == 1:
        return _repo_named(named[0], tuned, "card")
    found = f"names {len(named)} base models" if named else "names no base_model"
    raise CannotDiff(
        known.problem or f"the card of {tuned.pin} {found}",
        next_step="Say which one with --base.",
    )


def _repo_named(text: str, tuned: FileTree, by: str) -> ModelRef:
    """A repo that a card or config names. A stranger may have written it: it chooses no folder of
    this disk."""
    try:
        return ModelRef.parse(text if text.startswith("hf://") else f"hf://{text}")
    except RefError as error:
        raise CannotDiff(
            f"the {by} of {tuned.pin} names the base model {text!r}, which is no repo",
            next_step="Say which one with --base.",
        ) from error


def _name(tree: FileTree) -> str:
    """What people call a model: its repo, or the folder's own name (never its path)."""
    if tree.pin.repo is not None:
        return tree.pin.repo
    assert tree.pin.path is not None
    return tree.pin.path.resolve().name


class _Push:
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
        text = manifest.to_json()
        document = json.loads(text)
        self._put(PICTURE, _picture(document))
        self._put("README.md", self._card(document))
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
                meanwhile=prepare if self._ranks.first else None,
            )
            return extracted, None
        from hubdiff.factored import extract_adapter, extract_truncated

        if self._adapter is not None:
            return extract_adapter(self._adapter, folder, self._sample, progress), None
        assert truncation is not None
        return extract_truncated(pair, folder, truncation, self._sample, progress)

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
        name=_name(checkpoint.tree),
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


def _picture(document: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    layer_picture(document["tensors"], file)
    return file.getvalue()
