"""Datasets, as evaluations need them."""

from __future__ import annotations

from hubdiff.errors import HubdiffError
from hubdiff.hub.client import api, subject
from hubdiff.hub.translate import translated


def benchmark_tasks(name: str) -> list[str]:
    """The ids of the tasks that a dataset is registered for as a benchmark, in its ``eval.yaml``;
    none where it is not."""
    import yaml

    try:
        with translated(subject(name)):
            path = api().hf_hub_download(name, "eval.yaml", repo_type="dataset")
        with open(path, encoding="utf-8") as stream:
            document = yaml.safe_load(stream)
    except (HubdiffError, OSError, ValueError, yaml.YAMLError):
        return []
    tasks = document.get("tasks") if isinstance(document, dict) else None
    if not isinstance(tasks, list):
        return []
    found = [task.get("id") for task in tasks if isinstance(task, dict)]
    return [task for task in found if isinstance(task, str)]
