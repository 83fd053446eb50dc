"""A graph of models and deltas: who was made from whom, with the pin of every edge where one is
known. Pure data, and the graph as a tree, JSON, Mermaid or DOT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

# What an edge says, read from the upper node (the origin) to the lower one.
BASE_OF, TUNED_OF = "base of the delta", "tuned model of the delta"
TARGET_OF, DELTA_IN = "target of the result", "delta in the result"
STARTED_FROM = "delta that training started from"
NEW_VERSION = "new version"


@dataclass(frozen=True)
class Node:
    """``key`` is the repo, or the name of a folder (``folder_key``), which ``local`` says. ``kind``
    is ``model``, ``delta`` or ``result``. ``numbers`` are label → text for people; ``layers``
    ‖Δ‖/‖base‖ by layer, of a delta. ``problem``: why no more is known of it."""

    key: str
    kind: str
    local: bool = False
    commit: str | None = None
    licence: str | None = None
    gated: bool = False
    numbers: dict[str, str] = field(default_factory=dict)
    layers: tuple[dict[str, Any], ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Edge:
    """``origin`` went into ``made``. ``commit`` is that of the origin, pinned by what was made;
    None where only a name says so."""

    origin: str
    made: str
    relation: str
    commit: str | None = None


@dataclass(frozen=True)
class Graph:
    """``root`` is the node that was asked for. ``cut``: there is more than was followed."""

    root: str
    nodes: dict[str, Node]
    edges: tuple[Edge, ...]
    cut: bool = False

    def origins(self, key: str) -> list[Edge]:
        return [edge for edge in self.edges if edge.made == key]

    def made(self, key: str) -> list[Edge]:
        return [edge for edge in self.edges if edge.origin == key]

    def licences(self, key: str) -> list[tuple[str, str | None, bool]]:
        """Every node that ``key`` was made from, and itself, with licence and gating; the farthest
        origin first."""
        found: dict[str, None] = {}

        def visit(one: str) -> None:
            if one in found:
                return
            found[one] = None
            for edge in self.origins(one):
                if edge.relation != NEW_VERSION:
                    visit(edge.origin)

        visit(key)
        nodes = [self.nodes[one] for one in reversed(found)]
        return [(node.key, node.licence, node.gated) for node in nodes]

    def as_json(self) -> dict[str, Any]:
        return {
            "root": self.root,
            "nodes": [asdict(node) for node in self.nodes.values()],
            "edges": [asdict(edge) for edge in self.edges],
            "cut": self.cut,
        }


def folder_key(name: str) -> str:
    """The key of an origin that is somebody's folder: no repo has a name like this."""
    return f"{name} (folder)"


def is_folder(key: str) -> bool:
    return key.endswith(" (folder)")


def short(commit: str | None) -> str:
    """A pin as people read it."""
    return f"@{commit[:7]}" if commit else ""


def tree_lines(graph: Graph) -> Iterator[str]:
    """The graph as a tree for a terminal: what the root was made from, then what it went into."""
    yield _label(graph, graph.root)
    ups, downs = graph.origins(graph.root), graph.made(graph.root)
    for title, edges, follow in (("made from", ups, True), ("went into", downs, False)):
        if edges:
            yield f"  {title}"
            yield from _branches(graph, edges, up=follow, indent="  ", seen={graph.root})


def _branches(
    graph: Graph, edges: list[Edge], *, up: bool, indent: str, seen: set[str]
) -> Iterator[str]:
    for number, edge in enumerate(edges):
        last = number == len(edges) - 1
        key = edge.origin if up else edge.made
        pin = f" {short(edge.commit)}" if edge.commit else ""
        again = key in seen  # in all of the tree: cards may name everything many times over
        seen.add(key)
        mark = " (see above)" if again else ""
        yield (f"{indent}{'└─' if last else '├─'} {edge.relation}: {_label(graph, key)}{pin}{mark}")
        if again:
            continue
        further = graph.origins(key) if up else graph.made(key)
        yield from _branches(
            graph, further, up=up, indent=indent + ("   " if last else "│  "), seen=seen
        )


def _label(graph: Graph, key: str) -> str:
    node = graph.nodes[key]
    remarks = [node.kind, node.licence or "", "gated" if node.gated else "", node.problem or ""]
    return f"{key} ({', '.join(filter(None, remarks))})"


def mermaid(graph: Graph) -> str:
    """As a Mermaid flowchart, which GitHub and the Hub draw."""
    ids = {key: f"n{number}" for number, key in enumerate(graph.nodes)}
    shapes = {"delta": ("{{", "}}"), "result": ("([", "])"), "model": ("[", "]")}
    lines = ["flowchart LR"]
    for key, node in graph.nodes.items():
        left, right = shapes[node.kind]
        lines.append(f'  {ids[key]}{left}"{_quoted(key)}"{right}')
    for edge in graph.edges:
        label = f"{edge.relation} {short(edge.commit)}".strip()
        lines.append(f'  {ids[edge.origin]} -->|"{_quoted(label)}"| {ids[edge.made]}')
    lines.append(f"  style {ids[graph.root]} stroke-width:3px")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    plain = "".join(char if char.isprintable() else " " for char in text)
    return plain.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def dot(graph: Graph) -> str:
    """As a DOT digraph, for Graphviz."""
    shapes = {"delta": "hexagon", "result": "ellipse", "model": "box"}
    lines = ["digraph lineage {", "  rankdir=LR;"]
    for key, node in graph.nodes.items():
        bold = ", penwidth=3" if key == graph.root else ""
        lines.append(f"  {_dot(key)} [shape={shapes[node.kind]}{bold}];")
    for edge in graph.edges:
        label = f"{edge.relation} {short(edge.commit)}".strip()
        lines.append(f"  {_dot(edge.origin)} -> {_dot(edge.made)} [label={_dot(label)}];")
    return "\n".join([*lines, "}"]) + "\n"


def _dot(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
