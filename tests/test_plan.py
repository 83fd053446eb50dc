"""Plans: which case it is, which tensors take part, what is said about the choice."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file

import hubdiff
from hubdiff.errors import CannotApply, CannotDiff
from hubdiff.safetensors_io import build_header


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """base, tuned, target and the delta of the first two, in one folder."""
    base = models.weights()
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "tuned", models.moved(base))
    models.save(tmp_path / "target", models.moved(base, 1e-3, seed=5), shards=2)
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    return tmp_path


def case(made: Path, target: str = "base", **options: object) -> str:
    applied = hubdiff.apply(
        made / "delta", made / target, output=made / "out", dry_run=True, **options
    )
    return str(applied.plan["case"])


def test_a_side_file_of_equal_size_is_told_from_the_base_s(made: Path) -> None:
    assert case(made) == "own base"
    file = made / "base/generation_config.json"
    file.write_text(file.read_text().replace("2", "7"))
    assert case(made) == "transfer"
    applied = hubdiff.apply(made / "delta", made / "base", output=made / "out")
    assert "generation_config.json" in applied.plan["reason"]


def test_a_base_with_a_tensor_more_is_not_the_own_base(made: Path) -> None:
    models.save(made / "more", models.weights() | {"value_head.weight": torch.ones(3)})
    hubdiff.apply(made / "delta", made / "more", output=made / "out")
    assert "value_head.weight" in load_file(made / "out/model.safetensors")


def test_one_glob_may_be_given_as_a_string(made: Path) -> None:
    results = [
        hubdiff.apply(made / "delta", made / "target", output=made / "out", dry_run=True, **glob)
        for glob in ({"include": "*.mlp.*"}, {"include": ["*.mlp.*"]}, {"exclude": "model.*"})
    ]
    changed = [sum(f.get("changed", 0) for f in r.plan["files"]) for r in results]
    assert changed == [6, 6, 1]


def test_globs_that_match_nothing_are_refused(made: Path) -> None:
    with pytest.raises(CannotApply, match="no tensor"):
        hubdiff.apply(made / "delta", made / "target", output=made / "out", include=["zzz"])
    assert not (made / "out").exists()


def test_an_index_without_metadata_gets_its_size(tmp_path: Path) -> None:
    base = models.weights()
    models.save(tmp_path / "base", base)
    tuned = models.moved(base) | {"score.weight": torch.ones(3, 5)}
    models.save(tmp_path / "tuned", tuned)
    models.save(tmp_path / "target", models.moved(base, 1e-3, seed=5), shards=2)
    index = tmp_path / "target/model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": None}))
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    hubdiff.apply(tmp_path / "delta", tmp_path / "target", output=tmp_path / "out")
    written = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = sum(t.numel() * t.element_size() for t in tuned.values())
    assert written["metadata"]["total_size"] == total


def test_a_target_with_another_tokenizer_is_noted(made: Path) -> None:
    def notes() -> list[str]:
        applied = hubdiff.apply(made / "delta", made / "target", output=made / "out", dry_run=True)
        return [note for note in applied.plan["notes"] if note.startswith("tokenizer.json")]

    assert notes() == []
    (made / "target/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0}}}))
    assert len(notes()) == 1


def test_packed_elements_are_compared_with_their_like_only(tmp_path: Path) -> None:
    for name, dtype, size in (("base", "U8", 64), ("tuned", "F4", 32)):
        header = build_header([("w.weight", dtype, (8, 8), size)], {})
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(header + bytes(size))
    with pytest.raises(CannotDiff, match="F4 in the tuned model and U8 in the base"):
        hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")


def test_headers_together_may_not_unpack_to_more_than_one_may(made: Path) -> None:
    import base64

    import zstandard

    file = made / "delta/hubdiff.json"
    document = json.loads(file.read_text())
    bomb = base64.b64encode(zstandard.compress(bytes(60_000_000))).decode()
    entry = next(f for f in document["tuned"]["files"] if f["source"] == "weights")
    document["tuned"]["files"] += [
        entry | {"path": f"x{i}.safetensors", "header": bomb} for i in range(2)
    ]
    file.write_text(json.dumps(document))
    with pytest.raises(hubdiff.HubdiffError, match="headers of more than"):
        hubdiff.inspect(made / "delta")
