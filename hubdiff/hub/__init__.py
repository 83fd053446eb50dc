"""The Hub: the only part of hubdiff that talks to the network.

``HubTree`` pins a ref, lists its files and reads byte ranges of them; ``HubUpload`` collects files
and makes one commit of them. Every error of ``huggingface_hub`` and of the HTTP client under it is
translated here: callers see ``HubError`` and its kin, never a foreign type. Endpoint and token are
looked up at each use, so ``HF_ENDPOINT`` and ``HF_TOKEN`` may be set at any time.
"""

from __future__ import annotations

# Not the network's: what transformers' configs raise. It lives in the Hub client's package.
from huggingface_hub.errors import StrictDataclassError as BadConfigValue

from hubdiff.hub.client import endpoint, home, repo_facts, require_token
from hubdiff.hub.datasets import benchmark_tasks
from hubdiff.hub.pointers import Pointers, create_tag, delete_tag, pointers
from hubdiff.hub.proposals import (
    TRUSTED_PUBLISHER,
    PullRequest,
    make_branch,
    messages,
    pull_requests,
    who,
)
from hubdiff.hub.search import Found, find_models
from hubdiff.hub.tree import HubTree
from hubdiff.hub.upload import Commit, HubUpload
from hubdiff.hub.watched import Seen, models_in, models_of, see

__all__ = [
    "TRUSTED_PUBLISHER",
    "BadConfigValue",
    "Commit",
    "Found",
    "HubTree",
    "HubUpload",
    "Pointers",
    "PullRequest",
    "Seen",
    "benchmark_tasks",
    "create_tag",
    "delete_tag",
    "endpoint",
    "find_models",
    "home",
    "make_branch",
    "messages",
    "models_in",
    "models_of",
    "pointers",
    "pull_requests",
    "repo_facts",
    "require_token",
    "see",
    "who",
]
