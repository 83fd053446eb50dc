"""watch: what counts as new, what is adopted, what is never a base, and what a poll costs."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import models
import pytest
import yaml
from backport_world import World, upload
from huggingface_hub import CommitOperationAdd

import hubdiff
from hubdiff import hub
from hubdiff.backport import watch as watching
from hubdiff.backport.lock import ADOPTED, DONE, FAILED, REJECTED
from hubdiff.backport.watch import watch
from hubdiff.cli import run as cli
from hubdiff.errors import HubdiffError, HubUnavailable


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Not trained: nothing here looks at what a model can do."""
    folder = tmp_path_factory.mktemp("family")
    base = models.save(folder / "base", models.weights())
    tuned = models.save(folder / "tuned", models.moved(models.weights()))
    return base, tuned, folder / "delta"


def bases(found: watching.Watched) -> list[tuple[str, str]]:
    return [(item.base.partition("@")[0], item.direction) for item in found.items]


def card(world: World, repo: str, content: str) -> None:
    """A commit that changes the card only."""
    operation = CommitOperationAdd("README.md", content.encode())
    world.api.create_commit(repo, [operation], commit_message="card")


def test_the_first_run_adopts(world):
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    found = world.adopt()
    assert found.items == ()
    assert [item.base.partition("@")[0] for item in found.adopt] == ["org/base-2"]
    assert world.watch().items == world.watch().adopt == ()


def test_what_was_adopted_can_be_asked_for(world):
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    before = world.watch(adopted=True)
    assert bases(before) == [("org/base-2", "recycle")]
    assert before.adopt == ()
    world.adopt()
    assert bases(world.watch(adopted=True)) == [("org/base-2", "recycle")]


def test_a_new_base_in_the_list_is_an_item(world):
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    assert bases(world.watch()) == [("org/base-2", "recycle")]


def test_new_weights_in_a_followed_repo_are_an_item(world):
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-1", seed=2)
    found = world.watch()
    assert bases(found) == [("org/base-1", "recycle")]
    world.done(found)
    assert world.watch().items == ()


def test_a_commit_that_leaves_the_weights_is_nothing(world):
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    world.adopt()
    for repo in ("org/base-1", "org/base-2"):
        card(world, repo, "# news")
    found = world.watch()
    assert found.items == found.adopt == ()


def test_the_same_weights_under_another_name_are_nothing_new(world, family):
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    world.adopt()
    world.new_base("base-2b")  # the same bytes
    upload(world.hub, "org/base-1b", family[0])
    world.write_config(["org/base-1", "org/base-2", "org/base-2b", "org/base-1b"])
    assert world.watch().items == ()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("recycle", [("org/base-2", "recycle")]),
        ("backport", [("org/base-0", "backport")]),
        ("both", [("org/base-0", "backport"), ("org/base-2", "recycle")]),
    ],
)
def test_the_policy_says_which_way(world, policy, expected):
    world.write_config(["org/base-1"], policy=policy)
    world.adopt()
    for seed, name in enumerate(("base-0", "base-2")):
        world.new_base(name, seed=seed + 5)
    world.write_config(["org/base-0", "org/base-1", "org/base-2"], policy=policy)
    assert bases(world.watch()) == expected


def discover(world: World, **rule: object) -> None:
    world.write_config(["org/base-1"])
    document = yaml.safe_load(world.config.read_text())
    document["families"]["toy"]["discover"] = rule
    world.config.write_text(yaml.safe_dump(document))


def test_models_of_an_author_are_found_by_their_names(world):
    discover(world, author="org", match=r"base-\d")
    world.adopt()
    for name in ("base-2", "base-2-chat", "other-2"):
        world.new_base(name, seed=len(name))
    found = world.watch()
    assert bases(found) == [("org/base-2", "recycle")]
    world.api.delete_repo("org/other-2")


def test_models_of_a_collection_are_found(world):
    collection = world.api.create_collection("Bases", namespace="org")
    discover(world, collection=collection.slug)
    world.adopt()
    world.new_base("base-2")
    for repo in ("org/base-1", "org/base-2"):
        world.api.add_collection_item(collection.slug, repo, "model")
    assert bases(world.watch()) == [("org/base-2", "recycle")]


def test_models_of_a_collection_are_put_in_the_order_they_were_made(world):
    """Not that of the collection: with the newest on top it would count as older than all."""
    time.sleep(1.1)  # the Hub tells when a repo was made to the second
    world.new_base("base-2")
    slug = world.api.create_collection("versions", namespace="org").slug
    for repo in ("org/base-2", "org/base-1"):
        world.api.add_collection_item(slug, repo, "model")
    discover(world, collection=slug)
    document = yaml.safe_load(world.config.read_text())
    del document["families"]["toy"]["bases"]
    world.config.write_text(yaml.safe_dump(document))
    assert [item.base.partition("@")[0] for item in world.watch().adopt] == ["org/base-2"]


def test_a_new_version_in_a_card_is_followed(world):
    discover(world, new_version=True)
    world.adopt()
    world.new_base("base-2")
    world.new_base("base-3", seed=3)
    card(world, "org/base-1", "---\nnew_version: org/base-2\n---\n")
    card(world, "org/base-2", "---\nnew_version: org/base-3\n---\n")
    card(world, "org/base-3", "---\nnew_version: org/base-1\n---\n")  # a ring
    assert bases(world.watch()) == [("org/base-2", "recycle"), ("org/base-3", "recycle")]


@pytest.mark.parametrize("name", ["../../etc", "a b", "org/base-9", "$(id)", "org/x@`id`"])
def test_a_new_version_may_be_anything(world, name):
    discover(world, new_version=True)
    world.adopt()
    card(world, "org/base-1", f"---\nnew_version: {json.dumps(name)}\n---\n")
    assert world.watch().items == ()


def test_results_are_never_bases(world):
    """Neither what is published, nor the deltas, nor anything that hubdiff made."""
    discover(world, author="demo", match=".*")
    world.adopt()
    merged = upload(world.hub, "demo/backports", world.new_base_folder(7))
    made = upload(world.hub, "demo/made", world.new_base_folder(8))
    card(world, made, "---\ntags: [hubdiff, merge]\n---\n")
    found = world.watch()
    assert found.items == ()
    assert set(found.skipped) == {merged, made, "demo/sort-delta"}


def test_a_base_that_can_not_be_read_is_skipped_and_the_others_are_not(world):
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-2")
    world.api.create_repo("org/base-empty")
    world.write_config(["org/base-1", "org/base-gone", "org/base-empty", "org/base-2"])
    found = world.watch()
    assert bases(found) == [("org/base-2", "recycle")]
    assert "there is no repo org/base-gone" in found.skipped["org/base-gone"]
    assert found.skipped["org/base-empty"] == "holds no safetensors weights"


def test_a_place_of_discovery_that_is_gone_stops_nothing_else(world):
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-2")
    discover(world, collection="org/gone-0123")
    document = yaml.safe_load(world.config.read_text())
    document["families"]["toy"]["bases"].append("org/base-2")
    world.config.write_text(yaml.safe_dump(document))
    found = world.watch()
    assert bases(found) == [("org/base-2", "recycle")]
    assert "not found" in found.skipped["org/gone-0123"]


def test_nothing_is_adopted_while_a_base_does_not_answer(world, monkeypatch):
    """Or it would be new, and ported, as soon as it does."""
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    real = hub.see

    def see(repo: str, revision: str | None = None) -> hub.Seen:
        if repo == "org/base-2":
            raise HubUnavailable("503")
        return real(repo, revision)

    with monkeypatch.context() as down:
        down.setattr(hub, "see", see)
        assert world.adopt().deltas == {}
    assert len(world.adopt().adopt) == 1
    assert world.watch().items == ()


def test_only_and_base_narrow_and_choose_nothing_else(world):
    world.write_config(["org/base-1"])
    world.adopt()
    for seed, name in enumerate(("base-2", "base-3")):
        world.new_base(name, seed=seed)
    world.write_config(["org/base-1", "org/base-2", "org/base-3"])
    assert len(world.watch(only=["toy"]).items) == 2
    assert len(world.watch(only=["toy/sort"]).items) == 2
    assert bases(world.watch(bases=["org/base-3"])) == [("org/base-3", "recycle")]
    for nothing in ("toy/other", "$(id)", "../toy", ""):
        assert world.watch(only=[nothing]).items == ()
        assert world.watch(bases=[f"x{nothing}"]).items == ()


def test_a_narrow_first_run_adopts_all_of_the_delta(world):
    """Or the other bases would be new to a delta that is known by then."""
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    narrow = world.watch(bases=["org/base-1"])
    assert len(narrow.adopt) == 1
    world.note(narrow, *((item.key, "adopted") for item in narrow.adopt))
    assert world.watch().items == ()


def test_what_failed_is_tried_again_later_and_not_for_ever(world, monkeypatch):
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    found = world.watch()
    now = time.time()
    for attempt, hours in ((1, 6), (2, 12)):
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        key = found.items[0].key
        settings = found.items[0].settings
        world.note(found, (key, FAILED), attempts=attempt, at=at, settings=settings)
        monkeypatch.setattr(watching.time, "time", lambda: now + hours * 3600 - 60)  # noqa: B023
        assert world.watch().items == ()
        monkeypatch.setattr(watching.time, "time", lambda: now + hours * 3600 + 60)  # noqa: B023
        assert [item.attempt for item in world.watch().items] == [attempt + 1]
    world.note(found, (key, FAILED), attempts=3, at=at, settings=settings)
    monkeypatch.setattr(watching.time, "time", lambda: now + 1e9)
    assert world.watch().items == ()
    world.write_config(["org/base-1", "org/base-2"], gate={"min": 0.1})  # mended, perhaps
    assert [item.attempt for item in world.watch().items] == [1]


def test_what_was_rejected_is_looked_at_again_when_the_rules_change(world):
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    found = world.watch()
    item = found.items[0]
    world.note(found, (item.key, REJECTED), settings=item.settings)
    assert world.watch().items == ()
    world.write_config(["org/base-1", "org/base-2"], gate={"min": 0.1})
    assert [one.key for one in world.watch().items] == [item.key]


def new_version(world: World, seed: int = 77, base: str = "base-1") -> str:
    """The delta again, made anew: what hubdiff.yaml has to say of it."""
    hubdiff.push_delta(
        models.save(world.root.parent / f"again-{seed}", models.moved(models.weights(), seed=seed)),
        "hf://demo/sort-delta",
        base=f"hf://org/{base}",
        force=True,
    )
    return f"demo/sort-delta@{world.api.model_info('demo/sort-delta').sha}"


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("status", [DONE, REJECTED, FAILED])
def test_a_new_version_of_a_delta_goes_where_the_old_one_went(world, status, renamed):
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    found = world.watch()
    (old,) = found.items
    known = {"weights": old.weights, "settings": old.settings, "source": old.source}
    world.note(found, (old.key, status), attempts=3, delta="toy/sort", **known)
    world.write_config(["org/base-1", "org/base-2"], source=new_version(world))
    if renamed:
        world.config.write_text(world.config.read_text().replace("sort:", "sort-2:"))
    found = world.watch()
    assert bases(found) == [("org/base-2", "recycle")]
    assert found.adopt == ()


def test_what_waits_for_the_next_run_goes_to_the_next_version(world):
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-2")
    known = ["org/base-1", "org/base-2"]
    world.write_config(known)
    world.note(world.watch())  # recorded, but there was no room for it in this run
    world.write_config(known, source=new_version(world))
    assert bases(world.watch()) == [("org/base-2", "recycle")]


@pytest.mark.parametrize(
    ("policy", "first", "then"), [("backport", "base-1", "base-3"), ("recycle", "base-3", "base-1")]
)
def test_a_new_version_on_another_base_makes_no_old_base_new(world, policy, first, then):
    for seed, name in enumerate(("base-2", "base-3")):
        world.new_base(name, seed=seed + 5)
    known = [f"org/base-{n}" for n in (1, 2, 3)]
    world.write_config(known, policy=policy, source=new_version(world, 76, first))
    world.adopt()
    world.write_config(known, policy=policy, source=new_version(world, 77, then))
    found = world.watch()
    assert found.items == ()
    assert len(found.adopt) == 2


def test_another_delta_of_the_same_repo_is_no_earlier_version(world):
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-2")
    other = {"source": new_version(world), "publish": {"to": world.results, "mode": "pr"}}
    document = yaml.safe_load(world.config.read_text())
    families = document["families"]
    families["other"] = {"bases": ["org/base-1", "org/base-2"], "deltas": {"sort": other}}
    world.config.write_text(yaml.safe_dump(document, sort_keys=False))
    found = world.watch()
    assert found.items == ()
    assert [(item.family, item.base.partition("@")[0]) for item in found.adopt] == [
        ("other", "org/base-2")
    ]


@pytest.mark.parametrize("renamed", [False, True])
def test_a_base_that_comes_with_a_new_version_of_a_delta_is_an_item(world, renamed):
    """What was adopted with the old version stays so, and its own base is none."""
    world.new_base("base-2")
    known = ["org/base-1", "org/base-2"]
    world.write_config(known, policy="both")
    world.adopt()
    world.new_base("base-3", seed=3)
    world.write_config([*known, "org/base-3"], policy="both", source=new_version(world))
    if renamed:
        world.config.write_text(world.config.read_text().replace("sort:", "sort-2:"))
    found = world.watch()
    assert bases(found) == [("org/base-3", "recycle")]
    assert [item.base.partition("@")[0] for item in found.adopt] == ["org/base-2"]
    world.note(found, *((item.key, ADOPTED) for item in found.adopt))
    assert bases(world.watch()) == [("org/base-3", "recycle")]
    world.done(found)
    assert world.watch().items == ()


def test_one_run_takes_as_many_as_the_limit_says(world):
    world.write_config(["org/base-1"])
    world.adopt()
    names = [f"base-{n}" for n in range(2, 6)]
    for seed, name in enumerate(names):
        world.new_base(name, seed=seed)
    world.write_config(["org/base-1", *(f"org/{name}" for name in names)])
    document = yaml.safe_load(world.config.read_text())
    world.config.write_text(yaml.safe_dump({**document, "limits": {"items": 3}}))
    found = world.watch()
    assert len(found.items) == 3
    assert found.waiting == 1


def calls(world: World) -> list[str]:
    """What counts against the Hub's limits of its API: everything but file content."""
    return [f"{r.method} {r.path}" for r in world.hub.log.records if r.path.startswith("/api/")]


def test_a_poll_costs_one_call_for_a_followed_base_and_none_for_a_pinned_one(world):
    world.new_base("base-2")
    pin = world.api.model_info("org/base-2").sha
    world.write_config(["org/base-1", f"org/base-2@{pin}"])
    world.adopt()
    world.hub.log.clear()
    world.watch()
    assert len(calls(world)) == 1


def test_twenty_families_of_five_deltas_stay_under_two_calls_for_each_base(world):
    """And under the anonymous limit of 500 in five minutes, the first time as well."""
    for n in range(5):
        world.new_base(f"base-{n + 2}", seed=n)
    commits = [
        world.api.create_commit(
            "demo/sort-delta",
            [CommitOperationAdd("notes.txt", str(n).encode())],
            commit_message=str(n),
        ).oid
        for n in range(100)
    ]
    families = {}
    for f in range(20):
        deltas = {
            f"d{d}": {
                "source": f"demo/sort-delta@{commits[5 * f + d]}",
                "publish": {"mode": "none"},
            }
            for d in range(5)
        }
        repos = ["org/base-1", f"org/base-{f % 5 + 2}"]
        families[f"f{f}"] = {"bases": repos, "deltas": deltas}
    world.config.write_text(yaml.safe_dump({"families": families}))
    world.hub.log.clear()
    found = world.adopt()
    assert len(found.adopt) == 100
    first = calls(world)
    assert len(first) < 500, first[:20]
    world.hub.log.clear()
    assert world.watch().items == ()
    assert len(calls(world)) == 6  # 6 repos are bases in 40 places


def test_a_quiet_day_is_no_news_until_a_date_is_due(world):
    world.write_config(["org/base-1"])
    first = world.watch()
    assert first.items == first.adopt == ()
    assert first.news  # that it is watched at all
    world.note(first)
    for days, news in ((44, False), (46, True)):
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * 86_400))
        lock = {**json.loads(world.lock.read_text()), "checked_at": at}
        world.lock.write_text(json.dumps(lock))
        assert world.watch().news == news


# --- the command ---


def test_the_command_writes_plan_and_outputs(world, capsys, monkeypatch):
    monkeypatch.chdir(world.root)
    world.write_config(["org/base-1"])
    world.adopt()
    world.new_base("base-2")
    world.write_config(["org/base-1", "org/base-2"])
    outputs = world.root / "outputs"
    words = ["watch", "--output", "plan.json", "--outputs", "outputs"]
    assert cli([*words, "--dry-run"]) == 0
    assert not outputs.exists()
    assert not (world.root / "plan.json").exists()
    assert cli(words) == 0
    assert "1 item to do" in capsys.readouterr().out
    plan = json.loads((world.root / "plan.json").read_text())
    item = plan["items"][0]["id"]
    assert outputs.read_text() == f'count=1\nmatrix={{"id": ["{item}"]}}\nnews=true\n'
    assert re.fullmatch("[0-9a-f]{12}", item)


def test_no_config_is_said_in_words(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(["watch"]) == 1
    assert "hubdiff.yaml can't be read" in capsys.readouterr().err


def test_a_delta_that_is_gone_is_said_with_its_name(world):
    world.write_config(["org/base-1"], source=f"demo/gone@{'a' * 40}")
    with pytest.raises(HubdiffError, match=r"toy/sort: there is no repo demo/gone"):
        watch(world.config, lock=world.lock)
