from __future__ import annotations

from typing import Any

import pytest

from hubdiff.summary import Summary, percent, size_text, summarise

MANIFEST: dict[str, Any] = {
    "tuned": {
        "files": [
            {"path": "a.safetensors", "size": 1000, "source": "weights"},
            {"path": "b.safetensors", "size": 3000, "source": "weights"},
            {"path": "tokenizer.json", "size": 9999, "source": "delta"},
        ]
    },
    "tensors": [
        {
            "name": "one",
            "shape": [10, 10],
            "base_dtype": "BF16",
            "parts": [
                {"group": "delta", "encoding": "packed", "bytes": 100},
                {"group": "exact", "encoding": "plain", "bytes": 5},
            ],
            "changed": 25,
            "delta_norm": 3.0,
            "base_norm": 6.0,
        },
        {
            "name": "same",
            "shape": [100],
            "base_dtype": "BF16",
            "parts": [],
            "changed": 0,
            "delta_norm": 0.0,
            "base_norm": 8.0,
        },
        {
            "name": "added",
            "shape": [7],
            "base_dtype": None,
            "parts": [{"group": "exact", "encoding": "planes", "bytes": 300}],
            "changed": 7,
        },
    ],
    "removed": ["x", "y"],
    "layers": {"delta": [{"size": 110}], "tail": [{"size": 90}], "exact": [{"size": 400}]},
}


def test_numbers_add_up() -> None:
    summary = summarise(MANIFEST)
    assert summary == Summary(
        portable_bytes=200,
        exact_bytes=400,
        tuned_bytes=4000,
        encodings={"planes": 300, "packed": 100, "plain": 5},
        changed=1,
        unchanged=1,
        added=1,
        removed=2,
        unchanged_share=1 - 25 / 200,
        relative_norm=0.3,
    )
    assert summary.delta_bytes == 600
    assert summary.size_share == 0.15


def test_an_empty_manifest_has_no_shares() -> None:
    summary = summarise({})
    assert summary.size_share is None
    assert summary.unchanged_share is None
    assert summary.relative_norm is None
    assert summarise({"tuned": None, "layers": None, "tensors": None, "removed": None}) == summary


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (123456789, "123 MB"),
        (999_900_000, "1 GB"),
        (1.7e9, "1.7 GB"),
        (2e15, "2000 TB"),
    ],
)
def test_sizes(size: float, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.0726, "7.26 %"),
        (0.99995, "99.9950 %"),
        (1 - 1e-9, "over 99.9999 %"),
        (1e-9, "1e-07 %"),
        (1.5, "150 %"),
    ],
)
def test_percentages_are_never_rounded_to_all_or_nothing(share: float, text: str) -> None:
    assert percent(share) == text
