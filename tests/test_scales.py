from __future__ import annotations

import pytest

from hubdiff.errors import CannotApply
from hubdiff.scales import MOST_EXPANDED, Scales, expand_braces, matches


@pytest.mark.parametrize(
    ("glob", "expanded"),
    [
        ("model.*", ["model.*"]),
        ("{0..3}", ["0", "1", "2", "3"]),
        ("a.{0..2}.b", ["a.0.b", "a.1.b", "a.2.b"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("{q,k}_proj", ["q_proj", "k_proj"]),
        ("{a,}b", ["ab", "b"]),
        ("{a,b}{1,2}", ["a1", "a2", "b1", "b2"]),
        ("{a,b{1,2}}c", ["ac", "b1c", "b2c"]),
        ("l.{0..1}.{q,*}", ["l.0.q", "l.0.*", "l.1.q", "l.1.*"]),
        ("{x}", ["{x}"]),
        ("{}", ["{}"]),
        ("{a,b", ["{a,b"]),
        ("{{a,b}", ["{a", "{b"]),
        ("{x{1,2}}", ["{x1}", "{x2}"]),
        ("{a..c}", ["{a..c}"]),
    ],
)
def test_braces_are_expanded_as_by_a_shell(glob: str, expanded: list[str]) -> None:
    assert expand_braces(glob) == expanded


@pytest.mark.parametrize("glob", ["{0..1000}", "{0..99}{0..99}", "{0..999999999}", "{1..2}" * 20])
def test_braces_that_mean_too_much_are_refused(glob: str) -> None:
    with pytest.raises(CannotApply, match=f"more than {MOST_EXPANDED:,}") as caught:
        Scales.of({glob: 1.0})
    assert "*" in str(caught.value.next_step)


def test_globs_are_those_of_include() -> None:
    assert matches("model.layers.7.mlp", "model.layers.{0..7}.*")
    assert not matches("model.layers.8.mlp", "model.layers.{0..7}.*")
    assert not matches("model.layers.70.mlp", "model.layers.{0..7}.*")
    assert matches("a.b", "?.[ab]")


def test_the_last_match_wins_and_1_is_the_rest() -> None:
    scales = Scales.of({"a.*": 0.5, "*.w": 2, "a.x.*": 0.0})
    names = ("a.y", "a.w", "a.x.w", "b.y")
    assert [scales.of_tensor(name) for name in names] == [0.5, 2.0, 0.0, 1.0]
    assert Scales.of({"*": 0.8, "a": 0.5}).of_tensor("b") == 0.8


@pytest.mark.parametrize("given", [1.0, 0.5, {"a": 0.5}, {"*": 0.8, "a": 0.5}])
def test_a_scale_reads_back_as_given(given: float | dict[str, float]) -> None:
    assert Scales.of(given).as_json() == given
    assert Scales.of(Scales.of(given).as_json()) == Scales.of(given)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e39])
def test_a_scale_that_float32_can_t_hold_is_refused(wrong: float) -> None:
    for given in (wrong, {"a": wrong}):
        with pytest.raises(CannotApply, match="float32"):
            Scales.of(given)


def test_a_glob_that_matches_nothing_names_its_neighbours() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    scales = Scales.of({"model.layer.{0..3}.mlp.up_proj.weight": 0.5})
    with pytest.raises(CannotApply, match=r"no tensor.*model\.layers\.0\.mlp\.up_proj"):
        scales.check(names)
    # A part of what the braces stand for is enough: a model may have fewer layers.
    Scales.of({"model.layers.{0..31}.*": 0.5}).check(names)
