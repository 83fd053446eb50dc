"""watch: what is new among the bases of the families, and which items that means.

Every followed base is asked for in one call; one that is pinned and in the lock in none. What
hubdiff itself makes is never taken for a base, or it would feed on its own results.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubdiff.backport.config import CONFIG, Config, DeltaPolicy, Family, read_config
from hubdiff.backport.items import (
    BACKPORT,
    PLAN_VERSION,
    RECYCLE,
    Item,
    item_key,
    settings_digest,
    weights_digest,
)
from hubdiff.backport.lock import ADOPTED, DONE, FAILED, LOCK, Lock, read_lock, seconds_of
from hubdiff.errors import HubdiffError, HubError, HubUnavailable, RefError
from hubdiff.files import open_tree
from hubdiff.manifest import read_manifest
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef

_MOST_SUCCESSORS = 8  # how far a chain of new_version is followed
_FIRST_WAIT = 6 * 3600  # seconds until what failed is tried again; doubled each time


@dataclass(frozen=True)
class Base:
    """A base of a family as it stands now. ``name`` is what it is called in the lock: as in the
    config, or its repo."""

    name: str
    repo: str
    commit: str
    weights: str

    @property
    def pin(self) -> str:
        return f"{self.repo}@{self.commit}"


@dataclass(frozen=True)
class Watched:
    """``items`` are to be done now, ``adopt`` are seen for the first time and only recorded,
    ``waiting`` is how many more there are than one run takes. ``skipped``: repo → why it is no
    base. ``bases`` and ``deltas`` are for the lock; ``news``: there is something to write there."""

    config: str
    items: tuple[Item, ...]
    adopt: tuple[Item, ...]
    waiting: int
    skipped: Mapping[str, str]
    bases: Mapping[str, dict[str, str]]
    deltas: Mapping[str, dict[str, str]]
    news: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "version": PLAN_VERSION,
            "config": self.config,
            "items": [item.as_json() for item in self.items],
            "adopt": [item.as_json() for item in self.adopt],
            "waiting": self.waiting,
            "news": self.news,
            "skipped": [{"base": base, "why": why} for base, why in self.skipped.items()],
            "bases": dict(self.bases),
            "deltas": dict(self.deltas),
        }


def watch(
    config: str | Path = CONFIG,
    *,
    lock: str | Path = LOCK,
    only: Collection[str] = (),
    bases: Collection[str] = (),
    adopted: bool = False,
    progress: Progress | None = None,
) -> Watched:
    """Look what is new, and plan what to do about it. Nothing is written.

    Args:
        config, lock: the files; a lock that is not there is empty.
        only: these families (``FAMILY``) or deltas (``FAMILY/DELTA``). Names that are not in the
            config, which may come from an event, choose nothing.
        bases: only these repos, likewise.
        adopted: plan also what was adopted, and what would be.

    The first time a delta is seen, every base there is is adopted: recorded, and left alone. A new
    version of it goes where the old one went, and where that would go now. A base
    or a place of discovery that can't be read is skipped, with the reason; deltas that are new wait
    where the Hub did not answer. Needs ``pip install "hubdiff[backport]"``.
    Raises ``HubdiffError``.
    """
    read = read_config(config)
    poll = _Poll(read, read_lock(lock), progress or Silent())
    for family in read.families:
        wanted = [d for d in family.deltas if _chosen(f"{family.name}/{d.name}", only)]
        if wanted:
            poll.family(family, wanted, set(bases))
    return poll.result(adopted)


def _chosen(name: str, only: Collection[str]) -> bool:
    return not only or name in only or name.partition("/")[0] in only


@dataclass
class _Poll:
    """One look at everything. A repo that several families share is asked for once."""

    config: Config
    lock: Lock
    progress: Progress
    _seen: dict[tuple[str, str | None], Any] = field(default_factory=dict)
    _listed: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    _bases: dict[str, dict[str, str]] = field(default_factory=dict)
    _deltas: dict[str, dict[str, str]] = field(default_factory=dict)
    _skipped: dict[str, str] = field(default_factory=dict)
    _items: list[tuple[Item, str | None, bool]] = field(default_factory=list)
    # Of the family in hand a base may be there that did not answer: a delta that is adopted now
    # would take it for a new one later.
    _unseen: bool = False

    def family(self, family: Family, deltas: list[DeltaPolicy], repos: Collection[str]) -> None:
        self._unseen = False
        bases = list(self._family_bases(family))
        for delta in deltas:
            known = delta.source in self.lock.deltas
            if self._unseen and not known:
                self.progress.note(f"{family.name}/{delta.name} is new: it waits for all bases")
                continue
            try:
                own = self._own_base(delta.source)
            except HubError as error:
                raise HubdiffError(
                    f"{family.name}/{delta.name}: {error}", next_step=error.next_step
                ) from error
            follows = set() if known else self._follows(family, delta, bases)
            for base, direction in _directed(bases, own):
                if delta.policy in (direction, "both"):
                    goes = known or base.weights in follows
                    chosen = not repos or base.repo in repos
                    self._consider(family, delta, base, direction, goes, chosen)

    def result(self, adopted: bool) -> Watched:
        """What was seen for the first time is recorded also where only some bases were asked for:
        afterwards the delta is known, and the others would count as new."""
        todo = [one for one, status, chosen in self._items if chosen and (adopted or not status)]
        new = [
            item
            for item, status, chosen in self._items
            if status and not (chosen and adopted) and item.key not in self.lock.items
        ]
        most = self.config.limits.items
        watched = self.lock.watches({"bases": self._bases, "deltas": self._deltas})
        return Watched(
            self.config.file,
            tuple(todo[:most]),
            tuple(new),
            max(0, len(todo) - most),
            self._skipped,
            self._bases,
            self._deltas,
            bool(todo or new) or not watched or self.lock.is_stale(),
        )

    # --- bases ---

    def _family_bases(self, family: Family) -> Iterator[Base]:
        """Those by hand first, then the discovered ones, the oldest first; each repo at one commit
        once."""
        found: dict[str, Base] = {}
        for text in family.bases:
            ref = ModelRef.parse(f"hf://{text}")
            assert ref.repo is not None
            self._add(found, ref.repo, ref.revision)
        by_hand = {base.repo for base in found.values()}
        more: dict[str, Base] = {}
        for repo in self._discovered(family):
            if repo not in by_hand:
                self._add(more, repo, None)
        # Whoever keeps a collection may put the newest on top.
        found.update(sorted(more.items(), key=lambda one: self._see(one[1].repo, None).created))
        if family.discover.new_version:
            for base in list(found.values()):
                self._follow(found, base)
        yield from found.values()

    def _add(self, found: dict[str, Base], repo: str, revision: str | None) -> Base | None:
        name = f"{repo}@{revision}" if revision else repo
        try:
            base = self._base(name, repo, revision)
        except (HubError, RefError) as error:
            self._missed(repo, error)
            return None
        if base is not None:
            found[base.pin] = base
            self._bases[name] = {"commit": base.commit, "weights": base.weights}
        return base

    def _base(self, name: str, repo: str, revision: str | None) -> Base | None:
        known = self.lock.bases.get(name)
        if known and revision == known["commit"]:
            return Base(name, repo, known["commit"], known["weights"])
        seen = self._see(repo, revision)
        if repo in self.config.outputs() or seen.library == "hubdiff" or "hubdiff" in seen.tags:
            self._skip(repo, "is made by hubdiff, and no base")
            return None
        weights = weights_digest(seen.files)
        if weights is None:
            self._skip(repo, "holds no safetensors weights")
            return None
        return Base(name, repo, seen.commit, weights)

    def _see(self, repo: str, revision: str | None) -> Any:
        from hubdiff.hub import see

        if (repo, revision) not in self._seen:
            self._seen[repo, revision] = see(repo, revision)
        return self._seen[repo, revision]

    def _missed(self, repo: str, error: HubdiffError) -> None:
        self._unseen |= isinstance(error, HubUnavailable)
        self._skip(repo, str(error))

    def _skip(self, repo: str, why: str) -> None:
        self._skipped[repo] = why
        self.progress.note(f"skipped {repo}: {why}")

    def _discovered(self, family: Family) -> list[str]:
        """What may be a base. The names of a collection come from whoever may edit it."""
        from hubdiff.hub import models_in, models_of

        rule, repos = family.discover, []
        if rule.collection is not None:
            slug = rule.collection
            repos += self._list(("collection", slug), lambda: models_in(slug))
        if rule.author is not None and rule.match is not None:
            author, pattern = rule.author, re.compile(rule.match)
            models = self._list(("author", author), lambda: models_of(author))
            repos += [repo for repo in models if pattern.fullmatch(repo.rpartition("/")[2])]
        return list(dict.fromkeys(repos))

    def _list(self, name: tuple[str, str], ask: Any) -> list[str]:
        if name not in self._listed:
            try:
                self._listed[name] = ask()
            except HubError as error:
                self._unseen = True
                self._skip(name[1], str(error))
                return []
        return self._listed[name]

    def _follow(self, found: dict[str, Base], base: Base) -> None:
        """``new_version`` of a card, on and on. A pinned base is asked for too: its card at that
        commit can't know its successor."""
        repo = base.repo
        for _ in range(_MOST_SUCCESSORS):
            try:
                newer = self._see(repo, None).new_version
                ref = ModelRef.parse(f"hf://{newer}") if newer else None
            except (HubError, RefError) as error:
                self._missed(repo, error)
                return
            if ref is None or ref.repo is None or ref.repo in {b.repo for b in found.values()}:
                return
            if self._add(found, ref.repo, None) is None:
                return
            repo = ref.repo

    # --- items ---

    def _own_base(self, source: str) -> dict[str, str]:
        """``base`` and the digest of its ``weights``, as the delta's manifest pins it; from the
        lock, where that knows it."""
        known = self._deltas.get(source) or self.lock.deltas.get(source)
        if known is None:
            base = read_manifest(open_tree(ModelRef.parse(f"hf://{source}"), cache=False)).base
            if base.repo is None:
                raise HubdiffError(
                    f"the base of {source} is the folder {base.name}, not a repo of the Hub",
                    next_step="Push the delta again with --base org/name.",
                )
            seen = self._see(base.repo, base.commit)
            known = {"base": f"{base.repo}@{base.commit}"}
            known["weights"] = weights_digest(seen.files) or ""
        self._deltas[source] = dict(known)
        return self._deltas[source]

    def _follows(self, family: Family, delta: DeltaPolicy, bases: list[Base]) -> set[str]:
        """The weights of bases that a new version of a delta goes to: an earlier one was brought
        there, or tried, the more so where it was not good enough; or it would be now."""
        name, repo = f"{family.name}/{delta.name}", delta.source.partition("@")[0]
        current = {one.source for family in self.config.families for one in family.deltas}

        def is_earlier(source: object) -> bool:
            return str(source).partition("@")[0] == repo and source not in current

        tried = {
            str(entry.get("weights"))
            for entry in self.lock.items.values()
            if (entry.get("delta") == name or is_earlier(entry.get("source")))
            and entry["status"] != ADOPTED
        }
        earlier = {source: own for source, own in self.lock.deltas.items() if is_earlier(source)}
        handled = {
            base.weights
            for base in bases
            if any(item_key(source, base.weights) in self.lock.items for source in earlier)
        }
        would_be = {
            base.weights
            for own in earlier.values()
            for base, direction in _directed(bases, own)
            if delta.policy in (direction, "both")
        }
        return tried | would_be - handled

    def _consider(
        self,
        family: Family,
        delta: DeltaPolicy,
        base: Base,
        direction: str,
        goes: bool,
        chosen: bool,
    ) -> None:
        """Note what is to be done about a delta on a base, if anything. Where it does not ``go`` by
        itself, the base is adopted."""
        key = item_key(delta.source, base.weights)
        entry = self.lock.items.get(key)
        settings = settings_digest(delta)
        status = self._status(entry, settings, goes)
        if status not in (None, ADOPTED) or any(item.key == key for item, _, _ in self._items):
            return
        item = Item(
            key,
            family.name,
            delta.name,
            delta.source,
            base.pin,
            base.weights,
            direction,
            delta.scales,
            delta.evaluation,
            delta.gate,
            delta.publish,
            settings,
            self.config.limits.disk_gb,
            _attempt(entry, settings),
        )
        self._items.append((item, status, chosen))

    def _status(self, entry: Mapping[str, Any] | None, settings: str, goes: bool) -> str | None:
        """What stands in the way of an item; None: it is to be done."""
        if entry is None:
            return None if goes else ADOPTED
        status = str(entry["status"])
        if status in (ADOPTED, DONE):
            return status
        if entry.get("settings") != settings:
            return None
        return None if status == FAILED and self._try_again(entry) else status

    def _try_again(self, entry: Mapping[str, Any]) -> bool:
        attempts = int(entry.get("attempts") or 1)
        if attempts >= self.config.limits.attempts:
            return False
        return time.time() >= seconds_of(entry.get("at")) + _FIRST_WAIT * 2 ** (attempts - 1)


def _attempt(entry: Mapping[str, Any] | None, settings: str) -> int:
    """Counted while the settings stay as they are."""
    if entry is None or entry["status"] != FAILED or entry.get("settings") != settings:
        return 1
    return int(entry.get("attempts") or 0) + 1


def _directed(bases: list[Base], own: Mapping[str, str]) -> Iterator[tuple[Base, str]]:
    """Every base but the delta's own, with the direction there. Other weights in the own base's
    repo came later; where the family does not list the own base, all others did."""
    repo = own.get("base", "").partition("@")[0]
    places = [i for i, base in enumerate(bases) if base.repo == repo]
    place = places[0] if places else -1
    for i, base in enumerate(bases):
        if base.weights != own.get("weights"):
            yield base, RECYCLE if i >= place else BACKPORT
