"""load: which class is made, what is refused, and how long the temporary folder lives."""

from __future__ import annotations

import builtins
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import models
import pytest
import torch

import hubdiff
from hubdiff.errors import CheckpointError, HubdiffError


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A delta and its base. Temporary folders are made in ``tmp_path / "temporary"``."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return make_pair(tmp_path)


def make_pair(folder: Path, **config: Any) -> tuple[Path, Path]:
    base = models.save(folder / "base", models.weights(), **config)
    tuned = models.save(folder / "tuned", models.moved(models.weights()), **config)
    hubdiff.push_delta(tuned, folder / "delta", base=base)
    return folder / "delta", base


def left_over(folder: Path) -> list[Path]:
    return list((folder / "temporary").glob("hubdiff-*"))


def test_the_model_is_loaded_and_the_folder_is_gone(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    model = hubdiff.load(*pair, dtype=torch.bfloat16)
    expected = models.moved(models.weights())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(model.state_dict()["lm_head.weight"], expected["lm_head.weight"])
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("model_type", ["llama", "custom"])
def test_code_that_comes_with_a_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Nor is anybody asked whether to run it."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig\nclass C(LlamaConfig):\n"
    code += "    model_type = 'custom'\n"
    delta, base = make_pair(
        tmp_path,
        files={"own.py": code},
        model_type=model_type,
        auto_map={"AutoConfig": "own.C"},
    )
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    if model_type == "llama":
        hubdiff.load(delta, base)
    else:
        with pytest.raises(CheckpointError, match="custom code"):
            hubdiff.load(delta, base)
    assert not ran.exists()


def test_trust_remote_code_is_refused_before_the_work(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(HubdiffError, match="trust_remote_code"):
        hubdiff.load(*pair, trust_remote_code=True)
    assert left_over(tmp_path) == []
    assert hubdiff.load(*pair, trust_remote_code=False) is not None


def test_device_map_without_accelerate_says_what_to_install(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr("hubdiff.jobs.load.find_spec", lambda name: None)
    with pytest.raises(HubdiffError, match="accelerate") as caught:
        hubdiff.load(*pair, device_map="auto")
    assert "pip install accelerate" in (caught.value.next_step or "")


@pytest.mark.parametrize(
    "architectures",
    [["utils"], ["AutoTokenizer"], ["AutoModel"], "LlamaForCausalLM", [1], [], ["Nothing"]],
)
def test_an_architecture_that_is_no_model_is_refused(tmp_path: Path, architectures: object) -> None:
    delta, base = make_pair(tmp_path, architectures=architectures)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hubdiff.load(delta, base)


@pytest.mark.parametrize("changes", [{"model_type": None}, {"hidden_size": "wide"}])
def test_a_config_of_nonsense_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    delta, base = make_pair(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hubdiff.load(delta, base)


def test_no_config_is_refused(tmp_path: Path) -> None:
    base = models.save(tmp_path / "base", models.weights())
    tuned = models.save(tmp_path / "tuned", models.moved(models.weights()))
    for folder in (base, tuned):
        (folder / "config.json").unlink()
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hubdiff.load(tmp_path / "delta", base)


def test_weights_left_on_the_disk_live_as_long_as_the_model(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate leaves on the disk is read from the folder at every step."""
    import transformers

    original = transformers.LlamaForCausalLM.from_pretrained.__func__

    def offloading(cls: type, *args: Any, **kwargs: Any) -> Any:
        model = original(cls, *args, **kwargs)
        model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
        return model

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", classmethod(offloading))
    model = hubdiff.load(*pair, device_map="auto")
    (folder,) = left_over(tmp_path)
    assert json.loads((folder / "model" / "config.json").read_text())
    del model
    gc.collect()
    assert left_over(tmp_path) == []
