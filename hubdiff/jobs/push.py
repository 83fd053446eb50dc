"""push-delta: Δ = tuned − base, published as a repo or a folder of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff._version import __version__
from hubdiff.adapter import CONFIG, is_adapter, open_adapter, place_adapter
from hubdiff.checkpoint import open_checkpoint, read_json
from hubdiff.errors import CannotDiff, RefError
from hubdiff.facts import RepoFacts, facts, keeps_private, note_problems
from hubdiff.files import FileTree
from hubdiff.hashing import hash_bytes
from hubdiff.jobs.making import Making, name_of
from hubdiff.jobs.together import conclude, glimpse, open_alike, publish
from hubdiff.manifest import FileRecord, Manifest
from hubdiff.pair import Filters, Pair, pair_models
from hubdiff.progress import Progress, Silent
from hubdiff.ranks import ALONE, Ranks
from hubdiff.refs import ModelRef
from hubdiff.rows import Cut, cut_models
from hubdiff.writer import DELTA, Published, open_sink

if TYPE_CHECKING:
    from hubdiff.truncate import Truncation


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
            making = Making(pair, adapter, cuts, sink, destination, progress, ranks)
            manifest = making.run(plain, truncation, force)
            published = Published("")
            if ranks.first:
                message = f"Delta of {name_of(one.tree)} over {name_of(other.tree)}"
                published = publish(ranks, sink, message)
            done = conclude(
                ranks,
                {**asdict(published), "files": [asdict(file) for file in making.files]},
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
