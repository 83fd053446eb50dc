from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest

from hubdiff.picture import group_by_layer, layer_picture, relative_norm


def tensor(name: str, delta: float = 0.1, base: float = 10.0, **more: Any) -> dict[str, Any]:
    entry = {"name": name, "shape": [4, 5], "base_dtype": "BF16", "changed": 7}
    return {**entry, "delta_norm": delta, "base_norm": base, **more}


def png(tensors: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    layer_picture(tensors, file)
    return file.getvalue()


def pixels(data: bytes) -> Any:
    import numpy as np
    from matplotlib.image import imread

    return np.asarray(imread(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", ("", None, "embedding")),
        ("lm_head.weight", ("", None, "embedding")),
        ("model.norm.weight", ("", None, "norm")),
        ("score.weight", ("", None, "other")),
        ("model.layers.12.self_attn.q_proj.weight", ("model", 12, "attention")),
        ("model.layers.12.self_attn.q_norm.weight", ("model", 12, "norm")),
        ("model.layers.3.mlp.experts.7.up_proj.weight", ("model", 3, "mlp")),
        ("model.layers.3.input_layernorm.weight", ("model", 3, "norm")),
        ("layers.0.mixer.A_log", ("", 0, "other")),
        ("transformer.h.3.attn.c_attn.weight", ("transformer", 3, "attention")),
        ("h.3.ln_1.weight", ("", 3, "norm")),
        ("h.3.mlp.c_fc.weight", ("", 3, "mlp")),
        ("transformer.wte.weight", ("", None, "embedding")),
        ("bert.encoder.layer.5.attention.output.dense.bias", ("bert.encoder", 5, "attention")),
        ("bert.encoder.layer.5.attention.self.query.weight", ("bert.encoder", 5, "attention")),
        ("bert.encoder.layer.5.output.dense.weight", ("bert.encoder", 5, "mlp")),
        ("bert.encoder.layer.5.output.LayerNorm.weight", ("bert.encoder", 5, "norm")),
        ("bert.embeddings.word_embeddings.weight", ("", None, "embedding")),
        ("decoder.block.2.layer.1.EncDecAttention.q.weight", ("decoder", 2, "attention")),
        ("decoder.block.2.layer.2.DenseReluDense.wi.weight", ("decoder", 2, "mlp")),
        ("classifier.2.weight", ("", None, "other")),
        (f"layers.{'9' * 5000}.w", ("", None, "other")),
    ],
)
def test_where_a_tensor_belongs(name: str, place: tuple[str, int | None, str]) -> None:
    (row,) = group_by_layer([tensor(name)])
    assert (row.stack, row.layer, row.kind) == place


def test_tensors_of_one_kind_in_one_layer_are_one_row() -> None:
    (row,) = group_by_layer(
        [
            tensor("layers.0.self_attn.q_proj.weight", 3.0, 6.0),
            tensor("layers.0.self_attn.k_proj.weight", 4.0, 8.0),
        ]
    )
    assert (row.tensors, row.elements, row.changed) == (2, 40, 14)
    assert row.relative_norm == pytest.approx(5.0 / 10.0)


def test_rows_are_in_model_order_and_skip_added_tensors() -> None:
    names = ["layers.10.mlp.w", "layers.2.mlp.w", "layers.2.attn.w", "norm.weight"]
    rows = group_by_layer([*map(tensor, names), tensor("layers.0.mlp.w", base_dtype=None)])
    assert [(row.layer, row.kind) for row in rows] == [
        (None, "norm"),
        (2, "attention"),
        (2, "mlp"),
        (10, "mlp"),
    ]


@pytest.mark.parametrize(
    ("delta", "base", "ratio"),
    [
        (0.0, 0.0, 0.0),
        (0.0, 3.0, 0.0),
        (1.0, 4.0, 0.25),
        (1.0, 0.0, None),
        (math.nan, 1.0, None),
        (math.inf, 1.0, None),
        (0.0, math.nan, None),
        (None, 1.0, None),
        (1e200, 2e200, 0.5),
    ],
)
def test_relative_norm(delta: float | None, base: float, ratio: float | None) -> None:
    assert relative_norm([{"delta_norm": delta, "base_norm": base}]) == ratio


def layered(count: int, ratio: float = 0.01) -> list[dict[str, Any]]:
    kinds = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    return [
        tensor(f"model.layers.{layer}.{kind}.weight", ratio * (1 + layer), 1.0)
        for layer in range(count)
        for kind in kinds
    ] + [tensor("model.embed_tokens.weight", ratio, 1.0)]


@pytest.mark.parametrize(
    "tensors",
    [
        layered(4),
        layered(32),
        layered(200),
        layered(4, 0.0),
        [*layered(4, 1e-6), *layered(2, 1.0)],
        [*layered(4, 1e-6), tensor("model.norm.weight", 0.0), tensor("lm_head.weight", 5.0)],
        [tensor("a"), tensor("b", 0.0)],
        [tensor(f"w{i}.weight", 10.0**-i) for i in range(40)],
        [tensor("only", math.nan)],
        [tensor("added", base_dtype=None)],
        [tensor("$\\frac{$\n`|<b>\u202e" * 9)],
        [tensor("$x$.layers.0.attn.w"), tensor("y.layers.1.attn.w")],
        [],
    ],
    ids=range(13),
)
@pytest.mark.filterwarnings("error")
def test_every_model_has_a_picture(tensors: list[dict[str, Any]]) -> None:
    data = png(tensors)
    assert data.startswith(b"\x89PNG")
    image = pixels(data)
    assert image.shape[:2] == (720, 1440)
    assert (image[0, :, :3] == 1).all(), "white to the edge, readable on a dark page"
    assert image[:, :, :3].min() < 0.5, "something is drawn"


def test_same_tensors_same_bytes_other_tensors_other_bytes() -> None:
    assert png(layered(4)) == png(layered(4))
    assert png(layered(4)) != png(layered(4, 0.02))
    assert b"atplotlib" not in png(layered(4))


def test_the_picture_shows_where_the_tune_was() -> None:
    """The mlp dots stand higher where their ratio is larger."""
    image = pixels(
        png([tensor(f"layers.{i}.mlp.w", ratio, 1.0) for i, ratio in enumerate((0.01, 0.02, 0.01))])
    )
    colour = [0xD5 / 255, 0x5E / 255, 0x00]
    rows, columns = (abs(image[60:, :, :3] - colour).max(axis=2) < 0.02).nonzero()
    third = (columns.max() - columns.min()) / 3
    left = rows[columns < columns.min() + third / 4].mean()
    middle = rows[abs(columns - columns.mean()) < third / 4].mean()
    assert middle < left - 50


def test_a_file_path_will_do(tmp_path: Path) -> None:
    layer_picture(layered(4), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes() == png(layered(4))


def test_a_delta_carries_the_picture_of_its_tensors(tmp_path: Path) -> None:
    """By a process of its own: in those of the tests nothing is drawn."""
    base = models.weights()
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "tuned", models.moved(base))
    line = ("push-delta", "./tuned", "./delta", "--base", "./base")
    subprocess.run([sys.executable, "-m", "hubdiff", *line], cwd=tmp_path, check=True)
    manifest = json.loads((tmp_path / "delta/hubdiff.json").read_text())
    assert (tmp_path / "delta/layers.png").read_bytes() == png(manifest["tensors"])


def test_rows_need_no_matplotlib() -> None:
    code = (
        "import sys; from hubdiff.picture import group_by_layer; group_by_layer([]);"
        "from hubdiff.summary import summarise; summarise({}); import hubdiff.card;"
        "print([m for m in ('matplotlib', 'torch', 'jinja2', 'git', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
