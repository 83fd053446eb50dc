"""An adapter's delta, written once and committed: read forever, and written again byte for byte.

``golden/adapter`` has ``base``, ``adapter``, ``delta`` and the hash that the base with the adapter
must have. ``python -m tests.test_golden_adapter`` writes what is missing, and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import hubdiff
from hubdiff.hashing import hash_bytes
from hubdiff.progress import Silent
from tests.models import hashes
from tests.test_golden_deltas import Bits, _half, _model, _single, _write

GOLDEN = Path(__file__).parent / "golden" / "adapter"
RANK = 2
NO_PART = ("layers.png", "README.md")  # of the format
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "golden/base",
    "r": RANK,
    "lora_alpha": 3,
    "target_modules": ["mlp"],
}


def _adapter(folder: Path) -> None:
    """Factors in float32 for one matrix and in bf16 for the other."""
    makers = {"F32": _single, "BF16": lambda shape, salt: _half(shape, salt, 0x7B)}
    model: Bits = {}
    for salt, (module, rows, columns, dtype) in enumerate(
        (("layers.0.mlp", 24, 16, "F32"), ("layers.1.mlp", 16, 8, "BF16"))
    ):
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (RANK, columns), "lora_B": (rows, RANK)}
        for side, shape in shapes.items():
            bits: np.ndarray = makers[dtype](shape, 200 + 2 * salt + (side == "lora_B"))
            model[f"base_model.model.{module}.{side}.weight"] = (dtype, bits)
    _write(folder, model)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG) + "\n")


def _result(folder: Path) -> str:
    hubdiff.apply(GOLDEN / "delta", GOLDEN / "base", output=folder / "out")
    return hash_bytes((folder / "out" / "model.safetensors").read_bytes())


def test_an_old_delta_of_an_adapter_is_read_forever(tmp_path: Path) -> None:
    assert _result(tmp_path) == (GOLDEN / "expected").read_text().strip()
    hubdiff.export(GOLDEN / "delta", tmp_path / "peft")
    assert hashes(tmp_path / "peft") == hashes(GOLDEN / "adapter")


class Counted(Silent):
    total = done = 0

    def start(self, what: str, total: int) -> None:
        self.total += total

    def advance(self, count: int) -> None:
        self.done += count


def test_an_export_tells_how_far_it_is(tmp_path: Path) -> None:
    counted = Counted()
    hubdiff.export(GOLDEN / "delta", tmp_path / "peft", progress=counted)
    assert counted.done == counted.total > 0


def test_the_same_adapter_still_gives_the_same_bytes(tmp_path: Path) -> None:
    _adapter(tmp_path / "adapter")
    assert hashes(tmp_path / "adapter") == hashes(GOLDEN / "adapter")
    hubdiff.push_delta(tmp_path / "adapter", tmp_path / "delta", base=GOLDEN / "base")
    new, old = hashes(tmp_path / "delta"), hashes(GOLDEN / "delta")
    for name in (*NO_PART, "hubdiff.json"):  # norms in it may end in another digit
        new.pop(name, None)
        old.pop(name, None)
    assert new == old


if __name__ == "__main__":
    if not GOLDEN.exists():
        _write(GOLDEN / "base", _model("BF16"))
        _adapter(GOLDEN / "adapter")
        hubdiff.push_delta(GOLDEN / "adapter", GOLDEN / "delta", base=GOLDEN / "base")
        for name in NO_PART:
            (GOLDEN / "delta" / name).unlink()
        with TemporaryDirectory() as temporary:
            (GOLDEN / "expected").write_text(_result(Path(temporary)) + "\n")
