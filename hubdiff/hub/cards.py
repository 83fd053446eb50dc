"""The Hub client's own types for scores in cards. Nothing here talks to the network."""

from __future__ import annotations

from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

__all__ = [
    "EvalResult",
    "EvalResultEntry",
    "ModelCard",
    "ModelCardData",
    "eval_result_entries_to_yaml",
]
