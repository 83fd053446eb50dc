"""Real trained weights: three BERTs of the rxnfp wheel (MIT), a base and two fine-tunes of it.

Key prefixes differ (``bert.`` or none), heads are on one side only, weights are float32. The wheel
is fetched once with pip into ``HUBDIFF_TEST_DATA`` (``~/.cache/hubdiff-tests``); without a network
these tests are skipped. Its pickles are read with ``weights_only=True`` and never by hubdiff.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from models import hashes
from safetensors.torch import load_file, save_file

import hubdiff

WHEEL = "rxnfp-0.1.0-py3-none-any.whl"
BASE, TUNED, CLASSES = "bert_pretrained", "bert_ft", "bert_ft_10k_25s"
WORDS = "embeddings.word_embeddings.weight"

Folders = dict[str, Path]


def _wheel(requirement: str = "rxnfp==0.1.0", file: str = WHEEL) -> Path:
    cache = Path(os.environ.get("HUBDIFF_TEST_DATA", "~/.cache/hubdiff-tests")).expanduser()
    if not (cache / file).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", requirement, "--dest", str(cache)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip took too long to fetch {requirement}")
        if done.returncode:
            pytest.skip(f"pip can't fetch {requirement}: {done.stderr.strip()[-300:]}")
    return cache / file


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The three models as safetensors folders, and each in bfloat16 as ``NAME-bf16``."""
    root, folders = tmp_path_factory.mktemp("rxnfp"), {}
    with zipfile.ZipFile(_wheel()) as wheel:
        names = wheel.namelist()
        for name in (BASE, TUNED, CLASSES):
            inside = next(n for n in names if n.endswith(f"/{name}/pytorch_model.bin"))
            wheel.extract(inside, root / "wheel")
            state = torch.load(root / "wheel" / inside, weights_only=True, map_location="cpu")
            tensors = {key: tensor.contiguous().clone() for key, tensor in state.items()}
            for kind, suffix in ((None, ""), (torch.bfloat16, "-bf16")):
                folder = root / f"{name}{suffix}"
                folder.mkdir()
                save_file(
                    {
                        k: t.to(kind) if kind and t.is_floating_point() else t
                        for k, t in tensors.items()
                    },
                    folder / "model.safetensors",
                )
                for file in ("config.json", "vocab.txt"):
                    member = f"{Path(inside).parent.as_posix()}/{file}"
                    if member in names:
                        (folder / file).write_bytes(wheel.read(member))
                folders[folder.name] = folder
    return folders


@pytest.mark.parametrize("kind", ["", "-bf16"], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tune", [TUNED, CLASSES])
def test_real_fine_tunes_come_back_bit_by_bit(
    models: Folders, tmp_path: Path, tune: str, kind: str, record_property: pytest.RecordProperty
) -> None:
    base, tuned = models[BASE + kind], models[tune + kind]
    pushed = hubdiff.push_delta(tuned, tmp_path / "delta", base=base, force=True)
    applied = hubdiff.apply(tmp_path / "delta", base, output=tmp_path / "out")
    assert applied.plan["case"] == "own base"
    result = hashes(tmp_path / "out")
    del result["hubdiff-result.json"]
    assert result == hashes(tuned)
    verified = hubdiff.verify(tmp_path / "delta", base=base, tuned=tuned)
    assert verified.rebuilt == len(result)
    model = (tuned / "model.safetensors").stat().st_size
    sizes = {
        group: sum(file.size for file in files) / model
        for group, files in pushed.manifest.layers.items()  # type: ignore[union-attr]
    }
    record_property("sizes", sizes)
    print(f"{tune}{kind}: {model:,} bytes;", {g: f"{s:.1%}" for g, s in sizes.items()})
    # Far from the base (‖Δ‖/‖base‖ 0.22 and 0.09), so dense; well below the model all the same.
    assert sizes["delta"] < (0.45 if kind == "" else 0.8)
    assert sum(sizes.values()) < (0.9 if kind == "" else 0.8)
    if kind:
        assert sizes["exact"] < 0.001


@pytest.mark.parametrize("kind", ["", "-bf16"], ids=["float32", "bfloat16"])
def test_one_real_delta_on_the_other_tune(models: Folders, tmp_path: Path, kind: str) -> None:
    """``bert_ft`` has no prefix, ``bert_ft_10k_25s`` has ``bert.`` and a classifier."""
    base, tuned, target = (load_file(models[n + kind] / "model.safetensors") for n in _NAMES)
    hubdiff.push_delta(
        models[TUNED + kind], tmp_path / "delta", base=models[BASE + kind], force=True
    )
    applied = hubdiff.apply(tmp_path / "delta", models[CLASSES + kind], output=tmp_path / "out")
    assert applied.plan["case"] == "transfer"
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert set(result) == set(target)
    # The tune's own head, or none, never takes the place of the target's.
    heads = [name for name in target if name.startswith("classifier.")]
    assert heads
    for name in heads:
        assert torch.equal(result[name], target[name])
    moved = 0
    for name, tensor in target.items():
        inner = name.removeprefix("bert.")
        pair = [
            next((m[n] for n in (inner, f"bert.{inner}") if n in m), None) for m in (tuned, base)
        ]
        if pair[0] is None or pair[1] is None or not tensor.is_floating_point():
            assert torch.equal(result[name], tensor), name
            continue
        exact = tensor.double() + (pair[0].double() - pair[1].double())
        error = (result[name].double() - exact).abs()
        if kind:  # the exact difference, rounded once: within half a step of bfloat16
            assert bool((error <= exact.abs() * 2**-8 + 1e-38).all()), name
        else:  # a difference of eight bits, on float32
            assert error.norm() <= 2**-8 * (exact - tensor.double()).norm() + 1e-6, name
        moved += 1
    assert moved > 150


_NAMES = (BASE, TUNED, CLASSES)


def test_the_real_tune_leaves_most_words_alone(models: Folders, tmp_path: Path) -> None:
    """76.3 % of the word embedding of ``bert_ft_10k_25s`` is as in its base."""
    hubdiff.push_delta(models[CLASSES], tmp_path / "delta", base=models[BASE], force=True)
    with hubdiff.open_delta(tmp_path / "delta") as delta:
        record = next(r for r in delta.manifest.tensors if r.name.endswith(WORDS))
        step = delta.get_tensor(record.name)
    unchanged = 1 - record.changed / step.numel()
    assert unchanged == pytest.approx(0.763, abs=0.001)
    assert float((step == 0).float().mean()) == pytest.approx(unchanged, abs=0.001)


@pytest.mark.parametrize(("tune", "target"), [(TUNED, CLASSES), (CLASSES, TUNED)])
def test_check_lets_one_fine_tune_go_on_another_of_its_base(
    models: Folders, tmp_path: Path, tune: str, target: str
) -> None:
    hubdiff.push_delta(models[tune], tmp_path / "delta", base=models[BASE], force=True)
    checked = hubdiff.check(tmp_path / "delta", models[target])
    assert checked.verdict.level == "go", checked.verdict.reasons
    assert checked.forecast is not None
    assert 0.95 < (checked.forecast.cosine or 0) < 1


def test_check_refuses_unrelated_weights_of_the_same_shapes(tmp_path: Path) -> None:
    """silero-vad 5.1 and 6.0: the same names and shapes, and nothing in common."""
    sides = []
    for version in ("5.1", "6.0.0"):
        file = f"silero_vad-{version}-py3-none-any.whl"
        with zipfile.ZipFile(_wheel(f"silero-vad=={version}", file)) as wheel:
            inside = next(n for n in wheel.namelist() if n.endswith("silero_vad.jit"))
            module = torch.jit.load(wheel.extract(inside, tmp_path / version), map_location="cpu")
        state = module.state_dict().items()
        sides.append({n: t.contiguous().clone() for n, t in state if t.is_floating_point()})
    base, target = sides
    tuned = {name: tensor + 1e-4 for name, tensor in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned), ("target", target)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    hubdiff.push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base", force=True)
    checked = hubdiff.check(tmp_path / "delta", tmp_path / "target")
    assert checked.verdict.level == "refuse"
    assert (checked.forecast.cosine or 1) < 0.3  # type: ignore[union-attr]
