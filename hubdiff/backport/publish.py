"""publish: an item that passed the gate, onto the Hub: as a pull request or a branch.

Whatever is killed when, the same item is never published twice: its branch is always called the
same, the last commit there carries its key, and a pull request its id in the title. A pull request
with that title may be anybody's, so it counts only where it is our own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff.backport.gate import gate, read_result
from hubdiff.backport.items import DELTA, DELTA_KIND, Item, planned_item, write_document
from hubdiff.card import PICTURE, page
from hubdiff.checkpoint import MANIFEST
from hubdiff.errors import AuthError, HubdiffError, RepoNotFound
from hubdiff.files import open_tree, safe_path
from hubdiff.manifest import read_manifest
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.sidecars import Carried, classify

if TYPE_CHECKING:
    from hubdiff.hub import PullRequest

PUBLISHED, CARD = "published.json", "README.md"
PR, BRANCH, NONE = "pr", "branch", "none"
TRAILER = "hubdiff-key"
_SECTION = "backport_section.md"
_GIT_ATTRIBUTES = ".gitattributes"


@dataclass(frozen=True)
class Published:
    """Where an item is on the Hub. ``reused``: an earlier run had put it there already."""

    id: str
    to: str | None
    kind: str
    mode: str
    branch: str | None = None
    commit: str | None = None
    url: str | None = None
    pr_url: str | None = None
    reused: bool = False
    dry_run: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def publish_item(
    plan: str | Path,
    results: str | Path,
    *,
    item: str,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Published:
    """Publish an item of ``plan``, whose result lies in ``results``/ID, and say so in
    ``published.json`` there. The gate is asked again: what ``results`` says of itself may be
    anybody's. The repo must exist. Raises ``HubdiffError``."""
    found = planned_item(Path(plan), item)
    folder = Path(results) / found.id
    result = read_result(found, Path(results))
    said = gate(found, result)
    if not said.passed:
        raise HubdiffError(
            f"{found.family}/{found.delta} on {found.base} is not published: "
            + "; ".join(said.reasons),
            next_step="hubdiff backport gate shows the numbers.",
        )
    made = _Publish(found, folder, result, progress or Silent()).run(dry_run)
    if not dry_run:
        write_document(results, item, PUBLISHED, made.as_json())
    return made


class _Publish:
    def __init__(
        self, item: Item, folder: Path, result: Mapping[str, Any], progress: Progress
    ) -> None:
        self._item, self._folder, self._result = item, folder, result
        self._progress = progress
        self._to = item.publish.to or ""

    def run(self, dry_run: bool) -> Published:
        mode = self._item.publish.mode
        if mode == NONE:
            return self._published(NONE)
        self._check_delta()
        self._require_repo()
        made = self._earlier(mode, dry_run)
        if made is not None:
            return made
        if dry_run:
            return Published(self._item.id, self._to, self._item.publish.kind, mode, dry_run=True)
        if mode == PR:
            try:
                return self._send(PR)
            except AuthError as error:
                # A trusted publisher's token may be one that opens no pull requests.
                self._progress.note(f"no pull request can be opened ({error}): a branch instead")
        return self._send(BRANCH)

    # --- what is there already ---

    def _earlier(self, mode: str, dry_run: bool) -> Published | None:
        """What an earlier run left, whichever way it went; a merged model that it was killed beside
        is completed."""
        from hubdiff.hub import pointers, pull_requests

        branch = self._item.branch
        if branch in pointers(self._to).branches:
            commit = self._complete(branch)
            if commit is not None:
                return self._published(BRANCH, commit=commit, reused=True)
        if mode == PR:
            for one in pull_requests(self._to):
                if one.title.endswith(self._mark) and self._is_ours(one):
                    commit = self._complete(one.ref)
                    if commit is None and not dry_run:
                        commit = self._add_numbers(one.ref)
                    return self._published(PR, commit=commit, pr_url=one.url, reused=True)
        return None

    def _complete(self, revision: str) -> str | None:
        """The commit there that carries the key; people may have added others since."""
        from hubdiff.hub import messages

        found = messages(self._to, revision)
        return next(
            (c for c, said in found.items() if f"{TRAILER}: {self._item.key}" in said), None
        )

    def _is_ours(self, one: PullRequest) -> bool:
        """By its author, now or when it was a trusted publisher: made again, by another version or
        on another device, the bytes may differ; and anybody can make the same ones."""
        from hubdiff.hub import TRUSTED_PUBLISHER, who

        return one.author in (TRUSTED_PUBLISHER, who())

    # --- sending ---

    def _send(self, mode: str) -> Published:
        from hubdiff.hub import make_branch

        if mode == BRANCH:
            make_branch(self._to, self._item.branch)
        if self._item.publish.kind == DELTA_KIND:
            return self._send_delta(mode)
        return self._send_merged(mode)

    def _send_delta(self, mode: str) -> Published:
        from hubdiff.hub import HubUpload

        upload = HubUpload(
            self._to,
            revision=self._item.branch if mode == BRANCH else None,
            create_pr=mode == PR,
        )
        paths = [path.relative_to(self._delta) for path in sorted(self._delta.rglob("*"))]
        names = {str(path) for path in paths if (self._delta / path).is_file()}
        for name in sorted(names):
            if name == CARD:
                upload.add_bytes(name, self._with_section((self._delta / name).read_bytes()))
            else:
                upload.add(safe_path(name), self._delta / name)
        for name in upload.existing_files():
            if name not in names and name != _GIT_ATTRIBUTES:
                upload.delete(name)
        done = upload.commit(self._title, self._trailer)
        return self._published(mode, commit=done.oid, url=done.url, pr_url=done.pr_url)

    def _send_merged(self, mode: str) -> Published:
        """Merged again, streaming, the same bytes; then the numbers, with the key that says it is
        complete."""
        from hubdiff.jobs.apply import apply

        branch = self._item.branch
        done = apply(
            f"hf://{self._item.source}",
            f"hf://{self._item.base}",
            push_to=f"hf://{self._to}@{branch}" if mode == BRANCH else f"hf://{self._to}",
            scale=self._scale,
            pr=mode == PR,
            public=self._item.publish.public,
            force=True,
            message=self._title,
            progress=self._progress,
        )
        last = self._add_numbers(branch if mode == BRANCH else _ref(done.pr_url))
        return self._published(mode, commit=last, pr_url=done.pr_url)

    def _add_numbers(self, revision: str) -> str:
        """The card of a merged model told how it was made and measured; the commit."""
        from hubdiff.hub import HubUpload

        upload = HubUpload(self._to, revision=revision)
        upload.add_bytes(CARD, self._with_section(upload.read(CARD)))
        return upload.commit(self._title, self._trailer).oid

    # --- what it says ---

    @property
    def _delta(self) -> Path:
        return self._folder / DELTA

    @property
    def _mark(self) -> str:
        return f"[hubdiff {self._item.id}]"

    @property
    def _title(self) -> str:
        """For people, with what finds it again at the end."""
        base, what = self._item.base.partition("@")[0], self._item.delta
        return f"{what} on {base} {self._mark}"

    @property
    def _trailer(self) -> str:
        item = self._item
        return f"From {item.source}\n\n{TRAILER}: {item.key}"

    @property
    def _scale(self) -> float:
        scale = self._result.get("scale")
        if scale not in self._item.scales:
            raise HubdiffError(f"the scale {scale!r} is not one of those that were to be tried")
        return float(scale)

    def _with_section(self, card: bytes) -> bytes:
        source, base = (
            dict(zip(("repo", "commit"), ref.split("@"), strict=True))
            for ref in (self._item.source, self._item.base)
        )
        check = self._result.get("check")
        section = page(
            _SECTION,
            delta=source,
            base=base,
            scale=f"{self._scale:g}",
            verdict=str(check.get("verdict") if isinstance(check, dict) else "nothing"),
            halved=len(self._item.scales) > 1,
            **_rows(self._item, self._result),
        )
        # A card may be anybody's bytes, and the Hub takes text only.
        return f"{card.decode(errors='replace').rstrip()}\n\n{section}".encode()

    def _check_delta(self) -> None:
        """The delta that lies there is one, of the planned base, and all of it lies there: no link
        leads out. It was made by a job that ran somebody's code."""
        if self._item.publish.kind != DELTA_KIND:
            return
        paths = sorted(self._delta.rglob("*"))
        links = [path for path in (self._delta, *paths) if path.is_symlink()]
        if links:
            raise HubdiffError(f"{links[0]} is a link: a delta has files only")
        manifest = read_manifest(open_tree(ModelRef(repo=None, revision=None, path=self._delta)))
        if f"{manifest.base.repo}@{manifest.base.commit}" != self._item.base:
            raise HubdiffError(
                f"{self._delta} is a delta of {manifest.base.repo}@{manifest.base.commit}, and not "
                f"of {self._item.base}",
                next_step="Run hubdiff backport run again.",
            )
        listed = {file.path for files in manifest.layers.values() for file in files}
        listed |= {file.path for file in manifest.side_files} | {MANIFEST, CARD, PICTURE}
        for path in paths:
            name = path.relative_to(self._delta).as_posix()
            if path.is_file() and not _belongs(name, path.stat().st_size, listed):
                raise HubdiffError(f"{path} is no file of a delta: nothing is published")

    def _require_repo(self) -> None:
        """The repo exists, and may hold what is made of this base and this delta."""
        from hubdiff.hub import see

        try:
            to = see(self._to)
        except RepoNotFound as error:
            raise HubdiffError(
                str(error),
                next_step=f"Create it first (hf repos create {self._to}): a trusted publisher's "
                "token can't, and nobody should by accident.",
            ) from error
        if to.private or self._item.publish.public:
            return
        for ref in (self._item.base, self._item.source):
            if _closed(ref.partition("@")[0]):
                raise HubdiffError(
                    f"{ref} is gated or private, and {self._to} is public",
                    next_step="Make the repo private; or, where the terms allow it, say publish: "
                    "{public: true} in hubdiff.yaml.",
                )

    def _published(self, mode: str, **where: Any) -> Published:
        from hubdiff.hub import endpoint

        branch = self._item.branch if mode == BRANCH else None
        if branch and not where.get("url"):
            where["url"] = f"{endpoint()}/{self._to}/tree/{branch}"
        to = self._item.publish.to
        return Published(self._item.id, to, self._item.publish.kind, mode, branch, **where)


def _belongs(name: str, size: int, listed: Collection[str]) -> bool:
    """Whether a file is one of a delta's. Of what a manifest lists, too, since whoever made the
    delta wrote that: only what hubdiff would carry, which leaves out pickles and their like."""
    if name not in listed:
        return False
    folder, _, inside = name.partition("/")
    if folder in ("tuned", "base"):
        return isinstance(classify(inside, size), Carried)
    return name.endswith((".safetensors", ".json", ".json.zst", ".png", ".md"))


def _closed(repo: str) -> bool:
    """What can't be seen from here, as with a trusted publisher's token, is private."""
    from hubdiff.hub import see

    try:
        seen = see(repo)
    except RepoNotFound:
        return True
    return seen.private or seen.gated


def _ref(pr_url: str | None) -> str:
    """The revision of a pull request, by the address of its page."""
    if pr_url is None:
        raise HubdiffError("the Hub opened no pull request: the repo holds exactly this already")
    return f"refs/pr/{pr_url.rstrip('/').rpartition('/')[2]}"


def _rows(item: Item, result: Mapping[str, Any]) -> dict[str, Any]:
    from hubdiff.backport.gate import entry, number

    scores = result.get("scores")
    sides = scores if isinstance(scores, dict) else {}

    def shown(side: str, task: str) -> str:
        found = entry(sides.get(side), task)
        value, stderr = number(found.get("value")), number(found.get("stderr"))
        if value is None:
            return "–"
        return f"{value:.4g}" + (f" ± {stderr:.2g}" if stderr is not None else "")

    names = ("result", "base", "tuned")
    rows = [{"task": t, **{n: shown(n, t) for n in names}} for t in item.evaluation.tasks]
    return {"rows": rows, "tuned": bool(sides.get("tuned"))}
