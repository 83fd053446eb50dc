"""gate: a pure function, which takes what it can't read for not shown."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubdiff.backport.config import Evaluation, Gate, Publish
from hubdiff.backport.gate import gate
from hubdiff.backport.items import Item, item_key, item_of
from hubdiff.errors import HubdiffError

SOURCE = "me/d@" + "a" * 40


def item(tasks: tuple[str, ...] = ("t",), **asked: Any) -> Item:
    asked.setdefault("task", tasks[0] if tasks else None)
    return Item(
        item_key(SOURCE, "w"),
        *("family", "delta", SOURCE, "org/b@" + "b" * 40, "w", "recycle"),
        (1.0,),
        Evaluation(tasks),
        Gate(**asked),
        Publish("me/x", "delta", "pr"),
        "s",
        14,
    )


def score(value: Any, better: bool = True) -> dict[str, Any]:
    return {"value": value, "stderr": 0.01, "higher_is_better": better, "examples": 100}


def result(verdict: str = "go", tuned: Any = None, **sides: Any) -> dict[str, Any]:
    scores = {side: {"t": value} for side, value in sides.items()}
    if tuned is not None:
        scores["tuned"] = {"t": tuned}
    return {"status": "ran", "check": {"verdict": verdict}, "scores": scores, "scale": 1.0}


@pytest.mark.parametrize(
    ("asked", "found", "reason"),
    [
        ({}, result(result=score(0.1), base=score(0.9)), None),
        ({"min": 0.5}, result(result=score(0.5)), None),
        ({"min": 0.5}, result(result=score(0.49)), "t is 0.49, and must be 0.5 at least"),
        ({"min": 2.0}, result(result=score(1.9, False)), None),
        ({"min": 2.0}, result(result=score(2.1, False)), "t is 2.1, and must be 2 at most"),
        ({"max_drop": 0.02}, result(result=score(0.49), base=score(0.5)), None),
        ({"max_drop": 0.02}, result(result=score(0.4), base=score(0.5)), "more than 0.02 worse"),
        ({"max_drop": 0.5}, result(result=score(3.0, False), base=score(2.0, False)), "3, 2 for"),
        ({"max_drop": 0.5}, result(result=score(1.0, False), base=score(2.0, False)), None),
        ({"max_drop": 0.02}, result(result=score(0.4)), "no score of the new base on t"),
        (
            {"recovery": 0.5, "tuned": "a/b"},
            result(result=score(0.6), base=score(0.2), tuned=score(1.0)),
            None,
        ),
        (
            {"recovery": 0.6, "tuned": "a/b"},
            result(result=score(0.6), base=score(0.2), tuned=score(1.0)),
            "recovery on t is 0.50, and must be 0.6",
        ),
        (
            {"recovery": 0.5, "tuned": "a/b"},
            result(result=score(0.6), base=score(0.2), tuned=score(0.2)),
            "recovery on t is unknown",
        ),
        (
            {"recovery": 0.5, "tuned": "a/b"},
            result(result=score(0.1), base=score(0.8), tuned=score(0.6)),
            "recovery on t is unknown",
        ),
        (
            {"recovery": 0.5, "tuned": "a/b"},
            result(result=score(9, False), base=score(2, False), tuned=score(4, False)),
            "recovery on t is unknown",
        ),
        (
            {"recovery": 0.5, "tuned": "a/b"},
            result(result=score(2, False), base=score(4, False), tuned=score(1, False)),
            None,
        ),
        ({"min": 0.5}, result(base=score(0.5)), "there is no score of t"),
        ({"min": 0.5}, result(result=score(math.nan)), "there is no score of t"),
        ({"min": 0.5}, result(result=score("0.9")), "there is no score of t"),
        ({"min": 0.5}, result(result=score(True)), "there is no score of t"),
        ({"min": 0.5}, {"status": "refused", "why": "noise"}, "noise"),
        ({"min": 0.5}, {"status": "failed"}, "did not run to the end"),
        ({"min": 0.5}, {}, "did not run to the end"),
    ],
)
def test_what_is_asked_must_be_shown(asked, found, reason):
    said = gate(item(**asked), found)
    assert said.passed == (reason is None)
    assert reason is None or reason in " ".join(said.reasons)


@pytest.mark.parametrize(("verdict", "passed"), [("go", True), ("doubtful", False)])
def test_doubt_wants_a_measurement(verdict, passed):
    assert gate(item(tasks=()), result(verdict)).passed == passed
    assert gate(item(), result(verdict, result=score(0.9))).passed == passed
    assert gate(item(min=0.5), result(verdict, result=score(0.9))).passed


def test_every_task_has_its_drop():
    found = result(result=score(0.9), base=score(0.1))
    found["scores"]["result"]["u"], found["scores"]["base"]["u"] = score(0.1), score(0.3)
    said = gate(item(("t", "u"), max_drop=0.1), found)
    assert said.reasons == ("u is 0.1, 0.3 for the base: more than 0.1 worse",)


junk = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["t", "value", "result", "base", "verdict"]), inner)
    ),
    max_leaves=8,
)


@given(junk, junk, junk)
def test_junk_never_passes_and_never_breaks(scores, check, status):
    found = {"status": status, "scores": scores, "check": check}
    said = gate(item(min=2.0, max_drop=0.0), found)
    assert not said.passed
    assert gate(item(min=2.0), {**found, "status": "ran"}).numbers is not None


def test_an_item_survives_json():
    one = item(min=0.5, task="t")
    assert item_of(json.loads(json.dumps(one.as_json())), "plan") == one


@pytest.mark.parametrize(
    "change",
    [
        {"key": "0" * 64},
        {"weights": "other"},
        {"source": "me/d@" + "c" * 40},
        {"scales": ["x"]},
        {"gate": []},
        {"evaluation": {}},
        {"more": 1},
    ],
)
def test_an_item_that_is_not_itself_is_refused(change):
    with pytest.raises(HubdiffError, match="holds an item"):
        item_of({**item().as_json(), **change}, "plan")
