"""hubdiff.yaml and hubdiff.lock: errors that point at line and key; merging in any order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hubdiff.backport.config import read_config
from hubdiff.backport.items import item_key, weights_digest
from hubdiff.backport.lock import DONE, FAILED, Lock, merge, parse_lock, read_lock
from hubdiff.card import template
from hubdiff.errors import HubdiffError

SHA = "0123456789abcdef0123456789abcdef01234567"
GOOD = f"""\
families:
  qwen:
    bases: [Qwen/Q-1.0@{SHA}, Qwen/Q-1.5]
    discover: {{collection: Qwen/slug, author: Qwen, match: 'Q-.*', new_version: true}}
    deltas:
      math:
        source: me/d@{SHA}
        policy: both
        scales: [0.6, 1]
        eval: {{tasks: [a.yaml, b], limit: 10}}
        gate: {{min: 0.5, max_drop: 0.02, recovery: 0.5, tuned: me/t}}
        publish: {{to: me/x, as: merged, mode: pr, public: true}}
limits: {{items: 2, attempts: 1, disk_gb: 30}}
"""


def read(tmp_path: Path, text: str):
    file = tmp_path / "hubdiff.yaml"
    file.write_text(text)
    return read_config(file)


def test_a_whole_config_is_read(tmp_path):
    config = read(tmp_path, GOOD)
    (family,) = config.families
    (delta,) = family.deltas
    assert family.bases == (f"Qwen/Q-1.0@{SHA}", "Qwen/Q-1.5")
    assert (family.discover.author, family.discover.new_version) == ("Qwen", True)
    assert delta.scales == (0.6, 1.0)
    assert delta.gate.task == "a.yaml"  # the first, unless it is said
    assert (delta.publish.to, delta.publish.kind, delta.publish.mode) == ("me/x", "merged", "pr")
    assert delta.publish.public
    assert (config.limits.items, config.limits.disk_gb) == (2, 30)
    assert config.outputs() == {"me/d", "me/x"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("scales:", "scale:", r":9: families\.qwen\.deltas\.math\.scale is not a key .* scales"),
        (f"me/d@{SHA}", "me/d", r":7: .*\.source is not pinned to a commit: write org/name@"),
        (f"me/d@{SHA}", "me/d@main", r":7: .*\.source is not pinned"),
        ("policy: both", "policy: forward", r":8: .*\.policy is wrong: 'forward' is not one of"),
        ("[0.6, 1]", "[0.6, x]", r":9: .*\.scales\.1 is wrong: 'x' is not of type 'number'"),
        ("[0.6, 1]", "[0.6, -1]", r":9: .*\.scales\.1 is wrong"),
        ("[0.6, 1]", "[]", r":9: .*\.scales is wrong"),
        ("limit: 10", "limit: 1", r":10: .*\.eval\.limit is wrong"),
        (", tuned: me/t", "", r":11: .*\.gate is not complete: 'tuned'"),
        ("min: 0.5", "min: 0.5, task: c", r":11: .*\.gate\.task is 'c', which is not one of"),
        ("        eval: {tasks: [a.yaml, b], limit: 10}\n", "", r":9: .*no eval that could choose"),
        ("to: me/x, ", "", r":12: .*\.publish is not complete: 'to'"),
        ("mode: pr", "mode: push", r":12: .*\.publish\.mode is wrong: 'push'"),
        ("author: Qwen, ", "", r":4: .*discover is not complete: 'author'"),
        ("'Q-.*'", "'Q-('", r":4: .*discover\.match is wrong"),
        ("Qwen/Q-1.5]", "Qwen]", r":3: .*bases\.1 is wrong"),
        ("Qwen/Q-1.5]", "../Q-1.5]", r":3: .*bases\.1 is '../Q-1.5'"),
        ("to: me/x", "to: me/x--y", r":12: .*publish\.to is 'me/x--y'"),
        ("tuned: me/t", "tuned: -me/t", r":11: .*gate\.tuned is '-me/t'"),
        ("qwen:", "'q w':", r"'q w'"),
        ("items: 2", "items: 0", r":13: limits\.items is wrong"),
        ("families:", "familys:", r":1: familys is not a key"),
        ("        policy: both", "        policy: both\n        policy: recycle", r":9: .* twice"),
        ("  qwen:\n", "  qwen: {deltas: {}}\n  other:\n", r":2: families\.qwen"),
        (GOOD, "- a list", r":1: the document is wrong"),
        (GOOD, "a: [b", r"is not YAML"),
        (GOOD, "", r":1: the document is wrong"),
        (GOOD, "a: &a [*a]", r"is not a key|is wrong|not YAML|twice"),
        (GOOD, "families: &a {q: *a}", r"not YAML"),
    ],
)
def test_an_error_names_line_and_key(tmp_path, old, new, said):
    assert old in GOOD
    with pytest.raises(HubdiffError, match=said):
        read(tmp_path, GOOD.replace(old, new, 1))


def test_one_delta_stands_in_one_place(tmp_path):
    document = yaml.safe_load(GOOD)
    document["families"]["two"] = document["families"]["qwen"]
    with pytest.raises(HubdiffError, match=r"two\.deltas\.math\.source is that of qwen\.math too"):
        read(tmp_path, yaml.safe_dump(document))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    file = tmp_path / "hubdiff.yaml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(HubdiffError, match="not UTF-8"):
        read_config(file)


def test_the_config_in_the_readme_is_one(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(families:.*?)```", readme, re.DOTALL)
    assert read(tmp_path, block).families[0].deltas[0].scales == (0.8, 1.0)


def test_the_schema_is_one():
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(json.loads(template("hubdiff.schema.json")))


# --- keys ---


def test_a_key_is_of_content():
    assert item_key(f"a/b@{SHA}", "w") == item_key(f"c/d@{SHA}", "w") != item_key(f"a/b@{SHA}", "v")
    files = {"model.safetensors": "1", "README.md": "2"}
    assert weights_digest(files) == weights_digest({**files, "README.md": "3"})
    assert weights_digest(files) != weights_digest({**files, "model.safetensors": "3"})
    assert weights_digest({"pytorch_model.bin": "1"}) is None


# --- the lock ---

_entries = st.fixed_dictionaries(
    {"status": st.sampled_from(["adopted", "failed", "rejected", "done"])},
    optional={
        "attempts": st.integers(1, 3),
        "at": st.sampled_from(["2026-11-28T07:00:00Z", "2026-11-28T08:00:00Z"]),
        "why": st.sampled_from(["a", None]),
    },
)
_seen = st.dictionaries(
    st.sampled_from("ab"), st.fixed_dictionaries({"commit": st.sampled_from("12")})
)
locks = st.builds(
    Lock,
    bases=_seen,
    deltas=_seen,
    items=st.dictionaries(st.sampled_from("xyz"), _entries),
    checked_at=st.sampled_from([None, "2026-11-01", "2026-11-02"]),
)


@given(locks, locks, locks)
def test_locks_merge_in_any_order_and_as_often_as_one_likes(one, two, three):
    assert merge(one, two).dumps() == merge(two, one).dumps()
    assert merge(merge(one, two), three).dumps() == merge(one, merge(two, three)).dumps()
    assert merge(one, one).dumps() == one.dumps()


@given(locks, locks)
def test_no_item_is_lost_in_a_merge(one, two):
    both = merge(one, two)
    assert set(both.items) == set(one.items) | set(two.items)
    done = {k for lock in (one, two) for k, v in lock.items.items() if v["status"] == DONE}
    assert all(both.items[key]["status"] == DONE for key in done)


@given(locks)
def test_a_lock_is_read_as_it_was_written(lock):
    assert parse_lock(lock.dumps(), "here").dumps() == lock.dumps()


def test_a_lock_is_sorted_with_one_value_to_a_line():
    lock = Lock(items={"b": {"status": DONE, "attempts": 1}, "a": {"status": FAILED}})
    assert lock.dumps().splitlines() == [
        "{",
        '  "bases": {},',
        '  "deltas": {},',
        '  "items": {',
        '    "a": {',
        '      "status": "failed"',
        "    },",
        '    "b": {',
        '      "attempts": 1,',
        '      "status": "done"',
        "    }",
        "  },",
        '  "version": 1',
        "}",
    ]


def test_no_lock_is_an_empty_one(tmp_path):
    assert read_lock(tmp_path / "hubdiff.lock") == Lock()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<<<<<<< ours", "is not JSON"),
        ("[]", "is not a lock"),
        ('{"version": 2}', "of version 2, this hubdiff reads 1"),
        ('{"version": 1, "items": []}', "is not a lock"),
        ('{"version": 1, "items": {"a": {"status": "odd"}}}', "status 'odd'"),
        ('{"version": 1, "items": {"a": 1}}', "is not a lock"),
    ],
)
def test_a_lock_that_is_none_is_refused(text, said):
    with pytest.raises(HubdiffError, match=said):
        parse_lock(text, "hubdiff.lock")
