"""record: what became of a plan's items, written into the lock, committed and pushed.

The commit is made beside the work tree: it holds the lock file and nothing else, whatever is
changed or staged there. It is based on what the remote has at that moment, so no other commit is
pushed with it; where somebody pushed in between, the lock is merged with theirs and tried again.

Who may push is git's affair (``GIT_CONFIG_COUNT`` with an ``extraheader``, a helper, ssh): nothing
of it is read or kept here, and what git says is shown without what could be a password.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.backport.lock import LOCK, Lock, merge, parse_lock, read_lock
from hubdiff.backport.outcomes import (
    Planned,
    merge_outcomes,
    now,
    read_outcomes,
    read_planned,
    strangers,
    words,
)
from hubdiff.errors import HubdiffError
from hubdiff.progress import Progress, Silent

if TYPE_CHECKING:
    from git import GitCommandError

TRIES = 5
WAIT_SECONDS = 1.0  # before the second push; doubled each time
_BOT = ("github-actions[bot]", "41898282+github-actions[bot]@users.noreply.github.com")
# What git says where somebody else pushed first; anything else is not mended by trying again.
_RACE = re.compile(
    r"\((fetch first|non-fast-forward|stale info|cannot lock ref|failed to update ref"
    r"|incorrect old value provided|failed to lock|reference already exists)"
)


@dataclass(frozen=True)
class Recorded:
    """``outcomes`` are the entries that were news to the lock, ``commit`` is None where there was
    nothing to record; ``text`` is the lock with them."""

    lock: str
    outcomes: tuple[Mapping[str, Any], ...]
    message: str | None
    commit: str | None
    pushed: bool
    dry_run: bool
    text: str

    def as_json(self) -> dict[str, Any]:
        return {
            "lock": self.lock,
            "outcomes": [dict(one) for one in self.outcomes],
            "message": self.message,
            "commit": self.commit,
            "pushed": self.pushed,
            "dry_run": self.dry_run,
        }


def record(
    plan: str | Path,
    results: str | Path,
    *,
    lock: str | Path = LOCK,
    push: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Recorded:
    """Write into the lock what became of the items of ``plan``, and commit it.

    Args:
        results: the folder with one folder for each item.
        lock: the file; it must lie in a git repository.
        push: also push the commit to the branch that is checked out, trying again, with the lock
            of the remote merged in, where somebody else was faster.
        dry_run: only say what would be committed, as far as it is known here.

    To do it twice is to do it once. Nothing is committed where nothing is new, except for a date
    after 45 quiet days. Raises ``HubdiffError``; then nothing was changed.
    """
    planned, place = read_planned(Path(plan)), Path(lock)
    outcomes = [one.entry(now()) for one in read_outcomes(planned, Path(results))]
    said = progress or Silent()
    for name in strangers(planned, Path(results)):
        said.note(f"ignored {name}: the plan has no such item")
    if dry_run:
        news = _news(read_lock(place), planned, outcomes, None)
        return _recorded(place, news, None, False, True)
    with _Checkout(place) as checkout:
        if push:
            return _pushed(checkout, planned, outcomes, said)
        news = _news(read_lock(place), planned, outcomes, checkout.last_commit())
        if news.message is None:
            return _recorded(place, news, None, False, False)
        commit = checkout.commit(news.lock.dumps(), news.message, checkout.head())
        checkout.adopt(commit, news.lock.dumps(), said)
    return _recorded(place, news, commit, False, False)


@dataclass(frozen=True)
class _News:
    """The lock as it is to be, and the message of the commit; None: it is so already."""

    lock: Lock
    outcomes: tuple[dict[str, Any], ...]
    message: str | None


def _recorded(
    place: Path, news: _News, commit: str | None, pushed: bool, dry_run: bool
) -> Recorded:
    return Recorded(
        str(place), news.outcomes, news.message, commit, pushed, dry_run, news.lock.dumps()
    )


def _news(
    known: Lock, planned: Planned, outcomes: Sequence[dict[str, Any]], active: float | None
) -> _News:
    """What ``known`` is to become. ``active``: when something last happened in the repository."""
    fresh = merge_outcomes(known, list(outcomes))
    after = known.after(planned.document, fresh)
    if fresh:
        return _News(after, tuple(fresh), _message(fresh))
    dated = changed(after, checked_at=now())
    if not known.watches(planned.document):
        return _News(dated, (), "hubdiff: record what is watched")
    if known.is_stale(active):
        return _News(dated, (), "hubdiff: looked, nothing is new")
    return _News(known, (), None)


def _message(fresh: Sequence[Mapping[str, Any]]) -> str:
    noun = "item" if len(fresh) == 1 else "items"
    lines = [
        words(f"- {one['delta']} on {_short(one['base'])}: {one['status']}") for one in fresh[:50]
    ]
    more = [f"- and {len(fresh) - 50} more"] if len(fresh) > 50 else []
    return "\n".join([f"hubdiff: record {len(fresh)} {noun}", "", *lines, *more])


def _short(ref: str) -> str:
    repo, _, commit = ref.partition("@")
    return f"{repo}@{commit[:12]}"


# --- pushing ---


def _pushed(
    checkout: _Checkout,
    planned: Planned,
    outcomes: Sequence[dict[str, Any]],
    progress: Progress,
) -> Recorded:
    for number in range(TRIES):
        if number:
            progress.note(f"somebody else pushed first: try {number + 1} of {TRIES}")
            time.sleep(WAIT_SECONDS * 2 ** (number - 1) * random.uniform(0.5, 1.5))
        tip = checkout.remote_tip()
        theirs = checkout.lock_at(tip)
        known = merge(theirs, checkout.lock_here(tip))
        news = _news(known, planned, outcomes, checkout.last_commit())
        if news.message is None:
            if _says_nothing_new(known, theirs):
                return _recorded(checkout.place, news, None, False, False)
            news = changed(news, message="hubdiff: record what was kept here")
        commit = checkout.commit(news.lock.dumps(), str(news.message), tip or checkout.head())
        if checkout.push(commit):
            checkout.adopt(commit, news.lock.dumps(), progress)
            return _recorded(checkout.place, news, commit, True, False)
    raise HubdiffError(
        f"others pushed to {checkout.branch} of {checkout.remote} before each of {TRIES} tries",
        next_step="Run it again: the results are still there, and nothing was changed.",
    )


def _says_nothing_new(one: Lock, known: Lock) -> bool:
    """Whether ``known`` has all of ``one``, apart from where bases stand now, which moves."""
    return (
        one.items == known.items
        and one.bases.keys() == known.bases.keys()
        and one.deltas.keys() == known.deltas.keys()
        and one.checked_at == known.checked_at
    )


class _Checkout:
    """The git repository that a lock file lies in. Raises ``HubdiffError`` for all that git says
    no to."""

    def __init__(self, lock: Path) -> None:
        try:
            import git
        except ImportError as error:  # GitPython raises this where there is no git program
            raise HubdiffError(
                "there is no git program", next_step="Install git, and run it again."
            ) from error
        self.place = lock
        # The folder is resolved, the file is not: a link that stands there is replaced.
        folder = Path(os.path.realpath(lock.parent))
        try:
            self._repo = git.Repo(folder, search_parent_directories=True)
        except git.GitError as error:
            raise HubdiffError(
                f"{lock} does not lie in a git repository, and can't be committed",
                next_step="Run git init there, or leave the lock in your repository.",
            ) from error
        root = self._repo.working_tree_dir
        if root is None:
            raise HubdiffError(f"{folder} is a bare git repository", next_step="Use a checkout.")
        self._path = (folder / lock.name).relative_to(os.path.realpath(root)).as_posix()
        self._git = self._repo.git
        # No question that nobody answers; no trace that shows a token (GIT_CURL_VERBOSE is on with
        # any value, so what it prints must be redacted).
        self._git.update_environment(
            GIT_TERMINAL_PROMPT="0", GIT_TRACE="0", GIT_TRACE_CURL="0", GIT_TRACE_REDACT="1"
        )

    def __enter__(self) -> _Checkout:
        return self

    def __exit__(self, *_: object) -> None:
        self._repo.close()

    # --- what there is ---

    def head(self) -> str | None:
        return str(self._repo.head.commit.hexsha) if self._repo.head.is_valid() else None

    def last_commit(self) -> float | None:
        return float(self._repo.head.commit.committed_date) if self.head() else None

    @property
    def branch(self) -> str:
        """That is checked out; in a job on GitHub with a detached head the one it runs for."""
        if not self._repo.head.is_detached:
            return str(self._repo.active_branch.name)
        ref = os.environ.get("GITHUB_REF", "")
        if ref.startswith("refs/heads/"):
            return ref.removeprefix("refs/heads/")
        raise HubdiffError(
            "no branch is checked out that could be pushed", next_step="Check out a branch."
        )

    @property
    def remote(self) -> str:
        if not self._repo.head.is_detached:
            tracked = self._repo.active_branch.tracking_branch()
            if tracked is not None:
                return str(tracked.remote_name)
        names = [remote.name for remote in self._repo.remotes]
        if "origin" in names or len(names) == 1:
            return "origin" if "origin" in names else str(names[0])
        raise HubdiffError(
            "the git repository has no remote to push to",
            next_step="Add one with git remote add origin, or leave --push out.",
        )

    def remote_tip(self) -> str | None:
        """The commit that the branch has where it is pushed to, fetched; None: no such branch."""
        url = self._run("remote", "get-url", "--push", self.remote)
        ref = f"refs/heads/{self.branch}"
        listed = self._run("ls-remote", url, ref).split()
        if not listed:
            return None
        tip = str(listed[0])
        # Asked for by name, as not every server gives a commit by its id; it may have moved on.
        self._run("fetch", "--quiet", "--no-tags", "--no-recurse-submodules", url, ref)
        return str(self._run("rev-parse", "FETCH_HEAD")) or tip

    def lock_here(self, tip: str | None) -> Lock:
        """What the lock of the work tree has that ``tip`` was made without. The rest was known
        there: where it is otherwise by now, or removed, what lies here is old."""
        here, head = read_lock(self.place), self.head()
        if head is None or tip is None:
            return here
        if not self._repo.is_ancestor(self._repo.commit(head), self._repo.commit(tip)):
            return here
        return here.without(self.lock_at(head))

    def lock_at(self, commit: str | None) -> Lock:
        """Empty where that commit has none."""
        if commit is None or not self._run("ls-tree", "--name-only", commit, "--", self._path):
            return Lock()
        # ls-tree takes paths from the work tree's root, as it runs there.
        text = self._run("cat-file", "blob", f"{commit}:{self._path}")
        return parse_lock(text, f"{self.place} of {self.remote}")

    # --- what is made ---

    def commit(self, text: str, message: str, parent: str | None) -> str:
        """The id of a new commit on ``parent`` in which only the lock differs; no branch has it."""
        with tempfile.TemporaryDirectory(prefix="hubdiff-") as scratch:
            content = Path(scratch) / "lock"
            content.write_text(text, encoding="utf-8")
            blob = self._run("hash-object", "-w", "--no-filters", str(content))
            with self._git.custom_environment(GIT_INDEX_FILE=str(Path(scratch) / "index")):
                if parent is not None:
                    self._run("read-tree", parent)
                self._stage(blob)
                tree = self._run("write-tree")
        parents = ["-p", parent] if parent else []
        with self._git.custom_environment(**self._identity()):
            return self._run("commit-tree", tree, *parents, "-m", message)

    def push(self, commit: str) -> bool:
        """Whether the branch of the remote took it; False where somebody else was faster."""
        from git import GitCommandError

        try:
            self._git.push("--porcelain", self.remote, f"{commit}:refs/heads/{self.branch}")
        except GitCommandError as error:
            if _RACE.search(f"{error.stdout}{error.stderr}"):
                return False
            raise _refused(f"{self.remote} did not take the push to {self.branch}", error) from None
        return True

    def adopt(self, commit: str, text: str, progress: Progress) -> None:
        """Bring the checkout to a commit that was made or pushed, touching nothing but the lock,
        or what others pushed where the work tree is free for it."""
        from hubdiff.writer import write_whole

        parents = [str(parent.hexsha) for parent in self._repo.commit(commit).parents]
        if parents == ([self.head()] if self.head() else []):
            self._run("update-ref", "-m", "hubdiff: record", "HEAD", commit)
            self._stage(self._run("rev-parse", f"{commit}:{self._path}"))
            write_whole(self.place, text.encode())
            return
        from git import GitCommandError

        try:
            self._git.merge("--ff-only", "--quiet", commit)
        except GitCommandError:
            progress.note("it is pushed, and not in this checkout yet: git pull brings it")

    def _stage(self, blob: str) -> None:
        self._run("update-index", "--add", "--cacheinfo", f"100644,{blob},{self._path}")

    def _identity(self) -> dict[str, str]:
        """Who commits, where git does not know: GitHub's own bot, as its jobs do."""
        from git import GitCommandError

        given: dict[str, str] = {}
        for name, fallback in zip(("name", "email"), _BOT, strict=True):
            try:
                known = self._git.config("--get", f"user.{name}")
            except GitCommandError:  # git config's way to say that there is none
                known = ""
            for role in ("AUTHOR", "COMMITTER"):
                variable = f"GIT_{role}_{name.upper()}"
                given[variable] = os.environ.get(variable) or known or fallback
        return given

    def _run(self, *command: str) -> str:
        from git import GitCommandError

        try:
            return str(self._git.execute(["git", *command], strip_newline_in_stdout=True))
        except GitCommandError as error:
            raise _refused(f"git {command[0]} failed", error) from None


def _refused(what: str, error: GitCommandError) -> HubdiffError:
    """In git's words, which name the reason: a protected branch, a hook, no right to write."""
    said = f"{error.stderr}\n{error.stdout}"
    # GitPython puts the stream's name and quotes around what git said.
    lines = [re.sub(r"^\s*std(err|out): '|'$", "", line).strip() for line in said.splitlines()]
    kept = [_without_secrets(line) for line in lines if line and not line.startswith("Done")]
    shown = "\n".join(dict.fromkeys(kept))[:2000]
    return HubdiffError(
        f"{what}:\n{shown}",
        next_step="In a workflow the job needs permissions: contents: write, and git the token; a "
        "protected branch must let it push, or the lock lives on a branch of its own.",
    )


def _without_secrets(line: str) -> str:
    hidden = re.sub(r"://[^/@\s]+@", "://", line)
    return re.sub(r"(?i)(authorization:?\s*(?:basic|bearer)?\s*)\S+", r"\1***", hidden)
