from __future__ import annotations

import pytest

from hubdiff.sidecars import (
    LARGEST_SIDE_FILE,
    Carried,
    LeftOut,
    NotCarried,
    SideFile,
    classify,
    result_sidecars,
)

WEIGHTS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "LICENSE",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "modeling_custom.py",
        "optimizer.py",
        "assets/picture.png",
        "1_Pooling/config.json",
        "trainer_state.json",
        "model.safetensors.index.json",
        "scores.xml",
        "checkpoint-notes.md",
        "onnx.md",
        *sorted(WEIGHTS),
    ],
)
def test_carried(path: str) -> None:
    assert classify(path, 10, WEIGHTS) == Carried()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("pytorch_model.bin", "pickle"),
        ("pytorch_model-00001-of-00002.bin", "pickle"),
        ("model.PT", "pickle"),
        ("consolidated.00.pth", "pickle"),
        ("last.ckpt", "pickle"),
        ("labels.pkl", "pickle"),
        ("pytorch_model.bin.index.json", "index"),
        ("model-q4.gguf", "GGUF"),
        ("ggml-model.ggml", "GGUF"),
        ("model.onnx", "ONNX"),
        ("onnx/config.json", "ONNX"),
        ("sub/onnx/model.onnx_data", "ONNX"),
        ("tf_model.h5", "TensorFlow"),
        ("model.tflite", "TensorFlow"),
        ("saved_model/variables/variables.index", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("rust_model.ot", "rust"),
        ("coreml/model.mlpackage/Manifest.json", "Core ML"),
        ("a.mlmodel", "Core ML"),
        ("openvino_model.xml", "OpenVINO"),
        ("openvino/openvino_model.bin", "OpenVINO"),
        ("consolidated.safetensors", "outside the checkpoint"),
        ("other.safetensors", "outside the checkpoint"),
        ("adapter_model.safetensors", "adapter"),
        ("adapter_config.json", "adapter"),
        ("optimizer.pt", "training state"),
        ("scheduler.pt", "training state"),
        ("rng_state_0.pth", "training state"),
        ("training_args.bin", "training state"),
        ("checkpoint-500/config.json", "training checkpoint"),
        ("global_step10/x.txt", "training checkpoint"),
        (".gitattributes", "the Hub writes its own"),
        (".git/HEAD", "git"),
        (".cache/huggingface/x", "cache"),
        ("hubdiff-result.json", "record"),
    ],
)
def test_not_carried_with_a_reason(path: str, words: str) -> None:
    verdict = classify(path, 10, WEIGHTS)
    assert isinstance(verdict, NotCarried)
    assert words in verdict.reason


def test_a_large_side_file_stays_but_large_weights_travel() -> None:
    assert classify("data.json", LARGEST_SIDE_FILE) == Carried()
    verdict = classify("data.json", LARGEST_SIDE_FILE + 1)
    assert isinstance(verdict, NotCarried)
    assert "256 MB" in verdict.reason
    assert classify("model.safetensors", 10**10, {"model.safetensors"}) == Carried()


def plan(
    base: dict[str, int],
    tuned: dict[str, int],
    target: dict[str, int],
    weights: set[str] | None = None,
) -> tuple[dict[str, SideFile], dict[str, LeftOut]]:
    result = result_sidecars(base, tuned, target, weights=weights or set())
    files = {file.path: file for file in result.files}
    left_out = {file.path: file for file in result.left_out}
    assert len(files) == len(result.files)
    assert not set(files) & set(left_out)
    return files, left_out


@pytest.mark.parametrize(
    ("base", "tuned", "target", "source", "noted"),
    [
        (1, 1, 1, "target", False),
        (1, 2, 1, "tuned", False),
        (1, 1, 2, "target", False),
        (1, 2, 2, "target", False),
        (1, 2, 3, "tuned", True),  # both changed it
        (None, 1, None, "tuned", False),  # added by the tune
        (None, None, 1, "target", False),  # added by the target
        (None, 1, 2, "tuned", True),  # added by both
        (1, None, 1, "target", True),  # deleted by the tune
        (1, None, 2, "target", True),
        (1, 2, None, "tuned", False),  # deleted by the target, changed by the tune
    ],
)
def test_three_way(
    base: int | None, tuned: int | None, target: int | None, source: str, noted: bool
) -> None:
    name = "chat_template.jinja"
    sides = [{} if side is None else {name: side} for side in (base, tuned, target)]
    files, left_out = plan(*sides)
    assert files[name].source == source
    assert (files[name].note is not None) == noted
    assert not left_out


def test_deleted_by_the_target_and_untouched_by_the_tune_is_gone() -> None:
    files, left_out = plan({"tokenizer.model": 1}, {"tokenizer.model": 1}, {})
    assert not files
    assert "target does not have it" in left_out["tokenizer.model"].reason


def test_configs_are_merged_only_when_both_sides_have_a_say() -> None:
    names = ("config.json", "generation_config.json", "sub/config.json")
    files, _ = plan(dict.fromkeys(names, 1), dict.fromkeys(names, 2), dict.fromkeys(names, 3))
    assert {path: file.source for path, file in files.items()} == {
        "config.json": "merged",
        "generation_config.json": "merged",
        "sub/config.json": "tuned",
    }
    files, _ = plan({}, {"generation_config.json": 2}, {})
    assert files["generation_config.json"].source == "tuned"
    files, _ = plan({"config.json": 1}, {"config.json": 1}, {"config.json": 2})
    assert files["config.json"].source == "target"


def test_readme_and_records_are_not_copied() -> None:
    sides = {"README.md": 1, "hubdiff-result.json": 1}
    files, left_out = plan(sides, {**sides, "README.md": 2}, sides)
    assert not files
    assert "card of its own" in left_out["README.md"].reason
    assert "hubdiff-result.json" in left_out


def test_other_formats_of_the_target_are_stale_and_named() -> None:
    target = {"model.gguf": 1, "onnx/model.onnx": 2, "config.json": 3}
    files, left_out = plan({}, {"tuned.gguf": 9}, target)
    assert set(files) == {"config.json"}
    assert set(left_out) == {"model.gguf", "onnx/model.onnx"}


def test_weights_and_their_index_are_not_side_files() -> None:
    side = {"model.safetensors": 1, "model.safetensors.index.json": 1, "a.txt": 1}
    files, left_out = plan(side, side, side, weights={"model.safetensors"})
    assert set(files) == {"a.txt"}
    assert not left_out


def test_a_tokenizer_from_both_sides_is_noted() -> None:
    base = {"tokenizer.json": 1, "tokenizer_config.json": 1}
    tuned = {**base, "tokenizer_config.json": 2}
    files, _ = plan(base, tuned, {"tokenizer.json": 3, "tokenizer_config.json": 1})
    assert files["tokenizer.json"].source == "target"
    assert "check that they agree" in (files["tokenizer.json"].note or "")
    files, _ = plan(base, tuned, base)
    assert all(file.note is None for file in files.values())
