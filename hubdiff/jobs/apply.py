"""apply: a delta onto a target, as a folder or as a repo on the Hub."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hubdiff._version import __version__
from hubdiff.card import result_card
from hubdiff.checkpoint import MANIFEST, Checkpoint, open_checkpoint
from hubdiff.delta import Delta, open_delta_tree
from hubdiff.errors import CannotApply, RefError, WrongBase
from hubdiff.facts import RepoFacts, facts, facts_in, note_problems
from hubdiff.files import FileTree, open_tree
from hubdiff.hashing import hash_bytes
from hubdiff.manifest import FileRecord
from hubdiff.pair import Filters
from hubdiff.plan import CARD, OWN_BASE, MergePlan, make_plan
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.writer import RESULT, Sink, open_sink, output_folder

if TYPE_CHECKING:
    import torch

R = TypeVar("R")
RECORD = RESULT.marker
_LARGEST_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True)
class Applied:
    """What apply did, or with ``dry_run`` would do. ``files`` are the files written here; those the
    Hub copied by itself are in the plan only."""

    plan: dict[str, Any]
    dry_run: bool
    where: str
    files: tuple[FileRecord, ...] = ()
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


def apply(
    delta: str | Path,
    to: str | Path,
    *,
    output: str | Path | None = None,
    push_to: str | None = None,
    scale: float = 1.0,
    device: str = "auto",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    private: bool = False,
    pr: bool = False,
    force: bool = False,
    cache: bool = False,
    dry_run: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Put ``delta`` on the model ``to``.

    On the delta's own base (recognised by content) every file of the tuned repo comes back, sha256
    by sha256. On any other target the result is ``round(target + scale · Δ)``, rounded once.

    Args:
        delta, to: refs (``org/name``, ``org/name@revision``, ``hf://…``) or folders.
        output, push_to: exactly one: a folder, or a repo on the Hub.
        scale: α, taken as a float32 number.
        device: ``auto`` (CUDA where there is one, else CPU), ``cpu``, ``cuda[:N]``, ``mps``.
        include, exclude: globs on the delta's tensor names.
        force: replace what stands at ``output`` or ``push_to``.
        cache: keep what is downloaded in the local Hub cache.
        command: the command line, for the record and the card.

    Raises ``HubdiffError``. Peak memory does not depend on the size of the model.
    """
    began = time.monotonic()
    check_scale(scale)
    destination = _destination(output, push_to)
    filters = Filters.of(include, exclude)
    # A dry run reads no weights: it must not fill the cache with them either.
    with opened_pair(delta, to, cache and not dry_run) as (opened, target):
        plan = make_plan(opened, target, scale=scale, filters=filters)
        if dry_run:
            return Applied(plan.as_json(), True, str(destination))
        job = _Apply(destination, filters, device, private, pr, force, command, progress)
        applied = run_plan(plan, filters, job.run)
    return replace(applied, seconds=time.monotonic() - began)


def run_plan(plan: MergePlan, filters: Filters, run: Callable[[MergePlan], R]) -> R:
    """``run`` the plan, or where it shows that the target only looked like the own base, the plan
    of a transfer."""
    try:
        return run(plan)
    except WrongBase:
        if plan.proved:
            raise
        # The sampled tensors were the base's, another was not: it is a sibling after all.
        again = make_plan(
            plan.delta, plan.target, scale=plan.scale, filters=filters, as_transfer=True
        )
        return run(again)


def check_scale(scale: float) -> None:
    """Raise ``CannotApply`` for a number that float32 does not have."""
    if not abs(scale) <= _LARGEST_FLOAT32:
        raise CannotApply(
            f"the scale {scale} is not a float32 number", next_step="Give a finite --scale."
        )


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


@contextmanager
def opened_pair(
    delta: str | Path, to: str | Path, cache: bool
) -> Iterator[tuple[Delta, Checkpoint]]:
    """A delta and the target it goes onto, open."""
    delta_tree = open_tree(ModelRef.parse(delta), cache=cache)
    with open_delta_tree(delta_tree) as opened:
        target_tree = open_tree(ModelRef.parse(to), cache=cache)
        with open_checkpoint(target_tree) as target:
            yield opened, target


class Cards(NamedTuple):
    """What the cards of the two models say that a result's own card draws on."""

    tuned: dict[str, Any]
    target: dict[str, Any]


def _read_cards(plan: MergePlan, progress: Progress) -> Cards:
    """Read before the work: what they can't tell must not cost it."""
    target, tuned = facts(plan.target.tree), RepoFacts()
    if plan.case != OWN_BASE:  # there the tuned card comes back as it is
        tuned = facts_in(plan.delta.tree, f"tuned/{CARD}")
    note_problems([tuned, target], progress)
    return Cards(tuned.card_data, target.card_data)


@dataclass(frozen=True)
class _Apply:
    destination: ModelRef
    filters: Filters
    device: str
    private: bool
    pr: bool
    force: bool
    command: Sequence[str] | None
    progress: Progress | None

    def run(self, plan: MergePlan) -> Applied:
        from hubdiff import merge

        progress = self.progress or Silent()
        progress.note(plan.reason)
        cards = _read_cards(plan, progress)
        device = choose_device(self.device)
        with open_sink(
            self.destination,
            RESULT,
            reads=(plan.delta.tree, plan.target.tree),
            run=_run_name(plan, self.filters),
            force=self.force,
            private=self.private,
            pr=self.pr,
        ) as sink:
            files = merge.run(plan, sink, device, progress)
            files += self._describe(plan, sink, files, cards)
            published = sink.publish(_message(plan))
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
        self, plan: MergePlan, sink: Sink, files: list[FileRecord], cards: Cards
    ) -> list[FileRecord]:
        """The record, and a card unless the tuned repo's own README came back."""
        record = self._record(plan, files)
        described = [sink.put(RECORD, (json.dumps(record, indent=2) + "\n").encode())]
        if plan.case != OWN_BASE:
            card = result_card(
                record,
                repo=self.destination.repo,
                name=self.destination.path.name if self.destination.path else None,
                tuned_card=cards.tuned,
                target_card=cards.target,
            )
            described.append(sink.put(CARD, str(card).encode()))
        return described

    def _record(self, plan: MergePlan, files: list[FileRecord]) -> dict[str, Any]:
        manifest, target = plan.delta.manifest, facts(plan.target.tree)
        described = plan.as_json()
        return {
            "hubdiff_version": __version__,
            "case": plan.case,
            "reason": plan.reason,
            "scale": plan.scale,
            "filters": asdict(self.filters) if self.filters else None,
            "delta": {
                **_identity(plan.delta.tree),
                "manifest_sha256": hash_bytes(plan.delta.tree.read_bytes(MANIFEST)),
            },
            "target": {
                **_identity(plan.target.tree),
                "licence": target.licence,
                "gated": target.gated,
                "files": [_content(plan.target.tree, path) for path in plan.target.shards],
            },
            "base": _without_files(asdict(manifest.base)),
            "tuned": _without_files(asdict(manifest.tuned)),
            "command": list(self.command) if self.command else None,
            "side_files": [
                {"path": file.path, "source": _SOURCES[file.origin], "note": file.note}
                for file in plan.files
            ],
            "left_out": described["left_out"],
            "added": described["added"],
            "kept": described["kept"],
            "notes": described["notes"],
            "files": [asdict(file) for file in files],
        }


_SOURCES = {"target": "target", "delta": "tuned", "made": "merged"}


def choose_device(name: str) -> torch.device:
    """The torch device of that name. Raises ``RefError`` for one that is not here."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(kind, False):
        raise RefError(
            f"there is no device {name!r} here", next_step="Use --device auto, or --device cpu."
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RefError(
            f"{name!r} is not a device", next_step="Write cpu, cuda, cuda:N or mps."
        ) from error
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RefError(
            f"there is no {name}, only {torch.cuda.device_count()} CUDA devices",
            next_step="Use --device auto.",
        )
    return device


def _run_name(plan: MergePlan, filters: Filters) -> str:
    """What makes two runs the same, so that one may go on where the other was killed."""
    target = plan.target.tree
    root = target.pin.path
    stamps = [(root / file).stat().st_mtime_ns for file in target.files()] if root else []
    manifest = plan.delta.tree.read_bytes(MANIFEST)
    parts = [
        __version__,
        hashlib.sha256(manifest).hexdigest(),
        str(target.pin),
        [(file, header.file_size) for file, header in plan.target.shards.items()],
        stamps,
        plan.case,
        plan.scale,
        asdict(filters),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _message(plan: MergePlan) -> str:
    delta, target = _identity(plan.delta.tree)["name"], _identity(plan.target.tree)["name"]
    if plan.case == OWN_BASE:
        return f"Rebuild of {plan.delta.manifest.tuned.name} from {delta}"
    scale = "" if plan.scale == 1.0 else f" at scale {plan.scale:g}"
    return f"{delta} applied to {target}{scale}"


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
