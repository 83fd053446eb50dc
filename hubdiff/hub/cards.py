"""The Hub client's own types for scores in cards. Nothing here talks to the network."""

from __future__ import annotations

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

__all__ = [
    "EvalResult",
    "EvalResultEntry",
    "eval_result_entries_to_yaml",
    "eval_results_to_model_index",
]
