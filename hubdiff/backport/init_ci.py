"""init-ci: the workflow, a configuration and a page of instructions, written into a repository.

The workflow is pinned to a commit of hubdiff, not to a tag, which could be moved. What stands there
already is never replaced unasked, and ``hubdiff.yaml``, which is the user's own, never at all.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff._version import __version__
from hubdiff.backport.config import CONFIG, read_config
from hubdiff.card import template
from hubdiff.errors import HubdiffError
from hubdiff.writer import write_whole

if TYPE_CHECKING:
    from git import Repo

HOME = "hubdiff/hubdiff"
HOME_URL = f"https://github.com/{HOME}"
WORKFLOW, PAGE = ".github/workflows/hubdiff.yml", ".github/HUBDIFF.md"
WRITTEN, REPLACED, UNCHANGED, KEPT = "written", "replaced", "unchanged", "kept"
_TEMPLATES = {WORKFLOW: "hubdiff.yml", CONFIG: "hubdiff.yaml", PAGE: "README.md"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PIN = re.compile(rf"{HOME}/\.github/workflows/backport\.yml@([0-9a-f]{{40}})(?: # v(\S+))?")
_GITHUB = re.compile(
    r"(?:https://(?:[^@/]+@)?github\.com/|(?:ssh://)?git@github\.com[:/])"
    r"([A-Za-z0-9-]+/[A-Za-z0-9_.-]+?)(?:\.git)?/?"
)
_SECONDS = 60


@dataclass(frozen=True)
class Publisher:
    """What a repo's trusted publisher has to be set to. ``repository`` and ``branch`` are None
    where the clone does not tell them; ``settings`` is the page on the Hub."""

    repo: str
    repository: str | None
    workflow: str
    branch: str | None
    settings: str


@dataclass(frozen=True)
class Initialised:
    """``files``: path → written, replaced, unchanged, or kept, though it would differ now."""

    root: str
    commit: str
    files: dict[str, str]
    publishers: tuple[Publisher, ...]
    dry_run: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def init_ci(
    directory: str | Path = ".",
    *,
    commit: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Initialised:
    """Set up the GitHub workflow in the git repository that ``directory`` is in.

    Args:
        commit: of hubdiff, 40 hex digits, for the workflow to run. Default: the one it has there
            already, else that of this version's tag, which is asked of GitHub.
        force: replace files that are not as they would be written, and take the commit of this
            version. hubdiff.yaml is kept all the same.
        dry_run: write nothing.

    Also says what each repo of ``publish.to`` in hubdiff.yaml needs as a trusted publisher. Raises
    ``HubdiffError``; then nothing was written.
    """
    if commit is not None and not _COMMIT.fullmatch(commit):
        raise HubdiffError(
            f"{commit!r} is not a commit", next_step="Give the 40 hex digits of one."
        )
    repo = _repository(Path(directory))
    try:
        root = Path(str(repo.working_tree_dir))
        origin, branch = _origin(repo), _branch(repo)
    finally:
        repo.close()
    pin = _pin(root / WORKFLOW, commit, force)
    texts = dict(_rendered(pin, origin, branch))
    states = {path: _state(root / path, text, force) for path, text in texts.items()}
    publishers = _publishers(root / CONFIG, origin, branch) if states[CONFIG] != WRITTEN else ()
    if not dry_run:
        for path, text in texts.items():
            if states[path] in (WRITTEN, REPLACED):
                _write(root / path, text)
    return Initialised(str(root), pin.commit, states, tuple(publishers), dry_run)


# --- the repository ---


def _repository(directory: Path) -> Repo:
    try:
        import git
    except ImportError as error:  # GitPython raises this where there is no git program
        raise HubdiffError(
            "there is no git program", next_step="Install git, and run it again."
        ) from error
    try:
        repo = git.Repo(directory, search_parent_directories=True)
    except git.GitError as error:
        raise HubdiffError(
            f"{directory} is in no git repository",
            next_step="Run it in a clone of the GitHub repository that the workflow is for.",
        ) from error
    if repo.working_tree_dir is None:
        repo.close()
        raise HubdiffError(f"{directory} is a bare git repository", next_step="Use a clone.")
    return repo


def _origin(repo: Repo) -> str | None:
    """``owner/name`` on GitHub."""
    urls = [url for remote in repo.remotes if remote.name == "origin" for url in remote.urls]
    found = _GITHUB.fullmatch(urls[0]) if urls else None
    return found[1] if found else None


def _branch(repo: Repo) -> str | None:
    """The default one of ``origin``, as schedules run there; else the one that is checked out."""
    head = "refs/remotes/origin/HEAD"
    for ref in repo.refs:
        if ref.path == head:
            return str(ref.reference.path).removeprefix("refs/remotes/origin/")
    return None if repo.head.is_detached else str(repo.active_branch.name)


# --- the commit ---


@dataclass(frozen=True)
class _Pinned:
    commit: str
    version: str | None

    def __str__(self) -> str:
        """As it stands in a workflow, where renovators read the version from the comment."""
        return self.commit + (f" # v{self.version}" if self.version else "")


def _pin(workflow: Path, commit: str | None, force: bool) -> _Pinned:
    if commit is not None:
        return _Pinned(commit, None)
    there = _PIN.search(workflow.read_text(errors="replace")) if workflow.is_file() else None
    if there and not force:
        return _Pinned(there[1], there[2])
    return _Pinned(_released(), __version__)


def _released() -> str:
    """The commit of this version's tag."""
    import git

    tag = f"refs/tags/v{__version__}"
    give = "Give the commit of hubdiff that the workflow is to run, as --commit SHA."
    try:
        said = git.Git().ls_remote(
            HOME_URL,
            tag,
            f"{tag}^{{}}",
            env={"GIT_TERMINAL_PROMPT": "0"},
            kill_after_timeout=_SECONDS,
        )
    except git.GitError as error:
        raise HubdiffError(
            f"{HOME_URL} can't be asked for the commit of v{__version__}", next_step=give
        ) from error
    lines = [line.partition("\t") for line in str(said).splitlines()]
    found = {ref: sha for sha, _, ref in lines}
    # An annotated tag is an object of its own; with ^{} comes the commit it is for.
    commit = found.get(f"{tag}^{{}}") or found.get(tag)
    if commit is None or not _COMMIT.fullmatch(commit):
        raise HubdiffError(f"{HOME_URL} has no tag v{__version__}", next_step=give)
    return commit


# --- the files ---


def _rendered(pin: _Pinned, origin: str | None, branch: str | None) -> Iterator[tuple[str, str]]:
    import jinja2

    # Not the usual braces: GitHub's own expressions are written with them.
    environment = jinja2.Environment(
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    values = {
        "home": HOME,
        "pin": str(pin),
        "minute": _minute(origin or ""),
        "repository": origin,
        "branch": branch,
        "relay": f"{HOME_URL}/blob/{pin.commit}/templates/jobs/relay.py",
    }
    for path, name in _TEMPLATES.items():
        text = template(f"github/{name}")
        yield path, environment.from_string(text).render(values)


def _minute(repository: str) -> int:
    """An odd minute, always the same for a repository, so that not all of them ask at once."""
    return hashlib.sha256(repository.encode()).digest()[0] % 30 * 2 + 1


def _state(file: Path, text: str, force: bool) -> str:
    if not file.is_file():
        if file.exists() or file.is_symlink():
            raise HubdiffError(f"{file} is not a file", next_step="Move it away, and run it again.")
        return WRITTEN
    if file.read_bytes() == text.encode():
        return UNCHANGED
    return REPLACED if force and file.name != CONFIG else KEPT


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text.encode())


def _publishers(config: Path, origin: str | None, branch: str | None) -> Iterator[Publisher]:
    """One for each repo that something is published to."""
    read = read_config(config)
    deltas = [delta for family in read.families for delta in family.deltas]
    to = {d.publish.to: None for d in deltas if d.publish.to and d.publish.mode != "none"}
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    for repo in to:
        yield Publisher(repo, origin, Path(WORKFLOW).name, branch, f"{hub}/{repo}/settings")
