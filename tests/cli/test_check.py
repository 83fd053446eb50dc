"""``hubdiff check``: what it says, and the exit code that scripts go by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests import models
from tests.cli.running import Family, Said

Run = Callable[..., Said]


def test_a_near_target(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    picture = tmp_path / "forecast.png"
    said = hubdiff("check", family.delta, "--to", family.other, "--plot", str(picture))
    assert said.code == 0, said.err
    assert said.out.startswith("verdict")
    assert "go" in said.out.splitlines()[0]
    for words in ("tensor names", "cosine of base and target", "By layer and kind", "attention"):
        assert words in said.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = picture.read_bytes()
    hubdiff("check", family.delta, "--to", family.other, "--plot", str(picture))
    assert picture.read_bytes() == before


def test_exit_codes_tell_the_verdict(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    far = models.save(tmp_path / "far", models.moved(models.weights(), 7e-3, seed=7))
    other = models.save(tmp_path / "other", models.weights(seed=5))
    for target, code, verdict in ((far, 3, "doubtful"), (other, 4, "refuse")):
        said = hubdiff("check", family.delta, "--to", str(target))
        assert said.code == code
        assert verdict in said.out.splitlines()[0]
        assert said.out.splitlines()[1].startswith("because")
        said = hubdiff("check", family.delta, "--to", str(target), "--json")
        document = json.loads(said.out)
        assert (said.code, document["verdict"]) == (code, verdict)
        assert document["reasons"][0]["text"]
        assert document["forecast"]["layers"]
        assert document["thresholds"][0]["evidence"]


def test_what_can_t_be_read_is_an_error_and_no_verdict(
    hubdiff: Run, family: Family, tmp_path: Path
) -> None:
    said = hubdiff("check", family.delta, "--to", str(tmp_path / "nothing"))
    assert (said.code, said.out) == (1, "")
    said = hubdiff("check", family.base, "--to", family.other)
    assert said.code == 1
    assert "not a delta" in said.err
    said = hubdiff("check", family.delta)
    assert said.code == 2
    picture = tmp_path / "no folder" / "x.png"
    said = hubdiff("check", family.delta, "--to", family.other, "--plot", str(picture))
    assert said.code == 1
    assert str(picture) in said.err


def test_the_own_base_has_nothing_to_draw(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    said = hubdiff(
        "check", family.delta, "--to", family.base, "--plot", str(tmp_path / "picture.png")
    )
    assert said.code == 0
    assert "nothing to draw" in said.err
    assert not (tmp_path / "picture.png").exists()


def test_apply_stops_where_check_refuses(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    other = str(models.save(tmp_path / "other", models.weights(seed=5)))
    out = str(tmp_path / "out")
    said = hubdiff("apply", family.delta, "--to", other, "--output", out)
    assert said.code == 1
    assert "cosine" in said.err
    assert "--force" in said.err
    assert not Path(out).exists()
    said = hubdiff("apply", family.delta, "--to", other, "--output", out, "--force")
    assert said.code == 0
    assert "refuse" in said.err
