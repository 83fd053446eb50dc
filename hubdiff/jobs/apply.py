"""apply: one delta or several onto a target, as a folder or as a repo on the Hub."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hubdiff._version import __version__
from hubdiff.card import result_card
from hubdiff.checkpoint import MANIFEST
from hubdiff.errors import NotAdvised, RefError, WrongBase
from hubdiff.facts import RepoFacts, facts, facts_in, keeps_private, note_problems
from hubdiff.hashing import hash_bytes
from hubdiff.jobs.advice import advice
from hubdiff.jobs.merging import (
    DeltaRef,
    choose_device,
    method_of,
    opened_models,
    run_plan,
    vocab_mode,
)
from hubdiff.jobs.record import result_message, result_record
from hubdiff.jobs.together import conclude, glimpse, hand_in, publish
from hubdiff.manifest import WrittenFile, written_file
from hubdiff.pair import Filters
from hubdiff.plan import (
    CARD,
    OWN_BASE,
    Alignment,
    MergePlan,
    WeightsFile,
    WholeFile,
    make_plan,
)
from hubdiff.progress import Progress, Silent
from hubdiff.ranks import ALONE, Ranks
from hubdiff.refs import ModelRef
from hubdiff.scales import Scales
from hubdiff.signing import Trust, check_signature
from hubdiff.verdict import GO, REFUSE, Verdict
from hubdiff.writer import RESULT, Sink, open_sink, output_folder

RECORD = RESULT.marker
# Whole files up to this size, such as configs and tokenizers, are rank 0's; larger ones are shared.
SMALL_FILE = 16 << 20


@dataclass(frozen=True)
class Applied:
    """What apply did, or with ``dry_run`` would do. ``files`` are the files written here; those the
    Hub copied by itself are in the plan only."""

    plan: dict[str, Any]
    dry_run: bool
    where: str
    files: tuple[WrittenFile, ...] = ()
    seconds: float = 0.0
    url: str | None = None
    commit: str | None = None
    pr_url: str | None = None

    def as_json(self) -> dict[str, Any]:
        document = {"where": self.where, "dry_run": self.dry_run, "plan": self.plan}
        if not self.dry_run:
            document |= {
                "files": [asdict(file) for file in self.files],
                "seconds": round(self.seconds, 3),
                "url": self.url,
                "commit": self.commit,
                "pr_url": self.pr_url,
            }
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Applied:
        files = tuple(written_file(file) for file in document["files"])
        return cls(**{**document, "files": files})


def apply(
    delta: str | Path | Sequence[DeltaRef],
    to: str | Path,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    scale: float | Mapping[str, float] = 1.0,
    method: str = "linear",
    density: float | None = None,
    seed: int | None = None,
    vocab: str | None = None,
    device: str = "auto",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    private: bool = False,
    public: bool = False,
    pr: bool = False,
    force: bool = False,
    signature: Trust | None = None,
    cache: bool = False,
    dry_run: bool = False,
    command: Sequence[str] | None = None,
    message: str | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Applied:
    """Put ``delta``, or several, on the model ``to``.

    On the delta's own base (recognised by content) every file of the tuned repo comes back, sha256
    by sha256. On any other target the result is ``round(target + scale · Δ)``, rounded once.
    Several deltas are merged by ``method`` in float32, rounded once.

    Args:
        delta, to: refs (``org/name``, ``org/name@revision``, ``hf://…``) or folders. ``delta`` may
            be a list; each of its refs may end in ``:WEIGHT``, or be a pair (ref, weight).
        output, push_to: exactly one: a folder, or a repo on the Hub.
        scale: α, taken as a float32 number; or a mapping from globs on the delta's tensor names to
            numbers, of which the last that matches wins (``{"model.layers.{0..7}.*": 0.5}``).
        method: ``linear`` (the weighted sum), ``ties`` or ``dare``.
        density: the share of each Δ that ``ties`` keeps (0.2 unless given) or ``dare`` draws.
        seed: of the draw of ``dare``; 0 unless given.
        vocab: how the rows of embedding and head find each other. ``align``: by the token they
            stand for; a token new in the tuned model brings its row, one that it does not know
            keeps the target's. ``rows``: by number, whatever they stand for. ``strict``: not at
            all, and vocabularies that differ are refused. By default ``align`` where both
            tokenizers can be read, else ``strict``.
        device: ``auto`` (CUDA where there is one, else CPU), ``cpu``, ``cuda[:N]``, ``mps``.
        include, exclude: globs on the delta's tensor names.
        force: replace what stands at ``output`` or ``push_to``; also make a result that ``check``
            refuses.
        private: make the repo private, if it is new.
        public: make it public also where the target or a delta is gated or private, or a base or
            tuned model was when the delta was made. Without it such a result is private.
        signature: whose signature every delta must have (``hubdiff.signing.Trust``).
        cache: keep what is downloaded in the local Hub cache.
        command: the command line, for the record and the card.
        message: the title of the commit or pull request; by default it says what was applied.
        ranks: the processes that share the work, each of which makes this call: under torchrun,
            what ``with hubdiff.ranks.join() as ranks`` gives. The bytes don't depend on how many
            there are. By default this process does all of it.

    Raises ``HubdiffError``. Peak memory does not depend on the size of the model.
    """
    began = time.monotonic()
    scales, merging = Scales.of(scale), method_of(method, density, seed)
    vocab = vocab_mode(vocab)
    destination = _destination(output, push_to)
    filters = Filters.of(include, exclude)
    # A dry run reads no weights: it must not fill the cache with them either.
    with opened_models(delta, to, cache and not dry_run, ranks) as (opened, target):
        if signature is not None:
            for item in opened:
                check_signature(item.delta.tree, signature)
        plan = make_plan(opened, target, scale=scales, method=merging, filters=filters, vocab=vocab)
        if dry_run:
            return Applied(plan.as_json(), True, str(destination))
        watched = ranks.watched(progress or Silent())
        job = _Apply(
            destination,
            filters,
            device,
            private,
            public,
            pr,
            force,
            command,
            message,
            watched,
            ranks,
        )
        applied = run_plan(plan, filters, vocab, job.run)
    return replace(applied, seconds=time.monotonic() - began)


def _destination(output: str | Path | None, push_to: str | None) -> ModelRef:
    if (output is None) == (push_to is None):
        raise RefError(
            "one place for the result is needed", next_step="Give --output DIR or --push-to REPO."
        )
    if output is not None:
        return output_folder(output)
    assert push_to is not None
    ref = ModelRef.parse(push_to)
    if ref.repo is None:
        raise RefError(
            f"{push_to} is a folder, --push-to takes a repo", next_step="Use --output for a folder."
        )
    return ref


class Cards(NamedTuple):
    """What the cards of the tuned models, in the order of the deltas, and of the target say that a
    result's own card draws on."""

    tuned: list[dict[str, Any]]
    target: dict[str, Any]


def _read_cards(plan: MergePlan, progress: Progress) -> Cards:
    """Read before the work: what they can't tell must not cost it."""
    target, tuned = facts(plan.target.tree), [RepoFacts()]
    if plan.case != OWN_BASE:  # there the tuned card comes back as it is
        tuned = [facts_in(item.delta.tree, f"tuned/{CARD}") for item in plan.deltas]
    note_problems([*tuned, target], progress)
    return Cards([said.card_data for said in tuned], target.card_data)


@dataclass(frozen=True)
class _Apply:
    destination: ModelRef
    filters: Filters
    device: str
    private: bool
    public: bool
    pr: bool
    force: bool
    command: Sequence[str] | None
    message: str | None
    progress: Progress
    ranks: Ranks

    def run(self, plan: MergePlan) -> Applied:
        self.ranks.agree("the plan", lambda: _fingerprint(plan, self.filters))
        self.progress.note(plan.reason)
        verdict = self._advise(plan)
        cards = _read_cards(plan, self.progress)
        device = choose_device(self.device, self.ranks)
        with open_sink(
            self.destination,
            RESULT,
            reads=(*(item.delta.tree for item in plan.deltas), plan.target.tree),
            run=_run_name(plan, self.filters),
            force=self.force,
            private=self._private(plan),
            pr=self.pr,
            ranks=self.ranks,
        ) as sink:
            files = self._merge(plan, sink, device)
            applied = None
            if self.ranks.first:
                applied = self._finish(plan, sink, files, cards, verdict)
        done = conclude(self.ranks, applied and asdict(applied), "finishing the result")
        return Applied.from_json(done)

    def _private(self, plan: MergePlan) -> bool:
        trees = (plan.target.tree, *(item.delta.tree for item in plan.deltas))
        known = [facts(tree) for tree in trees]
        for item in plan.deltas:
            sides = (item.delta.manifest.base, item.delta.manifest.tuned)
            known += [RepoFacts(gated=side.gated) for side in sides]
        return keeps_private(known, self.destination, self.private, self.public, self.progress)

    def _advise(self, plan: MergePlan) -> Verdict | None:
        """Compare the target with the base of every delta, on rank 0. Raises ``NotAdvised`` where
        the result would be noise, unless it is forced."""
        if self.destination.repo is not None:
            from hubdiff.hub import require_token

            require_token()  # before anything is read for it
        verdict = advice(plan) if self.ranks.first else None
        if verdict is not None and verdict.level != GO:
            if verdict.level == REFUSE and not self.force:
                raise NotAdvised(
                    f"not put on {plan.target.tree.pin}: {verdict.why}",
                    next_step="hubdiff check DELTA --to TARGET shows every number; --force makes "
                    "the result all the same.",
                )
            self.progress.note(f"{verdict.level}: {verdict.why}")
        self.ranks.broadcast(None, "comparing the target with the delta's base")
        return verdict

    def _merge(self, plan: MergePlan, sink: Sink, device: str) -> list[WrittenFile]:
        """Every file of the plan, made by whoever has it in his share. Raises ``WrongBase`` on all
        ranks when one of them finds a tensor that is not the base's."""
        from hubdiff import merge

        shared, rest = self._shares(plan, sink)
        files: list[WrittenFile] = []
        wrong = None
        try:
            files = merge.run(plan, sink, device, self.progress, shared)
        except WrongBase as error:
            if plan.proved:
                raise
            wrong = str(error)
        found = hand_in(self.ranks, sink, {"wrong": wrong, "files": _json(files)}, "merging")
        for reason in (rank["wrong"] for rank in found):
            if reason:
                raise WrongBase(reason)
        files = [written_file(file) for rank in found for file in rank["files"]]
        if self.ranks.first and rest:
            files += merge.run(plan, sink, device, self.ranks.watched(Silent()), rest)
        order = {file.path: number for number, file in enumerate(merge.in_order(plan))}
        return sorted(files, key=lambda file: order[file.path])

    def _shares(
        self, plan: MergePlan, sink: Sink
    ) -> tuple[list[WeightsFile | WholeFile], list[WeightsFile | WholeFile]]:
        """This rank's files of the plan, and those that rank 0 makes when all ranks are done: small
        files, which turn the folder into a model. A process on its own makes all in one go."""
        from hubdiff import merge

        files = merge.in_order(plan)
        if self.ranks.size == 1:
            return files, []
        large = [f for f in files if isinstance(f, WeightsFile) or f.size > SMALL_FILE]
        if len(large) < self.ranks.size:
            self.progress.note(
                f"{len(large)} of the {self.ranks.size} ranks have work: a file is made by one rank"
            )
        shared = self.ranks.share(large, lambda file: _cost(plan, file, self.destination))
        return shared, [file for file in files if file not in large]

    def _finish(
        self,
        plan: MergePlan,
        sink: Sink,
        files: list[WrittenFile],
        cards: Cards,
        verdict: Verdict | None,
    ) -> Applied:
        """Describe the result and publish it."""
        record = result_record(plan, self.filters, self.command, files, verdict)
        files += self._describe(plan, sink, record, cards)
        published = publish(self.ranks, sink, self.message or result_message(plan))
        return Applied(
            plan.as_json(),
            False,
            published.where,
            tuple(files),
            url=published.url,
            commit=published.commit,
            pr_url=published.pr_url,
        )

    def _describe(
        self, plan: MergePlan, sink: Sink, record: dict[str, Any], cards: Cards
    ) -> list[WrittenFile]:
        """The record, and a card unless the tuned repo's own README came back."""
        described: list[WrittenFile] = [
            sink.put(RECORD, (json.dumps(record, indent=2) + "\n").encode())
        ]
        if plan.case != OWN_BASE:
            card = result_card(
                record,
                repo=self.destination.repo,
                name=self.destination.path.name if self.destination.path else None,
                tuned_cards=cards.tuned,
                target_card=cards.target,
            )
            described.append(sink.put(CARD, card.encode()))
        return described


def _cost(plan: MergePlan, file: WeightsFile | WholeFile, destination: ModelRef) -> int:
    """The bytes that pass through the rank that makes the file: none of one that the Hub copies."""
    if isinstance(file, WeightsFile):
        return file.header.file_size
    tree = plan.target.tree if file.delta is None else file.delta.tree
    copied = destination.repo is not None and tree.pin.repo is not None
    return 0 if copied and file.source and tree.files()[file.source].sha256 else file.size


def _json(files: list[WrittenFile]) -> list[dict[str, Any]]:
    return [asdict(file) for file in files]


def _fingerprint(plan: MergePlan, filters: Filters) -> str:
    """What ranks must plan alike. What depends on a machine, its cores and its cache, is left
    out."""
    described = plan.as_json()
    del described["peak_memory"], described["read"]["network"]
    parts = [
        __version__,
        described,
        [hash_bytes(item.delta.tree.read_bytes(MANIFEST)) for item in plan.deltas],
        glimpse(plan.target),
        [(file.path, file.sha256, hash_bytes(file.header.raw)) for file in plan.weights],
        [(f.path, f.sha256, f.source, f.data and hash_bytes(f.data)) for f in plan.files],
        asdict(filters),
        [_rows_of(alignment) for alignment in plan.alignments],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _rows_of(alignment: Alignment | None) -> list[Any]:
    """Which rows go where."""
    if alignment is None:
        return []
    return [
        alignment.mode,
        *(list(asdict(r).values()) for r in (*alignment.changed, *alignment.taken)),
    ]


def _run_name(plan: MergePlan, filters: Filters) -> str:
    """What makes two runs the same, so that one may go on where the other was killed."""
    target = plan.target.tree
    root = target.pin.path
    stamps = [(root / file).stat().st_mtime_ns for file in target.files()] if root else []
    manifests = [item.delta.tree.read_bytes(MANIFEST) for item in plan.deltas]
    parts = [
        __version__,
        [hash_bytes(manifest) for manifest in manifests],
        [item.weight for item in plan.deltas],
        plan.method and plan.method.as_json(),
        str(target.pin),
        [(file, header.file_size) for file, header in plan.target.shards.items()],
        stamps,
        plan.case,
        plan.scale.pairs,
        asdict(filters),
        [_rows_of(alignment) for alignment in plan.alignments],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
