"""The processes that torchrun started, as one job.

Every rank makes the same plan and takes its share of it; rank 0 alone says what goes out. Only
small JSON texts pass between ranks, over gloo: weights never do, and nothing is unpickled. The work
between two exchanges may take hours, so each rank tells every second that it lives: one that fails,
is killed or is cut off ends all of them with ``RankLost``, which says what was going on, whether
anything was published, and what to do.

Ranks meet in the same order on every rank: a method that says so must be called by all of them.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from hubdiff.errors import HubdiffError, RankLost
from hubdiff.progress import Progress

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

# For all ranks to come (imports from a cold network disk take minutes), and for one exchange.
EXCHANGE_SECONDS = 300.0
LOST_SECONDS = 30.0  # silence after which a rank counts as lost
BEAT_SECONDS, MEETING_SECONDS = 1.0, 0.02  # between two signs of life; while others are waited for
LAST_WORDS_SECONDS = 3.0  # for the others to hear of a failure before torchrun stops them

NOTHING_PUBLISHED = "nothing was published"
PUBLISHED = "the result was published before that"
UNKNOWN = "whether the result was published is not known: look there"
AGAIN = (
    "Run the same command again when the cause is mended: apply --output goes on after the files "
    "that are finished, everything else starts over."
)

# What a rank says when it ends for no fault of its own.
_FOLLOWING = ("RankLost", "KeyboardInterrupt")
_LEFT = "left"
# The store is one for as long as torchrun runs; each time that the ranks join has keys of its own.
_joined = itertools.count()


def is_first() -> bool:
    """Whether this is the process that writes, of those that accelerate works in: unlike
    ``launched`` it goes by these variables alone, whoever set them."""
    return int(os.environ.get("RANK", 0)) == 0


def launched() -> int:
    """How many processes torchrun started for this command: 1 without torchrun. ``WORLD_SIZE``
    alone does not count: clusters set it in every container, also where one command runs alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Which of them this is; 0 without torchrun."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


class Ranks:
    """One process on its own: it has all of the work and nobody to talk to. ``rank`` of ``size``,
    the ``local`` one on its machine; ``outcome`` says what became of the result, for errors."""

    rank, size, local = 0, 1, 0
    outcome = NOTHING_PUBLISHED

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides, commits and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T], nbytes: Callable[[T], int]) -> list[T]:
        """This rank's part of ``items``, in their order. Longest first, each to the rank that has
        the fewest bytes: the same split on every rank, without a word."""
        loads = [(0, rank) for rank in range(self.size)]
        mine = set()
        for index in sorted(range(len(items)), key=lambda i: -nbytes(items[i])):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + nbytes(items[index]), rank))
            if rank == self.rank:
                mine.add(index)
        return [item for index, item in enumerate(items) if index in mine]

    def gather(self, value: Any, what: str) -> list[Any]:
        """What every rank gave, by rank. ``value`` is JSON; ``what`` says, for errors, what is
        being done. All ranks call it."""
        return [value]

    def broadcast(self, value: Any, what: str) -> Any:
        """What rank 0 gave. All ranks call it."""
        return value

    def agree(self, what: str, digest: Callable[[], str]) -> None:
        """Raise ``HubdiffError`` on every rank unless ``digest`` of ``what`` is the same on all of
        them. All ranks call it."""

    def check(self) -> None:
        """Raise ``RankLost`` if another rank failed or is gone."""

    def watched(self, progress: Progress) -> Progress:
        """``progress``, with a ``check`` at every step of it."""
        return progress


ALONE = Ranks()


@contextmanager
def join() -> Iterator[Ranks]:
    """The ranks this process is one of, while the block runs: ``ALONE`` without torchrun. An error
    in the block ends all ranks; the first that fails says why, the others raise ``RankLost``."""
    if launched() == 1:
        yield ALONE
        return
    ranks = _Joined()
    with _stopped_in_words(ranks):
        try:
            yield ranks
        except BaseException as error:
            ranks.ending = True
            ranks.tell(error)
            raise
        finally:
            ranks.ending = True
            ranks.leave()


@contextmanager
def _stopped_in_words(ranks: _Joined) -> Iterator[None]:
    """When a rank is killed torchrun stops the others with SIGTERM, which says nothing by itself.
    After a failure the signal stays ignored: this process is ending and has yet to say why."""

    def stop(number: int, frame: object) -> None:
        if not ranks.ending:
            ranks.ending = True
            raise ranks.lost or ranks.error(
                f"rank {ranks.rank} was told to stop: another rank was killed, or torchrun was"
            )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


class _Joined(Ranks):
    """This process among the others."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.ending = False
        self._what = "starting"
        self._store = self._connect()
        self._watch = _Watch(self._store, self.rank, self.size)
        self._meetings = 0

    def _connect(self) -> Store:
        import torch.distributed as dist

        wait = timedelta(seconds=EXCHANGE_SECONDS)
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=wait)))
            number = next(_joined)
            mine = dist.PrefixStore(f"hubdiff-{number}", store)
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"hubdiff-gloo-{number}", store),
                rank=self.rank,
                world_size=self.size,
                timeout=wait,
            )
        except (RuntimeError, ValueError, AttributeError) as error:
            raise RankLost(
                f"rank {self.rank} on {platform.node()} did not find the other "
                f"{self.size - 1} ranks that torchrun started: {error}",
                next_step="Check MASTER_ADDR and the network between the machines "
                "(GLOO_SOCKET_IFNAME names the interface). A command that is meant to run alone "
                "inside another torchrun job needs TORCHELASTIC_RUN_ID unset.",
            ) from error
        mine.set_timeout(timedelta(seconds=LOST_SECONDS))
        return mine

    @property
    def lost(self) -> RankLost | None:
        reason = self._watch.lost
        return None if reason is None else self.error(reason, self._watch.failure)

    def error(self, reason: str, cause: dict[str, Any] | None = None) -> RankLost:
        return RankLost(
            f"{reason} (while {self._what}); {self.outcome}", next_step=AGAIN, cause=cause
        )

    def check(self) -> None:
        lost = self.lost
        if lost is not None:
            raise lost

    def watched(self, progress: Progress) -> Progress:
        return _Watched(progress, self)

    def begin(self, what: str) -> None:
        self._what = what

    def gather(self, value: Any, what: str) -> list[Any]:
        import torch
        import torch.distributed as dist

        mine = _packed(value)
        with self._meeting(what):
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(mine)]))
            longest = int(max(sizes))
            texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        return [_unpacked(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]

    def broadcast(self, value: Any, what: str) -> Any:
        import torch
        import torch.distributed as dist

        text = _packed(value if self.first else None)
        with self._meeting(what):
            size = torch.tensor([len(text)])
            dist.broadcast(size, 0)
            if not self.first:
                text = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(text, 0)
        return _unpacked(text)

    def agree(self, what: str, digest: Callable[[], str]) -> None:
        given = self.gather(digest(), f"comparing {what}")
        others = [rank for rank, found in enumerate(given) if found != given[0]]
        if others:
            names = ", ".join(map(str, others))
            raise HubdiffError(
                f"{what} of rank {names} is not that of rank 0; nothing was written",
                next_step="Start every rank with the same command line and the same version of "
                "hubdiff, and see that all machines read the same files.",
            )

    @contextmanager
    def _meeting(self, what: str) -> Iterator[None]:
        """All ranks are here when the block begins, so that the exchange in it is short however
        long the others worked before it."""
        self.begin(what)
        self._meetings += 1
        self._watch.meet(self._meetings, self.check)
        try:
            yield
        except RuntimeError as error:  # gloo's: a connection that broke, or time that ran out
            self._watch.hear()
            raise self.lost or self.error(f"the connection to another rank broke: {error}") from (
                error
            )

    def tell(self, error: BaseException) -> None:
        """Say to the others that this rank ends. Raises ``RankLost`` instead of an error that
        another rank says already, in the same words."""
        mine = {
            "rank": self.rank,
            "type": type(error).__name__,
            "message": str(error),
            "next_step": getattr(error, "next_step", None),
        }
        said = self._watch.tell(mine)
        repeated = said is not None and {**said, "rank": self.rank} == mine
        if said is not None and repeated and isinstance(error, Exception):
            raise self.error(f"rank {said['rank']} failed", said) from error

    def leave(self) -> None:
        import torch.distributed as dist

        self._watch.leave()
        with suppress(RuntimeError):
            dist.destroy_process_group()


class _Watch:
    """One thread that does all talking with the store that torchrun gives to its ranks: it says
    that this rank lives and how many meetings it came to, and hears the same of the others."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._others = [other for other in range(size) if other != rank]
        self._place, self._beats = 0, 0
        self._places = dict.fromkeys(self._others, 0)
        self._heard = dict.fromkeys(self._others, ("", time.monotonic()))
        self.lost: str | None = None
        self.failure: dict[str, Any] | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._waiting = False
        self._lock = threading.Lock()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="hubdiff-ranks", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(MEETING_SECONDS if self._waiting else BEAT_SECONDS)
            self._wake.clear()
            self.hear()

    def hear(self) -> None:
        """Beat and listen once, now."""
        with self._lock:
            try:
                self._beat()
                self._listen()
            except RuntimeError:  # it does not come back: the store's client never reconnects
                self._lose("the torchrun that rank 0's machine runs is gone, or can't be reached")
                self._stop.set()

    def _beat(self, state: str | None = None) -> None:
        self._beats += 1
        self._store.set(f"alive/{self._rank}", f"{state or self._beats} {self._place}")

    def _listen(self) -> None:
        if self._store.check(["failed"]):
            self.failure = json.loads(self._store.get("failed"))
            rank, kind = self.failure["rank"], self.failure["type"]
            if rank != self._rank:
                self._lose(f"rank {rank} {'stopped' if kind in _FOLLOWING else 'failed'}")
        for other in self._others:
            self._hear_of(other)

    def _hear_of(self, other: int) -> None:
        beat, now = self._last_beat(other), time.monotonic()
        if beat != self._heard[other][0]:
            self._heard[other] = (beat, now)
            self._places[other] = int(beat.split()[1])
        left = beat.startswith(_LEFT)
        if left and self._places[other] < self._place:
            self._lose(f"rank {other} ended before its work was done")
        elif not left and now - self._heard[other][1] > LOST_SECONDS:
            self._lose(f"rank {other} has not been heard of for {LOST_SECONDS:.0f} s")

    def _last_beat(self, other: int) -> str:
        key = f"alive/{other}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _has_left(self, other: int) -> bool:
        return self._last_beat(other).startswith(_LEFT)

    def _lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason

    def meet(self, place: int, check: Callable[[], None]) -> None:
        """Wait until every rank came to the meeting number ``place``."""
        self._place, self._waiting = place, True
        try:
            while min(self._places.values()) < place:
                self._wake.set()
                check()
                time.sleep(MEETING_SECONDS)
        finally:
            self._waiting = False

    def tell(self, failure: dict[str, Any]) -> dict[str, Any] | None:
        """Make ``failure`` known, unless one is: then that one is returned."""
        try:
            with self._lock:
                said = json.loads(self._store.compare_set("failed", "", json.dumps(failure)))
        except RuntimeError:
            return None
        self.failure = said
        return None if said == failure else said

    def leave(self) -> None:
        """The last sign of life. Rank 0, and a rank that failed, wait a little for the others:
        with the one torchrun loses its store, the other is its reason to stop them all."""
        self._stop.set()
        self._wake.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._beat(_LEFT)
            if self._rank == 0 or (self.failure or {}).get("rank") == self._rank:
                until = time.monotonic() + LAST_WORDS_SECONDS
                # One that is silent since then is not there to hear anything.
                there = [
                    o
                    for o, (_, when) in self._heard.items()
                    if until - when < 2 * LAST_WORDS_SECONDS
                ]
                while time.monotonic() < until and not all(map(self._has_left, there)):
                    time.sleep(MEETING_SECONDS)


class _Watched:
    """A progress that hears of lost ranks."""

    def __init__(self, inner: Progress, ranks: _Joined) -> None:
        self._inner, self._ranks = inner, ranks

    def start(self, what: str, total: int, unit: str = "") -> None:
        self._ranks.begin(what)
        self._ranks.check()
        self._inner.start(f"{what}, rank {self._ranks.rank} of {self._ranks.size}", total, unit)

    def advance(self, count: int) -> None:
        self._ranks.check()
        self._inner.advance(count)

    def finish(self) -> None:
        self._inner.finish()

    def note(self, text: str) -> None:
        self._inner.note(text)


def _packed(value: Any) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.frombuffer(json.dumps(value).encode(), np.uint8).copy())


def _unpacked(text: Any) -> Any:
    return json.loads(text.numpy().tobytes())
