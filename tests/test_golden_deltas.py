"""Deltas written once and committed: they are read forever, and written again byte for byte.

A case is a folder ``golden/deltas/v1-NAME`` with ``base``, ``target``, ``delta`` and the hashes
that the rebuild and the transfer must have. A new one is written by ``python
tests/test_golden_deltas.py``, which never touches one that is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import zstandard

import hubdiff
from hubdiff.encodings import ENCODINGS
from hubdiff.hashing import hash_bytes
from hubdiff.manifest import LAYERS

GOLDEN = Path(__file__).parent / "golden" / "deltas"
WRITTEN_WITH_ZSTD = (1, 5, 7)
Bits = dict[str, tuple[str, np.ndarray]]


def test_every_kind_of_part_and_encoding_is_golden() -> None:
    parts = [
        (part["group"], tuple(part["layers"]), part["encoding"])
        for case in CASES
        for tensor in _manifest(GOLDEN / case)["tensors"]
        for part in tensor["parts"]
    ]
    kinds = {(group, layers) for group, layers, _ in parts}
    assert kinds == {(group, layers) for group, known in LAYERS.items() for layers in known}
    assert {encoding for *_, encoding in parts} == set(ENCODINGS)


def test_every_golden_delta_is_tested() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)


def test_golden_deltas_are_small() -> None:
    for case in CASES:
        assert sum(p.stat().st_size for p in (GOLDEN / case).rglob("*") if p.is_file()) < 50_000


# --- the models: whole numbers and bit patterns, so that no library can ever change them ---


def _noise(count: int, salt: int) -> np.ndarray:
    """Arbitrary 32-bit numbers."""
    x = np.arange(count, dtype=np.uint64) + np.uint64(salt << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x >> np.uint64(32)).astype(np.uint32)


def _half(shape: tuple[int, ...], salt: int, top: int) -> np.ndarray:
    """16-bit floats of one magnitude: ``top`` is their exponent, sign and mantissa are noise."""
    noise = _noise(int(np.prod(shape)), salt).astype(np.uint16)
    return ((noise & 0x807F) | (top << 7)).reshape(shape).astype(np.uint16)


def _single(shape: tuple[int, ...], salt: int) -> np.ndarray:
    noise = _noise(int(np.prod(shape)), salt)
    return ((noise & 0x807FFFFF) | (0x79 << 23)).reshape(shape).astype(np.uint32)


def _tuned(bits: np.ndarray, salt: int, most: int) -> np.ndarray:
    """Half of the elements a few steps of their own size away."""
    noise = _noise(bits.size, salt).reshape(bits.shape)
    step = ((noise >> 8) % most).astype(bits.dtype)
    return np.where(noise & 1, bits + step, bits).astype(bits.dtype)


def _model(dtype: str, salt: int = 0) -> Bits:
    shapes = {"layers.0.mlp.weight": (24, 16), "layers.1.mlp.weight": (16, 8), "norm.weight": (8,)}
    make: Callable[[tuple[int, ...], int], np.ndarray]
    if dtype == "F32":
        make = _single
    else:
        make = lambda shape, salt: _half(shape, salt, {"BF16": 0x79, "F16": 0x3A}[dtype])  # noqa: E731
    return {name: (dtype, make(shape, salt + i)) for i, (name, shape) in enumerate(shapes.items())}


def _move(model: Bits, salt: int = 100) -> Bits:
    return {
        name: (dtype, _tuned(bits, salt + i, 64 if bits.itemsize == 2 else 1 << 18))
        for i, (name, (dtype, bits)) in enumerate(model.items())
        if not name.startswith("norm")
    } | {name: tensor for name, tensor in model.items() if name.startswith("norm")}


Models = tuple[Bits, Bits, Bits]


def _bf16() -> Models:
    base = _model("BF16")
    tuned = _move(base)
    specials = tuned["layers.1.mlp.weight"][1].copy()
    specials[0, :4] = [0x8000, 0x7FC1, 0x7F80, 0x0001]  # −0.0, a NaN with a payload, Inf, the least
    specials[1, :2] = [0x7F7F, 0x0000]
    tuned["layers.1.mlp.weight"] = ("BF16", specials)
    return base, tuned, _model("BF16", 50)


def _fp16() -> Models:
    base = _model("F16")
    tuned = _move(base)
    inexact = tuned["layers.0.mlp.weight"][1].copy()
    inexact[:2] = (inexact[:2] & 0x83FF) | 0x1001  # a few exponents down: Δ needs its tail
    tuned["layers.0.mlp.weight"] = ("F16", inexact)
    return base, tuned, _model("F16", 50)


def _fp32() -> Models:
    base = _model("F32")
    return base, _move(base), _model("BF16", 50)


def _renamed() -> Models:
    base = {f"bert.{name}": tensor for name, tensor in _model("BF16").items()}
    base["cls.bias"] = ("F32", _single((3,), 7))
    base["bert.positions"] = ("I64", np.arange(6, dtype=np.uint64))
    tuned = {name.removeprefix("bert."): tensor for name, tensor in _move(base).items()}
    del tuned["cls.bias"]
    tuned["positions"] = ("I64", np.arange(6, dtype=np.uint64) + np.uint64(1))
    tuned["classifier.weight"] = ("F16", _half((3, 8), 9, 0x3A))
    tuned["classifier.steps"] = ("I64", np.array(5, dtype=np.uint64))
    return base, tuned, {**_model("BF16", 50), "positions": base["bert.positions"]}


def _rows() -> Models:
    """A vocabulary of 12 tokens in the base, of 14 in the tuned model, in another order in the
    target."""
    name = "model.embed_tokens.weight"
    base = {**_model("BF16"), name: ("BF16", _half((12, 16), 20, 0x79))}
    tuned = _move(base)
    more = np.concatenate([tuned[name][1], _half((2, 16), 21, 0x79)])
    target = {**_model("BF16", 50), name: ("BF16", _half((13, 16), 22, 0x79))}
    return base, {**tuned, name: ("BF16", more)}, target


WORDS = [f"w{i}" for i in range(12)]
# The tokens of base, tuned model and target, by row, of a case that has any.
TOKENS = {"v1-rows": (WORDS, [*WORDS, "<a>", "<b>"], [*reversed(WORDS), "<other>"])}
NONE: tuple[list[str], list[str], list[str]] = ([], [], [])

CASES: dict[str, tuple[Callable[[], Models], dict[str, Any]]] = {
    "v1-packed-bf16": (_bf16, {}),
    "v1-plain-fp16": (_fp16, {"plain": True}),
    "v1-fp32-with-exact": (_fp32, {}),
    "v1-added-removed-renamed": (_renamed, {}),
    "v1-plain-added": (_renamed, {"plain": True}),
    "v1-rows": (_rows, {}),
}
every_case = pytest.mark.parametrize("case", CASES)


def _manifest(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "delta/hubdiff.json").read_bytes())
    return document


def _hashes(folder: Path) -> dict[str, str]:
    """The files of a result; its record and its card name folders and versions."""
    return {
        path.relative_to(folder).as_posix(): hash_bytes(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("hubdiff-result.json", "README.md")
    }


def _results(case: Path, folder: Path) -> dict[str, dict[str, str]]:
    """What comes of a case: its tuned model, and its delta on its target."""
    found = {}
    for name, to, scale in (
        ("own base", "base", 1.0),
        ("transfer", "target", 1.0),
        ("half of it", "target", 0.5),
    ):
        output = folder / name.replace(" ", "-")
        applied = hubdiff.apply(case / "delta", case / to, output=output, scale=scale, force=True)
        assert applied.plan["case"] == ("own base" if to == "base" else "transfer")
        found[name] = _hashes(output)
    return found


@every_case
def test_old_deltas_are_read_forever(case: str, tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / case / "expected.json").read_bytes())
    assert _results(GOLDEN / case, tmp_path) == expected
    verified = hubdiff.verify(GOLDEN / case / "delta", base=GOLDEN / case / "base")
    assert verified.rebuilt == len(expected["own base"])


@every_case
def test_the_tuned_model_is_what_it_was_made_from(case: str, tmp_path: Path) -> None:
    """The hashes in the delta could agree with each other and all be wrong."""
    _, tuned, _ = CASES[case][0]()
    hubdiff.apply(GOLDEN / case / "delta", GOLDEN / case / "base", output=tmp_path / "out")
    _write(tmp_path / "tuned", tuned, TOKENS.get(case, NONE)[1], eos_token_id=7)
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "tuned")


@every_case
@pytest.mark.skipif(
    zstandard.ZSTD_VERSION != WRITTEN_WITH_ZSTD,
    reason="another libzstd may choose other, equally valid frames",
)
def test_the_same_models_still_give_the_same_bytes(case: str, tmp_path: Path) -> None:
    _, tuned, _ = CASES[case][0]()
    _write(tmp_path / "tuned", tuned, TOKENS.get(case, NONE)[1], eos_token_id=7)
    hubdiff.push_delta(
        tmp_path / "tuned", tmp_path / "delta", base=GOLDEN / case / "base", **CASES[case][1]
    )
    old, new = _manifest(GOLDEN / case), _manifest(tmp_path)
    for document in (old, new):
        del document["hubdiff_version"]
        for tensor in document["tensors"]:  # sums, whose last digit may depend on the processor
            assert tensor.pop("delta_norm") >= 0
            assert tensor.pop("base_norm") >= 0
    assert new == old
    for files in new["layers"].values():
        for file in files:
            written = (tmp_path / "delta" / file["path"]).read_bytes()
            assert written == (GOLDEN / case / "delta" / file["path"]).read_bytes()


def _write(folder: Path, model: Bits, tokens: Sequence[str] = (), **config: object) -> None:
    """A model folder, written without any library that could write it otherwise one day."""
    folder.mkdir(parents=True)
    header, body = {}, b""
    for name, (dtype, bits) in model.items():
        data = bits.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(bits.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    (folder / "config.json").write_text(json.dumps({"model_type": "golden", **config}) + "\n")
    if tokens:
        words = {token: row for row, token in enumerate(tokens) if not token.startswith("<")}
        added = [{"id": tokens.index(t), "content": t} for t in tokens if t.startswith("<")]
        document = {"model": {"type": "WordLevel", "vocab": words}, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(document) + "\n")


def _make(case: str) -> None:
    models, options = CASES[case]
    base, tuned, target = models()
    folder = GOLDEN / case
    tokens = TOKENS.get(case, NONE)
    _write(folder / "base", base, tokens[0])
    _write(folder / "target", target, tokens[2], rope_theta=5e5)
    with TemporaryDirectory() as temporary:
        _write(Path(temporary, "tuned"), tuned, tokens[1], eos_token_id=7)
        hubdiff.push_delta(
            Path(temporary, "tuned"), folder / "delta", base=folder / "base", **options
        )
        for name in ("layers.png", "README.md"):  # no part of the format
            (folder / "delta" / name).unlink()
        expected = _results(folder, Path(temporary))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    for missing in [case for case in CASES if not (GOLDEN / case).exists()]:
        _make(missing)
        print("wrote", missing)
