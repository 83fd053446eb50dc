"""Refs: what is read, what is printed, and that the two undo each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubdiff.errors import RefError
from hubdiff.refs import ModelRef, PinnedRef, parse_weighted

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def repo(name: str, revision: str | None = None) -> ModelRef:
    return ModelRef(repo=name, revision=revision, path=None)


def folder(path: str) -> ModelRef:
    return ModelRef(repo=None, revision=None, path=Path(path))


TABLE = [
    # text, value, canonical text
    ("org/name", repo("org/name"), "org/name"),
    ("hf://org/name", repo("org/name"), "org/name"),
    ("gpt2", repo("gpt2"), "gpt2"),
    ("gpt2@main", repo("gpt2", "main"), "gpt2@main"),
    ("org/name@v1.0", repo("org/name", "v1.0"), "org/name@v1.0"),
    ("hf://org/name@refs/pr/1", repo("org/name", "refs/pr/1"), "org/name@refs/pr/1"),
    ("org/name@me@home", repo("org/name", "me@home"), "org/name@me@home"),
    (f"org/name@{COMMIT}", repo("org/name", COMMIT), f"org/name@{COMMIT}"),
    ("Org_1/n-a.m_e", repo("Org_1/n-a.m_e"), "Org_1/n-a.m_e"),
    ("./x", folder("x"), "./x"),
    ("./x/", folder("x"), "./x"),
    ("./x@y", folder("x@y"), "./x@y"),
    ("./~x", folder("./~x"), "./~x"),
    ("../x/y", folder("../x/y"), "../x/y"),
    ("/x/y", folder("/x/y"), "/x/y"),
    (".", folder("."), "."),
    ("..", folder(".."), ".."),
]


@pytest.mark.parametrize(("text", "value", "canonical"), TABLE)
def test_parse_then_print(text: str, value: ModelRef, canonical: str) -> None:
    assert ModelRef.parse(text) == value
    assert str(value) == canonical
    assert ModelRef.parse(canonical) == value


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert ModelRef.parse("~/model") == folder("/home/someone/model")


def test_a_folder_wins_over_a_repo_of_the_same_name_unless_hf_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    assert ModelRef.parse("org/name@v1") == folder("org/name@v1")
    shadowed = ModelRef.parse("hf://org/name@v1")
    assert shadowed == repo("org/name", "v1")
    assert ModelRef.parse(str(shadowed)) == shadowed


def test_a_path_object_is_a_folder() -> None:
    assert ModelRef.parse(Path("org/name")) == folder("org/name")


@pytest.mark.parametrize(
    "text",
    [
        "", "  ", "a/b/c", "-x/y", "x/y.", "x--y/z", "x/..", "x/y.git", "x y/z", "org/name@",
        "org/name@a b", "org/name@a..b", "org/name@-\\", "org/name@/x", "org/name@x.lock",
        "hf://", "hf://datasets/org/name", "hf:///x", "https://huggingface.co/org/name",
        "org/na\0me", "x" * 97, "org/name\n",
    ],
)  # fmt: skip
def test_bad_text_is_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(RefError) as caught:
        ModelRef.parse(text)
    assert repr(text)[1:-1] in str(caught.value)
    assert "org/name@revision" in (caught.value.next_step or "")


@given(st.text(max_size=12))
def test_any_text_is_a_ref_that_prints_back_or_an_error(text: str) -> None:
    try:
        ref = ModelRef.parse(text)
    except RefError:
        return
    assert ModelRef.parse(str(ref)) == ref


def test_a_pinned_ref_prints_its_commit() -> None:
    pin = PinnedRef(repo="org/name", commit=COMMIT, path=None, ref=repo("org/name", "main"))
    assert str(pin) == f"org/name@{COMMIT}"
    assert str(PinnedRef.folder(folder("x"))) == "./x"


@pytest.mark.parametrize("commit", [None, "main", COMMIT[:7], COMMIT.upper(), COMMIT + "0"])
def test_a_moving_name_is_no_pin(commit: str | None) -> None:
    with pytest.raises(ValueError, match="commit"):
        PinnedRef(repo="org/name", commit=commit, path=None, ref=repo("org/name"))


@pytest.mark.parametrize(
    ("repo_name", "revision", "path"),
    [(None, None, None), ("org/name", None, Path("x")), (None, "main", Path("x"))],
)
def test_a_ref_is_a_repo_or_a_folder(
    repo_name: str | None, revision: str | None, path: Path | None
) -> None:
    with pytest.raises(ValueError, match=r"repo|revision"):
        ModelRef(repo=repo_name, revision=revision, path=path)


WEIGHTED = [
    # text, ref, weight
    ("org/name", repo("org/name"), 1.0),
    ("org/name:0.7", repo("org/name"), 0.7),
    ("org/name@rev:0.7", repo("org/name", "rev"), 0.7),
    ("hf://org/name@rev:0.7", repo("org/name", "rev"), 0.7),
    ("hf://org/name", repo("org/name"), 1.0),
    ("gpt2:-.5", repo("gpt2"), -0.5),
    ("gpt2:+2", repo("gpt2"), 2.0),
    ("gpt2:1.", repo("gpt2"), 1.0),
    ("gpt2:1e-3", repo("gpt2"), 1e-3),
    ("gpt2:0", repo("gpt2"), 0.0),
    ("./folder:0.7", folder("folder"), 0.7),
    ("./folder", folder("folder"), 1.0),
    ("./folder:x", folder("folder:x"), 1.0),
    ("./a:b:2", folder("a:b"), 2.0),
    ("/x/y:0.5", folder("/x/y"), 0.5),
    ("../x:0.5", folder("../x"), 0.5),
]


@pytest.mark.parametrize(("text", "ref", "weight"), WEIGHTED)
def test_a_ref_with_a_weight(text: str, ref: ModelRef, weight: float) -> None:
    assert parse_weighted(text) == (ref, weight)


@pytest.mark.parametrize("text", ["org/name:x", "org/name:", ":0.7", "", "org/name:1_0", "a b:0.7"])
def test_what_is_neither_a_ref_nor_has_a_weight_is_refused(text: str) -> None:
    with pytest.raises(RefError):
        parse_weighted(text)


def test_a_folder_whose_name_ends_like_a_weight_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tuned:0.7", "tuned"):
        (tmp_path / name).mkdir()
    assert parse_weighted("./tuned:0.7") == (folder("tuned:0.7"), 1.0)
    assert parse_weighted("tuned:0.7") == (folder("tuned:0.7"), 1.0)
    assert parse_weighted("tuned:0.7:0.5") == (folder("tuned:0.7"), 0.5)
    assert parse_weighted("tuned:0.5") == (folder("tuned"), 0.5)
    assert parse_weighted(Path("tuned:0.5")) == (folder("tuned:0.5"), 1.0)


def test_a_weight_that_is_no_number_is_still_one() -> None:
    """It is refused as a weight, not as part of a name."""
    assert parse_weighted("org/name:inf") == (repo("org/name"), float("inf"))
