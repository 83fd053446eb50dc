"""A lineage graph as one HTML page that needs no network: the graph as SVG, and beside it what is
known of the node that was clicked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from hubdiff.card import template
from hubdiff.graph import NEW_VERSION, Edge, Graph, short

_WIDTH, _HEIGHT = 220, 46  # of a node, in pixels
_GAP_X, _GAP_Y, _MARGIN = 210, 34, 24
_MOST_LETTERS = 27


@dataclass(frozen=True)
class _Place:
    x: int
    y: int


def lineage_page(graph: Graph) -> str:
    """The page. Names and reasons in it were written by strangers: they are escaped by the template
    engine, and the data is a JSON that no HTML parser looks into."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    layout = _Layout.of(graph)
    nodes = [
        {
            "key": key,
            "label": _cut(key),
            "kind": node.kind,
            "root": key == graph.root,
            "problem": node.problem,
            **asdict(layout.places[key]),
        }
        for key, node in graph.nodes.items()
    ]
    return environment.from_string(template("lineage.html")).render(
        root=graph.root,
        nodes=nodes,
        edges=[layout.line(edge) for edge in graph.edges],
        node_width=_WIDTH,
        node_height=_HEIGHT,
        width=max((place.x for place in layout.places.values()), default=0) + _WIDTH + _MARGIN,
        height=max((place.y for place in layout.places.values()), default=0) + _HEIGHT + _MARGIN,
        data=_script_json(_details(graph)),
        root_json=_script_json(graph.root),
        cut=graph.cut,
    )


def _script_json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _details(graph: Graph) -> dict[str, Any]:
    """What a click on each node shows."""
    return {
        key: {
            **asdict(node),
            "licences": [
                {"key": name, "licence": licence, "gated": gated}
                for name, licence, gated in graph.licences(key)
            ],
            "made_from": [_side(edge.origin, edge) for edge in graph.origins(key)],
            "went_into": [_side(edge.made, edge) for edge in graph.made(key)],
        }
        for key, node in graph.nodes.items()
    }


def _side(key: str, edge: Edge) -> dict[str, Any]:
    return {"key": key, "relation": edge.relation, "commit": edge.commit}


@dataclass(frozen=True)
class _Layout:
    """Columns from origins to what was made of them. An edge that passes a column has a place in it
    too, so that no line runs behind a node."""

    depths: dict[str, int]
    places: dict[str | tuple[Edge, int], _Place]

    @classmethod
    def of(cls, graph: Graph) -> _Layout:
        depths = _depths(graph)
        columns: dict[int, list[str | tuple[Edge, int]]] = {}
        for key in graph.nodes:
            columns.setdefault(depths[key], []).append(key)
        for edge in graph.edges:
            for column in range(depths[edge.origin] + 1, depths[edge.made]):
                columns[column].append((edge, column))
        tallest = max(map(len, columns.values()), default=0)
        places = {}
        for column, members in columns.items():
            top = _MARGIN + (tallest - len(members)) * (_HEIGHT + _GAP_Y) // 2
            for row, member in enumerate(members):
                x = _MARGIN + column * (_WIDTH + _GAP_X)
                places[member] = _Place(x, top + row * (_HEIGHT + _GAP_Y))
        return cls(depths, places)

    def line(self, edge: Edge) -> dict[str, Any]:
        """A curve from the right side of the origin to the left side of what was made."""
        columns = range(self.depths[edge.origin] + 1, self.depths[edge.made])
        stops = [self.places[edge.origin], *(self.places[edge, column] for column in columns)]
        stops.append(self.places[edge.made])
        path = []
        for start, end in pairwise(stops):
            x1, y1 = start.x + _WIDTH, start.y + _HEIGHT // 2
            x2, y2 = end.x, end.y + _HEIGHT // 2
            bend = max(40, abs(x2 - x1) // 2)
            path.append(f"M {x1} {y1} C {x1 + bend} {y1}, {x2 - bend} {y2}, {x2} {y2}")
            if end is not stops[-1]:
                path.append(f"L {x2 + _WIDTH} {y2}")
        first, second = stops[0], stops[1]
        x, y = (first.x + _WIDTH + second.x) // 2, (first.y + second.y + _HEIGHT) // 2
        if len(stops) > 2:  # on the straight part, where no other line crosses it
            x, y = second.x + _WIDTH // 2, second.y + _HEIGHT // 2
        return {
            "path": " ".join(path),
            "x": x,
            "y": y - 5,
            "label": edge.relation,
            "pin": short(edge.commit),
            "version": edge.relation == NEW_VERSION,
        }


def _depths(graph: Graph) -> dict[str, int]:
    """The longest way from a node that was made from nothing. Cards may claim circles: a way does
    not pass a node twice, and no way is longer than there are nodes."""
    depths = dict.fromkeys(graph.nodes, 0)
    for _ in graph.nodes:
        changed = False
        for edge in graph.edges:
            step = depths[edge.origin] + 1
            if depths[edge.made] < step < len(graph.nodes):
                depths[edge.made], changed = step, True
        if not changed:
            break
    used = {depth: rank for rank, depth in enumerate(sorted(set(depths.values())))}
    return {key: used[depth] for key, depth in depths.items()}


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"
