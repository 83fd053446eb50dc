"""jobs/inspect.py: a delta described from its manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hubdiff
from hubdiff.errors import NotADelta
from tests import models


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    weights = models.weights()
    tuned = models.moved(weights) | {"score.weight": torch.ones(2, 3, dtype=torch.bfloat16)}
    del tuned["model.layers.1.mlp.up_proj.weight"]
    base = models.save(tmp_path / "base", weights)
    tuned_folder = models.save(tmp_path / "tuned", tuned, files={"model.gguf": "another"})
    hubdiff.push_delta(tuned_folder, tmp_path / "delta", base=base)
    return tmp_path / "delta"


def test_what_was_added_removed_and_not_carried(delta: Path) -> None:
    document = hubdiff.inspect(delta).as_json()
    assert document["tensors"]["added"] == ["score.weight"]
    assert document["tensors"]["removed"] == ["model.layers.1.mlp.up_proj.weight"]
    assert [file["path"] for file in document["not_carried"]] == ["model.gguf"]
    assert document["rebuilds_tuned"] is True
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_sizes_are_those_on_the_disk(delta: Path) -> None:
    inspection = hubdiff.inspect(delta)
    layers = sum(file.stat().st_size for file in delta.glob("*-0*.safetensors"))
    tuned = (delta.parent / "tuned" / "model.safetensors").stat().st_size
    assert inspection.summary.delta_bytes == layers
    assert inspection.as_json()["bytes"]["tuned_weights"] == tuned
    assert set(inspection.summary.encodings) >= {"packed"}


def test_layers_are_in_model_order(delta: Path) -> None:
    places = [row.layer for row in hubdiff.inspect(delta).layers]
    assert places == sorted(places, key=lambda layer: -1 if layer is None else layer)
    assert {0, 1, None} == set(places)


def test_a_model_is_refused(delta: Path) -> None:
    with pytest.raises(NotADelta):
        hubdiff.inspect(delta.parent / "base")
