"""lineage, list and search on a loopback Hub with a family of models, deltas and results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import on_hub
import pytest
from on_hub import NewName, PutRepo, contents

import hubdiff
from hubdiff.devhub import DevHub
from hubdiff.graph import (
    BASE_OF,
    DELTA_IN,
    NEW_VERSION,
    TARGET_OF,
    TUNED_OF,
    Edge,
    Graph,
    Node,
    dot,
    mermaid,
    tree_lines,
)
from hubdiff.lineage_page import lineage_page


@dataclass(frozen=True)
class Kin:
    """Names of repos: ``tuned`` is a fine-tune of ``base``, ``delta`` their difference, ``result``
    that on ``newer``, the next version of ``base``."""

    base: str
    newer: str
    tuned: str
    delta: str
    result: str


@pytest.fixture(scope="module")
def _server() -> Iterator[DevHub]:
    """A Hub of their own: list and search look at every repo that there is."""
    with DevHub(users={"demo": "hf_demo", "other": "hf_other"}, orgs={"org": ["demo"]}) as hub:
        yield hub


@pytest.fixture
def kin(devhub: DevHub, put_repo: PutRepo, new_name: NewName, tmp_path: Path) -> Kin:
    base_weights = models.weights()
    newer, base, tuned, delta, result = (new_name() for _ in range(5))
    for name, tensors, card in (
        (newer, models.moved(base_weights, 1e-3, 7), {"license": "llama3"}),
        (base, base_weights, {"license": "mit", "new_version": newer}),
        (tuned, models.moved(base_weights), {"license": "apache-2.0", "base_model": base}),
    ):
        folder = models.save(tmp_path / name, tensors, files={"README.md": on_hub.card(**card)})
        put_repo(contents(folder), name)
    hubdiff.push_delta(tuned, delta)
    hubdiff.apply(delta, newer, push_to=result)
    return Kin(base, newer, tuned, delta, result)


def edges(graph: Graph) -> dict[tuple[str, str, str], str | None]:
    return {(edge.origin, edge.made, edge.relation): edge.commit for edge in graph.edges}


def test_a_result_leads_to_everything_it_was_made_from(devhub: DevHub, kin: Kin) -> None:
    graph = hubdiff.lineage(kin.result)
    heads = {name: on_hub.head(devhub, name) for name in vars(kin).values()}
    found = edges(graph)
    assert found[kin.delta, kin.result, DELTA_IN] == heads[kin.delta]
    assert found[kin.newer, kin.result, TARGET_OF] == heads[kin.newer]
    assert found[kin.base, kin.delta, BASE_OF] == heads[kin.base]
    assert found[kin.tuned, kin.delta, TUNED_OF] == heads[kin.tuned]
    assert found[kin.base, kin.tuned, "finetune"] is None
    assert found[kin.base, kin.newer, NEW_VERSION] is None
    assert set(graph.nodes) == set(vars(kin).values())
    kinds = {key: node.kind for key, node in graph.nodes.items()}
    assert kinds == {
        kin.base: "model",
        kin.newer: "model",
        kin.tuned: "model",
        kin.delta: "delta",
        kin.result: "result",
    }
    assert graph.nodes[kin.delta].layers
    assert graph.nodes[kin.delta].numbers["size"]
    assert graph.nodes[kin.result].numbers["check"] == "go"


@pytest.mark.parametrize("start", ["base", "tuned", "delta", "newer"])
def test_from_wherever_one_starts_what_was_made_is_found(kin: Kin, start: str) -> None:
    graph = hubdiff.lineage(getattr(kin, start))
    assert graph.root == getattr(kin, start)
    below = {"base": 4, "tuned": 2, "delta": 1, "newer": 1}[start]
    seen: set[str] = set()
    waiting = [graph.root]
    while waiting:
        for edge in graph.made(waiting.pop()):
            if edge.made not in seen:
                seen.add(edge.made)
                waiting.append(edge.made)
    assert len(seen) == below
    if start != "newer":
        assert {kin.delta, kin.result} - {graph.root} <= seen


def test_depth_is_kept_and_said(kin: Kin) -> None:
    graph = hubdiff.lineage(kin.result, depth=1)
    assert graph.cut
    assert kin.delta in graph.nodes
    assert not graph.origins(kin.delta)
    assert not hubdiff.lineage(kin.result).cut


def test_the_licence_chain_is_followed(kin: Kin) -> None:
    chain = hubdiff.lineage(kin.result).licences(kin.result)
    assert [key for key, _, _ in chain][-1] == kin.result
    assert {licence for _, licence, _ in chain} >= {"mit", "apache-2.0", "llama3"}


def test_a_repo_that_is_gone_is_a_node_with_a_problem(devhub: DevHub, kin: Kin) -> None:
    on_hub.api(devhub).delete_repo(kin.tuned)
    graph = hubdiff.lineage(kin.delta)
    assert "no repo" in (graph.nodes[kin.tuned].problem or "")
    assert edges(graph)[kin.tuned, kin.delta, TUNED_OF]


def test_folders_have_a_lineage_too(kin: Kin, tmp_path: Path) -> None:
    hubdiff.apply(kin.delta, kin.newer, output=tmp_path / "local result")
    graph = hubdiff.lineage(str(tmp_path / "local result"))
    assert graph.root == "local result"
    assert graph.nodes["local result"].local
    assert kin.base in graph.nodes


# --- as text ---


def sample() -> Graph:
    nodes = [Node('o/"base"', "model", licence="mit"), Node("o/delta", "delta"), Node("b", "model")]
    return Graph(
        "o/delta",
        {node.key: node for node in nodes},
        (
            Edge('o/"base"', "o/delta", BASE_OF, "7fd1a60" + "0" * 33),
            Edge("o/delta", "b", DELTA_IN),
        ),
    )


def test_as_a_tree() -> None:
    lines = list(tree_lines(sample()))
    assert lines[0] == "o/delta (delta)"
    assert '  └─ base of the delta: o/"base" (model, mit) @7fd1a60' in lines
    assert "  └─ delta in the result: b (model)" in lines


def test_a_circle_has_an_end() -> None:
    nodes = {key: Node(key, "model") for key in "abc"}
    graph = Graph("a", nodes, (Edge("a", "b", "x"), Edge("b", "c", "x"), Edge("c", "a", "x")))
    text = "\n".join(tree_lines(graph))
    assert "see above" in text
    assert lineage_page(graph)


def test_a_tangle_is_a_tree_of_its_own_size() -> None:
    keys = [[f"{layer}/{i}" for i in range(12)] for layer in range(6)]
    edges_ = [Edge(a, b, "x") for layer in range(5) for a in keys[layer + 1] for b in keys[layer]]
    nodes = {key: Node(key, "model") for layer in keys for key in layer}
    lines = list(tree_lines(Graph("0/0", nodes, tuple(edges_))))
    assert len(lines) < 1000


def test_a_crowd_of_parents_is_cut(devhub: DevHub, put_repo: PutRepo) -> None:
    crowd = "---\nbase_model:\n" + "".join(f"- org/nobody-{i}\n" for i in range(500)) + "---\n"
    graph = hubdiff.lineage(put_repo({"README.md": crowd.encode()}), depth=0)
    assert graph.cut
    assert len(graph.nodes) <= 121


def test_a_record_of_nonsense_is_no_edge(devhub: DevHub, put_repo: PutRepo) -> None:
    record = b'{"target": {"name": "\\ud800"}, "deltas": [{"repo": 3}, 5, {"repo": "gpt2"}]}'
    name = put_repo({"hubdiff-result.json": record, "README.md": b"---\nbase_model: bert\n---\n"})
    graph = hubdiff.lineage(name)
    assert {edge.origin for edge in graph.edges} == {"gpt2"}
    assert "no repo" in (graph.nodes["gpt2"].problem or "")
    assert lineage_page(graph)


def test_as_mermaid_and_dot() -> None:
    text = mermaid(sample())
    assert text.startswith("flowchart LR\n")
    assert '["o/&quot;base&quot;"]' in text
    assert '-->|"base of the delta @7fd1a60"|' in text
    text = dot(sample())
    assert '"o/\\"base\\"" -> "o/delta" [label="base of the delta @7fd1a60"]' in text
    assert text.rstrip().endswith("}")
    json.dumps(sample().as_json())


def test_names_can_t_leave_their_place_in_the_page() -> None:
    evil = '</script><script>alert(1)</script>"onload="x'
    graph = Graph(evil, {evil: Node(evil, "model", problem="<b>")}, ())
    page = lineage_page(graph)
    assert "<script>alert" not in page
    assert '"onload="' not in page
    assert "<b>" not in page
    assert page.count("</script>") == 2


# --- list and search ---


def test_list_finds_deltas_by_base_and_author(kin: Kin, put_repo: PutRepo) -> None:
    found = hubdiff.list_deltas(base=kin.base)
    assert [entry.repo for entry in found.entries] == [kin.delta]
    (entry,) = found.entries
    assert (entry.base or "").startswith(f"{kin.base}@")
    assert (entry.tuned or "").startswith(f"{kin.tuned}@")
    assert all((entry.size, entry.size_share, entry.relative_norm))
    assert not found.more
    assert hubdiff.list_deltas(base=kin.newer).entries == ()
    assert kin.delta in {e.repo for e in hubdiff.list_deltas(author="org").entries}
    assert hubdiff.list_deltas(author="other").entries == ()
    card = on_hub.card(tags="diff-vector", base_model=kin.base)
    broken = put_repo({"README.md": card.encode()})
    entries = {e.repo: e for e in hubdiff.list_deltas(base=kin.base).entries}
    assert "not a delta" in (entries[broken].problem or "")
    assert hubdiff.list_deltas(base=kin.base, limit=1).more


def test_search_looks_at_names_bases_and_licences(kin: Kin) -> None:
    name = kin.delta.partition("/")[2]
    for words in (name, f"{name} APACHE-2.0", kin.base, ["org", name]):
        assert kin.delta in {e.repo for e in hubdiff.search(words).entries}, words
    assert hubdiff.search(f"{name} nothing-like-this").entries == ()
