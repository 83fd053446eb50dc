"""open_delta: Δ of one tensor, whatever happened to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import models
import pytest
import torch

import hubdiff
from hubdiff.errors import DeltaError, NotPortable


def pushed(
    folder: Path, base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor]
) -> Path:
    one, other = models.save(folder / "tuned", tuned), models.save(folder / "base", base)
    hubdiff.push_delta(one, folder / "delta", base=other)
    return folder / "delta"


def test_a_tensor_that_did_not_change_has_a_delta_that_changes_nothing(tmp_path: Path) -> None:
    base = models.weights()
    with hubdiff.open_delta(pushed(tmp_path, base, models.moved(base))) as delta:
        step = delta.get_tensor("model.norm.weight")
    assert (step.dtype, step.shape) == (torch.float32, base["model.norm.weight"].shape)
    assert torch.equal(step.view(torch.int32), torch.full_like(step, -0.0).view(torch.int32))


def test_a_name_it_does_not_have_is_named(tmp_path: Path) -> None:
    base = models.weights()
    with (
        hubdiff.open_delta(pushed(tmp_path, base, models.moved(base))) as delta,
        pytest.raises(DeltaError, match=r"model\.nrom\.weight"),
    ):
        delta.get_tensor("model.nrom.weight")


def test_an_added_tensor_comes_as_it_is(tmp_path: Path) -> None:
    base = models.weights()
    added = {"extra.weight": torch.arange(6.0).reshape(2, 3), "empty.weight": torch.zeros(0, 3)}
    with hubdiff.open_delta(pushed(tmp_path, base, base | added)) as delta:
        for name, tensor in added.items():
            found = delta.get_tensor(name)
            assert found.shape == tensor.shape
            assert torch.equal(found, tensor)


def test_a_change_that_is_no_number_to_add_is_refused(tmp_path: Path) -> None:
    """Zeros would be a lie: these bytes did change."""
    base = models.weights() | {"packed.weight": torch.zeros(8, dtype=torch.uint8)}
    tuned = base | {"packed.weight": torch.ones(8, dtype=torch.uint8)}
    with (
        hubdiff.open_delta(pushed(tmp_path, base, tuned)) as delta,
        pytest.raises(NotPortable, match=r"packed\.weight"),
    ):
        delta.get_tensor("packed.weight")
