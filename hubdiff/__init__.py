"""hubdiff: publish what a fine-tune changed, and put it on any base of the family.

    import hubdiff

    hubdiff.push_delta("org/tuned", "org/tuned-delta", base="org/base")
    hubdiff.apply("org/tuned-delta", "org/new-base", output="new-tuned")
    model = hubdiff.load("org/tuned-delta", "org/new-base")

Everything here is imported at first use: ``import hubdiff`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hubdiff._version import __version__
from hubdiff.errors import HubdiffError

if TYPE_CHECKING:
    from hubdiff.delta import open_delta
    from hubdiff.jobs.apply import apply
    from hubdiff.jobs.check import check
    from hubdiff.jobs.compare import compare
    from hubdiff.jobs.connectivity import connectivity
    from hubdiff.jobs.diff import diff
    from hubdiff.jobs.evaluate import evaluate
    from hubdiff.jobs.export import export
    from hubdiff.jobs.finetune import finetune
    from hubdiff.jobs.inspect import inspect
    from hubdiff.jobs.lineage import lineage
    from hubdiff.jobs.load import load
    from hubdiff.jobs.pointers import alias, tag
    from hubdiff.jobs.push import push_delta
    from hubdiff.jobs.recycle import recycle
    from hubdiff.jobs.registry import list_deltas, search
    from hubdiff.jobs.sign import sign
    from hubdiff.jobs.tune_scale import tune_scale
    from hubdiff.jobs.unpack import unpack
    from hubdiff.jobs.verify import verify

__all__ = [
    "HubdiffError",
    "__version__",
    "alias",
    "apply",
    "check",
    "compare",
    "connectivity",
    "diff",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "lineage",
    "list_deltas",
    "load",
    "open_delta",
    "push_delta",
    "recycle",
    "search",
    "sign",
    "tag",
    "tune_scale",
    "unpack",
    "verify",
]

_HOMES = {
    "alias": "hubdiff.jobs.pointers",
    "apply": "hubdiff.jobs.apply",
    "check": "hubdiff.jobs.check",
    "compare": "hubdiff.jobs.compare",
    "connectivity": "hubdiff.jobs.connectivity",
    "diff": "hubdiff.jobs.diff",
    "export": "hubdiff.jobs.export",
    "evaluate": "hubdiff.jobs.evaluate",
    "finetune": "hubdiff.jobs.finetune",
    "inspect": "hubdiff.jobs.inspect",
    "lineage": "hubdiff.jobs.lineage",
    "list_deltas": "hubdiff.jobs.registry",
    "load": "hubdiff.jobs.load",
    "open_delta": "hubdiff.delta",
    "push_delta": "hubdiff.jobs.push",
    "recycle": "hubdiff.jobs.recycle",
    "search": "hubdiff.jobs.registry",
    "sign": "hubdiff.jobs.sign",
    "tag": "hubdiff.jobs.pointers",
    "tune_scale": "hubdiff.jobs.tune_scale",
    "unpack": "hubdiff.jobs.unpack",
    "verify": "hubdiff.jobs.verify",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'hubdiff' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
