"""What a card says, read from its header."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import models
import pytest
from on_hub import PutRepo

import hubdiff
from hubdiff.devhub import DevHub
from hubdiff.errors import CannotDiff, CheckpointError, HubUnavailable
from hubdiff.facts import RepoFacts, Start, card_facts, facts, facts_from
from hubdiff.files import LocalTree
from hubdiff.hub import HubTree
from hubdiff.progress import Silent
from hubdiff.refs import ModelRef


def facts_of(folder: Path, card: str | None) -> RepoFacts:
    if card is not None:
        (folder / "README.md").write_text(card)
    return facts(LocalTree(ModelRef.parse(folder)))


def test_the_card_of_a_folder(tmp_path: Path) -> None:
    card = "---\nlicense: mit\nbase_model: org/base\ntags: [a, b]\n---\n# Title\n"
    assert facts_of(tmp_path, card) == RepoFacts(
        licence="mit",
        base_model=("org/base",),
        tags=("a", "b"),
        card_data={"license": "mit", "base_model": "org/base", "tags": ["a", "b"]},
    )


def test_lists_and_single_values_read_alike(tmp_path: Path) -> None:
    card = "---\nlicense: [mit, apache-2.0]\nbase_model: [org/a, org/b]\ntags: one\n---\n"
    found = facts_of(tmp_path, card)
    assert (found.licence, found.base_model, found.tags) == (
        "mit, apache-2.0",
        ("org/a", "org/b"),
        ("one",),
    )


@pytest.mark.parametrize("card", [None, "", "# Title\n", "---\n---\n", "---\njust text\n---\n"])
def test_no_header_no_facts(tmp_path: Path, card: str | None) -> None:
    assert facts_of(tmp_path, card) == RepoFacts()


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: mit\n---",
        "\ufeff---\r\nlicense: mit\r\n---\r\ntext",
        "\n--- \nlicense: mit\n---\n",
    ],
)
def test_header_spellings(text: str) -> None:
    assert card_facts(text) == {"license": "mit"}


BROKEN = [
    "license: [mit",
    "x: 2024-13-45",
    "x: " + "[" * 5000,
    "x: !!timestamp soon",
    "x: !!bool perhaps",
    "x: " + "9" * 5000,
    "? [a]\n: b",
]


@pytest.mark.parametrize("header", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_header_is_named(tmp_path: Path, header: str) -> None:
    card = f"---\nlicense: mit\n{header}\n---\n"
    with pytest.raises(CheckpointError, match=r"README\.md"):
        card_facts(card)
    found = facts_of(tmp_path, card)
    assert "README.md" in (found.problem or "")
    assert (found.licence, found.card_data) == (None, {})


def test_texts_inside_texts_are_not_written_out(tmp_path: Path) -> None:
    doubled = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 12))
    card = f"---\nb0: &b0 [x]\n{doubled}license: [mit, *b11]\ntags: *b11\n---\n"
    found = facts_of(tmp_path, card)
    assert (found.licence, found.tags) == ("mit", ())


def test_a_tree_is_asked_once(tmp_path: Path, devhub: DevHub, put_repo: PutRepo) -> None:
    tree = HubTree(ModelRef.parse(put_repo({"README.md": b"---\nlicense: mit\n---\n"})))
    assert facts(tree).licence == "mit"
    devhub.log.clear()
    assert facts(tree).licence == "mit"
    assert len(devhub.log) == 0


@pytest.mark.parametrize("header", BROKEN[1:3], ids=["date", "depth"])
def test_a_broken_card_stops_no_work(tmp_path: Path, header: str) -> None:
    """Neither the tuned model's card, nor the base's, nor one that a delta carries."""
    files = {"README.md": f"---\n{header}\n---\n"}
    notes: list[str] = []
    base = models.save(tmp_path / "base", models.weights(), files=files)
    tuned = models.save(tmp_path / "tuned", models.moved(models.weights()), files=files)
    (tuned / "README.md").write_text(files["README.md"] + "tuned")
    target = models.save(tmp_path / "target", models.weights(seed=7), files=files)
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base, progress=Notes(notes))
    assert [note for note in notes if "tuned/README.md" in note]
    assert [note for note in notes if "base/README.md" in note]
    notes.clear()
    hubdiff.apply(
        tmp_path / "delta", target, output=tmp_path / "out", progress=Notes(notes), force=True
    )
    assert [note for note in notes if "delta/tuned/README.md" in note]
    assert [note for note in notes if "target/README.md" in note]


def test_cards_are_read_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Hub refuses to say must not be learned after hours."""
    base = models.save(tmp_path / "base", models.weights())
    tuned = models.save(tmp_path / "tuned", models.moved(models.weights()))
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)

    def refuse(*_: object) -> None:
        raise HubUnavailable("the Hub does not answer")

    monkeypatch.setattr("hubdiff.facts._ask", refuse)
    target = models.save(tmp_path / "target", models.weights(seed=7))
    notes: list[str] = []
    with pytest.raises(HubUnavailable):
        hubdiff.push_delta(tuned, tmp_path / "again", base=base, progress=Notes(notes))
    with pytest.raises(HubUnavailable):
        hubdiff.apply(
            tmp_path / "delta", target, output=tmp_path / "o", progress=Notes(notes), force=True
        )
    assert "start" not in notes


def test_a_card_names_a_repo_and_never_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's card must not choose a folder of the reader's disk."""
    monkeypatch.chdir(tmp_path)
    base = models.save(tmp_path / "org" / "base", models.weights())
    for named in (str(base), "./org/base", "~", "../x"):
        tuned = tuned_with_base(tmp_path, named)
        with pytest.raises(CannotDiff, match="base"):
            hubdiff.push_delta(tuned, tmp_path / "delta")
    tuned = tuned_with_base(tmp_path, "org/base")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("hubdiff.jobs.together.open_tree", only_opens(tuned))
    with pytest.raises(AssertionError, match="org/base@None"):
        hubdiff.push_delta(tuned, tmp_path / "delta")


def tuned_with_base(folder: Path, named: str) -> Path:
    card = {"README.md": f"---\nbase_model: {json.dumps(named)}\n---\n"}
    return models.save(folder / "tuned", models.moved(models.weights()), files=card)


def only_opens(folder: Path) -> Callable[..., LocalTree]:
    def opened(ref: ModelRef, **_: object) -> LocalTree:
        assert ref.path == folder, f"{ref.repo}@{ref.revision}"
        return LocalTree(ref)

    return opened


class Notes(Silent):
    """Keeps the notes, and that work was started."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes

    def start(self, what: str, total: int) -> None:
        self._notes.append("start")

    def note(self, text: str) -> None:
        self._notes.append(text)


_PIN = {"repo": "org/delta", "commit": "a" * 40}


@pytest.mark.parametrize(
    ("said", "start"),
    [
        ({"name": "delta", **_PIN}, Start("delta", "org/delta", "a" * 40, False)),
        ({"name": "d", **_PIN, "closed": True}, Start("d", "org/delta", "a" * 40, True)),
        ({"name": "d", "repo": None, "commit": None}, Start("d", None, None, False)),
        ({"name": "d", "repo": "org/delta", "commit": "main"}, None),
        ({"name": "d", "repo": "../delta", "commit": "a" * 40}, None),
        ({"name": "d", "repo": None, "commit": "a" * 40}, None),
        ({"name": "", **_PIN}, None),
        ({"name": ["d"], **_PIN}, None),
        (["delta"], None),
        (None, None),
    ],
)
def test_a_start_is_a_pin_or_a_folder_s_name(said: object, start: Start | None) -> None:
    """A stranger may have written it: what is neither says nothing."""
    assert facts_from({"started_from": said}).start == start
