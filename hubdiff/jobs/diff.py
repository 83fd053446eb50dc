"""diff: what changed between two models, without publishing anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubdiff.checkpoint import INDEX, Checkpoint, Placed, open_checkpoint
from hubdiff.difference import NUMBERS, TensorChange, changes
from hubdiff.errors import CannotDiff
from hubdiff.files import FileTree, open_tree
from hubdiff.hashing import hash_bytes
from hubdiff.names import match_names
from hubdiff.pair import Filters, Pair, TensorPair
from hubdiff.picture import LayerRow, group_by_layer, layer_picture
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.sidecars import NotCarried, classify
from hubdiff.vocab import vocabulary_of
from hubdiff.writer import disk_errors, require_place


@dataclass(frozen=True)
class Change:
    """A value that is another one in the second model: of a config's field, or what a tokenizer
    says. None where a side has none."""

    what: str
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Diff:
    """``old`` and ``new`` are the models, pinned. ``tensors`` are those of both; ``unlike`` have
    another shape, or a dtype that can't be compared. ``files`` are side files that are not the
    same: (path, ``added``, ``removed`` or ``changed``)."""

    old: str
    new: str
    tensors: tuple[TensorChange, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    unlike: tuple[Change, ...]
    config: tuple[Change, ...]
    tokenizer: tuple[Change, ...]
    files: tuple[tuple[str, str], ...]

    @property
    def changed(self) -> tuple[TensorChange, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.changed)

    @property
    def same(self) -> bool:
        """Whether nothing at all was found to differ."""
        dtypes = any(tensor.dtype != tensor.old_dtype for tensor in self.tensors)
        lists = (self.changed, self.added, self.removed, self.unlike, self.config)
        return not dtypes and not any((*lists, self.tokenizer, self.files))

    @property
    def layers(self) -> list[LayerRow]:
        return group_by_layer(_entries(self.tensors))

    @property
    def total(self) -> dict[str, float | None]:
        """Over all tensors that are floats: ‖Δ‖/‖old‖, cosine, and the share of elements that are
        the same."""
        old = math.fsum(t.old_norm**2 for t in self.tensors)
        new = math.fsum(t.new_norm**2 for t in self.tensors)
        delta = math.fsum(t.delta_norm**2 for t in self.tensors)
        product = math.fsum((t.cosine or 0.0) * t.old_norm * t.new_norm for t in self.tensors)
        elements = sum(tensor.elements for tensor in self.tensors)
        changed = sum(tensor.changed for tensor in self.tensors)
        return {
            "relative_norm": math.sqrt(delta / old) if old else None,
            "cosine": product / math.sqrt(old * new) if old and new else None,
            "unchanged_share": 1 - changed / elements if elements else None,
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "old": self.old,
            "new": self.new,
            "same": self.same,
            **self.total,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "added": list(self.added),
            "removed": list(self.removed),
            "unlike": [asdict(change) for change in self.unlike],
            "layers": [asdict(row) for row in self.layers],
            "config": [asdict(change) for change in self.config],
            "tokenizer": [asdict(change) for change in self.tokenizer],
            "files": [{"path": path, "what": what} for path, what in self.files],
        }


def diff(
    old: str | Path,
    new: str | Path,
    *,
    plot: str | Path | None = None,
    cache: bool = False,
    progress: Progress | None = None,
) -> Diff:
    """Compare two models: every tensor, the configs, the tokenizers, the other files.

    Args:
        old, new: refs (``org/name``, ``org/name@revision``, ``hf://…``) or folders.
        plot: where to draw ‖Δ‖/‖old‖ by layer, as a PNG.
        cache: keep what is downloaded in the local Hub cache.

    Both are read whole, once, in bounded memory; nothing is written but the picture. Raises
    ``HubdiffError``.
    """
    progress = progress or Silent()
    if plot is not None:
        require_place(Path(plot))
    with ExitStack() as stack:
        trees = [open_tree(ModelRef.parse(ref), cache=cache) for ref in (old, new)]
        first, second = (stack.enter_context(open_checkpoint(tree)) for tree in trees)
        pair, unlike = _pair(first, second)
        matched = {one.name for one in pair.tensors.values()} | {one.what for one in unlike}
        names = {one.tuned_name for one in pair.tensors.values()} | {one.what for one in unlike}
        found = Diff(
            str(first.tree.pin),
            str(second.tree.pin),
            tuple(changes(pair, progress)),
            tuple(name for name in second.tensors if name not in names),
            tuple(name for name in first.tensors if name not in matched),
            unlike,
            tuple(_fields(first.config, second.config)),
            tuple(_tokenizer(*trees)),
            tuple(_files(first, second)),
        )
    if plot is not None:
        with disk_errors(Path(plot)), Path(plot).open("wb") as file:
            title = f"What changed from {_name(trees[0])} to {_name(trees[1])}"
            layer_picture(_entries(found.tensors), file, title=title)
    return found


def _name(tree: FileTree) -> str:
    return tree.pin.repo or (tree.pin.path.resolve().name if tree.pin.path else "")


def _pair(old: Checkpoint, new: Checkpoint) -> tuple[Pair, tuple[Change, ...]]:
    """The tensors that can be compared element by element, and the others that have a partner."""
    match = match_names(list(new.tensors), old.tensors)
    if not match.pairs:
        raise CannotDiff(
            f"no tensor of {new.tree.pin} has a partner in {old.tree.pin}",
            next_step="Check the refs: the models must be of one family.",
        )
    tensors, unlike = {}, []
    for name, other in match.pairs.items():
        one, two = old.tensors[other], new.tensors[name]
        if _comparable(one, two):
            tensors[name] = TensorPair(other, name, two, one, None)
        else:
            unlike.append(Change(name, _described(one), _described(two)))
    return Pair(new, old, None, tensors, (), match.rename, Filters(), None), tuple(unlike)


def _comparable(old: Placed, new: Placed) -> bool:
    dtypes = {old.entry.dtype, new.entry.dtype}
    return old.entry.shape == new.entry.shape and (dtypes <= NUMBERS or len(dtypes) == 1)


def _described(placed: Placed) -> str:
    return f"{placed.entry.dtype} {list(placed.entry.shape)}"


def _entries(tensors: Sequence[TensorChange]) -> list[dict[str, Any]]:
    """As entries of a manifest, which is what pictures are drawn from."""
    return [
        {
            "name": tensor.name,
            "shape": tensor.shape,
            "base_dtype": tensor.old_dtype,
            "changed": tensor.changed,
            "delta_norm": tensor.delta_norm,
            "base_norm": tensor.old_norm,
        }
        for tensor in tensors
    ]


def _fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """Fields of two configs that differ, the inner ones too."""
    found: list[Change] = []
    for name in sorted({*old, *new}):
        one, two = old.get(name), new.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            found += _fields(one, two, f"{prefix}{name}.")
        elif one != two or (name in old) != (name in new):
            values = (_text(old, name), _text(new, name))
            found.append(Change(f"{prefix}{name}", *values))
    return found


def _text(config: Mapping[str, Any], name: str) -> str | None:
    return json.dumps(config[name], ensure_ascii=False) if name in config else None


def _tokenizer(old: FileTree, new: FileTree) -> list[Change]:
    one, two = vocabulary_of(old), vocabulary_of(new)
    if one is None or two is None or one.rows == two.rows:
        return []
    found = [Change("tokens", f"{len(one.rows):,}", f"{len(two.rows):,}")]
    for what, a, b in (("added", two, one), ("removed", one, two)):
        tokens = [token for token in a.rows if token not in b.rows]
        if tokens:
            text = ", ".join(repr(token) for token in tokens[:5])
            text += f" and {len(tokens) - 5:,} more" if len(tokens) > 5 else ""
            found.append(
                Change(f"tokens {what}", *((None, text) if what == "added" else (text, None)))
            )
    moved = [token for token, row in one.rows.items() if two.rows.get(token, row) != row]
    if moved:
        found.append(Change("tokens on other rows", None, f"{len(moved):,}"))
    return found


def _files(old: Checkpoint, new: Checkpoint) -> list[tuple[str, str]]:
    """Side files that are not the same on both sides."""
    found = []
    listed = [_side_files(side) for side in (old, new)]
    for path in sorted({*listed[0], *listed[1]}):
        if path not in listed[0]:
            found.append((path, "added"))
        elif path not in listed[1]:
            found.append((path, "removed"))
        elif not _same_file(old.tree, new.tree, path):
            found.append((path, "changed"))
    return found


def _side_files(model: Checkpoint) -> set[str]:
    return {
        path
        for path, info in model.tree.files().items()
        if path not in model.shards
        and path != INDEX
        and not isinstance(classify(path, info.size, model.shards), NotCarried)
    }


def _same_file(old: FileTree, new: FileTree, path: str) -> bool:
    one, two = old.files()[path], new.files()[path]
    if one.size != two.size:
        return False
    hashes = [
        info.sha256 or hash_bytes(tree.read_bytes(path)) for info, tree in ((one, old), (two, new))
    ]
    return hashes[0] == hashes[1]
