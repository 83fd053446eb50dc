"""lineage: what a repo was made from, and what was made from it, as far as manifests, records and
cards say."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hubdiff import fields
from hubdiff.checkpoint import MANIFEST, read_json
from hubdiff.errors import HubdiffError
from hubdiff.facts import Start, facts
from hubdiff.files import FileTree, open_tree
from hubdiff.graph import (
    BASE_OF,
    DELTA_IN,
    NEW_VERSION,
    STARTED_FROM,
    TARGET_OF,
    TUNED_OF,
    Edge,
    Graph,
    Node,
    folder_key,
    is_folder,
)
from hubdiff.manifest import Manifest, Side, manifest_json, read_manifest
from hubdiff.picture import group_by_layer
from hubdiff.progress import Progress, Silent
from hubdiff.refs import ModelRef
from hubdiff.registry_tags import BASE_MODEL, START, TUNED_MODEL
from hubdiff.summary import percent, size_text, summarise
from hubdiff.writer import RESULT

DEPTH, MOST_NODES = 6, 120
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RELATIONS = ("finetune", "adapter", "merge", "quantized")


def lineage(ref: str, *, depth: int = DEPTH, progress: Progress | None = None) -> Graph:
    """The graph around a model, a delta or a result: upwards what it was made from, downwards what
    was made from it, ``depth`` steps at most in either direction, 120 nodes in all.

    Upwards a delta's manifest and a result's record name commits, a model's card only names;
    downwards the Hub's tags tell who names a repo, and their manifests which commit of it. What
    can't be read is a node with a problem. Raises ``HubdiffError`` where ``ref`` itself can't be.
    """
    walk = _Walk(depth, progress or Silent())
    return walk.run(ModelRef.parse(ref))


@dataclass
class _Walk:
    depth: int
    progress: Progress
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[tuple[str, str, str], Edge] = field(default_factory=dict)
    cut: bool = False

    def run(self, ref: ModelRef) -> Graph:
        tree = open_tree(ref)
        root = _key(tree)
        self._up(tree)
        if tree.pin.repo is not None:
            self._down(tree.pin.repo)
        return Graph(root, self.nodes, tuple(self.edges.values()), self.cut)

    # --- upwards ---

    def _up(self, tree: FileTree) -> None:
        self.nodes[_key(tree)], origins = _describe(tree)
        waiting = deque((edge, 1) for edge in origins)
        while waiting:
            edge, steps = waiting.popleft()
            if edge.relation == NEW_VERSION:
                self._take_child(edge.made)
                if edge.made in self.nodes:
                    self._add(edge)
            elif edge.origin in self.nodes:
                self._add(edge)
            elif steps > self.depth or len(self.nodes) >= MOST_NODES:
                self.cut = True
            else:
                self._add(edge)
                self.nodes[edge.origin], further = self._origin(edge)
                waiting += ((one, steps + 1) for one in further)

    def _origin(self, edge: Edge) -> tuple[Node, list[Edge]]:
        """The origin of an edge, as it is at its pin. A folder's name can't be opened."""
        if is_folder(edge.origin):
            kind = "delta" if edge.relation in (DELTA_IN, STARTED_FROM) else "model"
            return Node(edge.origin, kind, local=True), []
        try:
            return _describe(open_tree(ModelRef(repo=edge.origin, revision=edge.commit, path=None)))
        except HubdiffError as error:
            return Node(edge.origin, "model", problem=str(error)), []

    def _add(self, edge: Edge) -> None:
        known = self.edges.get((edge.origin, edge.made, edge.relation))
        if known is None or known.commit is None:
            self.edges[edge.origin, edge.made, edge.relation] = edge

    # --- downwards ---

    def _down(self, repo: str) -> None:
        waiting: deque[tuple[str, int]] = deque([(repo, 0)])
        asked = set()
        while waiting:
            one, steps = waiting.popleft()
            if one in asked:
                continue
            asked.add(one)
            if steps >= self.depth:
                self.cut = True
                continue
            try:
                children = list(_children(one))
            except HubdiffError as error:
                self.progress.note(f"what was made of {one} is not known: {error}")
                self.cut = True
                continue
            for child in children:
                self._take_child(child)
                if child in self.nodes:
                    waiting.append((child, steps + 1))

    def _take_child(self, child: str) -> None:
        origins: list[Edge] = []
        try:
            node, origins = _describe(open_tree(ModelRef(repo=child, revision=None, path=None)))
        except HubdiffError as error:
            node = Node(child, "model", problem=str(error))
        if not self._room_for(child):
            return
        self.nodes.setdefault(child, node)
        for edge in origins:
            if edge.relation != NEW_VERSION and self._room_for(edge.origin):
                local = is_folder(edge.origin)
                kind = "delta" if edge.relation in (DELTA_IN, STARTED_FROM) else "model"
                self.nodes.setdefault(edge.origin, Node(edge.origin, kind, local))
                self._add(edge)

    def _room_for(self, key: str) -> bool:
        room = key in self.nodes or len(self.nodes) < MOST_NODES
        self.cut = self.cut or not room
        return room


def _children(repo: str) -> Iterator[str]:
    """The repos that say they were made from ``repo``."""
    from hubdiff.hub import find_models

    seen: set[str] = set()
    for tag in (f"{name}:{repo}" for name in (BASE_MODEL, TUNED_MODEL, START)):
        for found in find_models([tag]):
            if found.repo not in seen and found.repo != repo:
                seen.add(found.repo)
                yield found.repo


def _key(tree: FileTree) -> str:
    pin = tree.pin
    return pin.repo or (pin.path.resolve().name if pin.path else "")


def _describe(tree: FileTree) -> tuple[Node, list[Edge]]:
    """A repo as a node, with the edges to what it was made from."""
    key, files = _key(tree), tree.files()
    said = facts(tree)
    node = Node(
        key,
        "model",
        tree.pin.repo is None,
        tree.pin.commit,
        said.licence,
        said.gated,
        problem=said.problem,
    )
    edges = list(_named_by_card(key, said.card_data, said.start))
    if MANIFEST in files:
        manifest = read_manifest(tree)
        return _delta_node(node, manifest), [*_of_manifest(key, manifest), *_versions(edges)]
    if RESULT.marker in files:
        record = read_json(tree, RESULT.marker)
        return _result_node(node, record), [*_of_record(key, record), *_versions(edges)]
    return node, edges


def _versions(edges: list[Edge]) -> list[Edge]:
    """Of what a card names: the rest of it is in the manifest, with pins."""
    return [edge for edge in edges if edge.relation == NEW_VERSION]


def _named_by_card(key: str, card: dict[str, Any], start: Start | None) -> Iterator[Edge]:
    bases = card.get("base_model")
    listed = [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else []
    relation = card.get("base_model_relation")
    word = relation if relation in _RELATIONS else "merge" if len(listed) > 1 else "finetune"
    for base in listed:
        if _text(base) and base != key:
            yield Edge(base, key, word)
    if start is not None:
        yield _edge(start, key, STARTED_FROM)
    newer = _text(card.get("new_version"))
    if newer and newer != key:
        yield Edge(key, newer, NEW_VERSION)


def _of_manifest(key: str, manifest: Manifest) -> list[Edge]:
    start = manifest.started_from
    return [
        _edge(manifest.base, key, BASE_OF),
        _edge(manifest.tuned, key, TUNED_OF),
        *([_edge(start, key, STARTED_FROM)] if start else ()),
    ]


def _edge(side: Side | Start, made: str, relation: str) -> Edge:
    return Edge(side.repo or folder_key(side.name), made, relation, side.commit)


def _text(value: object) -> str | None:
    """A text of a record or a card; anything else says nothing."""
    try:
        return fields.string(value)
    except fields.WrongField:
        return None


def _of_record(key: str, record: dict[str, Any]) -> list[Edge]:
    """A stranger wrote the record: what is no text in it is no edge."""
    items = record.get("deltas")
    deltas = items if isinstance(items, list) else []
    sides = [(record.get("target"), TARGET_OF), *((item, DELTA_IN) for item in deltas)]
    found = []
    for side, relation in sides:
        if not isinstance(side, dict):
            continue
        repo, name, commit = (_text(side.get(one)) for one in ("repo", "name", "commit"))
        origin = repo or (folder_key(name) if name else None)
        if origin:
            found.append(
                Edge(origin, key, relation, commit if _COMMIT.fullmatch(commit or "") else None)
            )
    return found


def _delta_node(node: Node, manifest: Manifest) -> Node:
    document = json.loads(manifest_json(manifest))
    summary = summarise(document)
    numbers = {"size": size_text(summary.delta_bytes)}
    if summary.size_share is not None:
        numbers["of the tuned weights"] = percent(summary.size_share)
    if summary.unchanged_share is not None:
        numbers["weights left as they were"] = percent(summary.unchanged_share)
    if summary.relative_norm is not None:
        numbers["‖Δ‖/‖base‖"] = percent(summary.relative_norm)
    numbers["tensors"] = f"{summary.changed:,} changed, {summary.unchanged:,} unchanged"
    numbers["made with"] = f"hubdiff {manifest.hubdiff_version}"
    layers = tuple(asdict(row) for row in group_by_layer(document["tensors"]))
    return replace(node, kind="delta", numbers=numbers, layers=layers)


def _shown(value: object) -> str:
    return str(value).encode(errors="replace").decode()[:200]


def _result_node(node: Node, record: dict[str, Any]) -> Node:
    numbers = {}
    for label, name in (("case", "case"), ("because", "reason"), ("scale", "scale")):
        if record.get(name) is not None:
            numbers[label] = _shown(record[name])
    check = record.get("check")
    if isinstance(check, dict):
        numbers["check"] = _shown(check.get("verdict"))
    return replace(node, kind="result", numbers=numbers)
