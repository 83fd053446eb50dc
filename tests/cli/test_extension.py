"""``hf hubdiff …``: the real ``hf`` runs the script that its extension registry names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import hubdiff

SCRIPT = Path(sysconfig.get_path("scripts"), "hf-hubdiff")


def test_hf_runs_hubdiff_as_an_extension(tmp_path: Path) -> None:
    """The registry entry is written as ``hf extensions install OWNER/hf-hubdiff`` would, but points
    at the script of this installation: there is no GitHub here to install from."""
    entry = {
        "owner": "owner",
        "repo": "hf-hubdiff",
        "repo_id": "owner/hf-hubdiff",
        "short_name": "hubdiff",
        "executable_path": str(SCRIPT),
        "type": "python",
        "installed_at": "2026-01-01T00:00:00+00:00",
    }
    folder = tmp_path / ".local/share/hf/extensions/hf-hubdiff"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(entry))
    done = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", "hubdiff", "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"hubdiff {hubdiff.__version__}"
