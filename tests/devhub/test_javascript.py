"""The official JavaScript client as a second judge: ``js/judge.mjs`` does the asserting.

Needs node and npm, and the npm registry the first time; skipped, with the reason, without them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubdiff.devhub import DevHub

SOURCE = Path(__file__).parent / "js"


@pytest.fixture(scope="session")
def judge(request: pytest.FixtureRequest) -> Path:
    """The script beside an installed ``@huggingface/hub``, kept in pytest's cache folder."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("devhub-js")
    for name in ("package.json", "judge.mjs"):
        shutil.copy(SOURCE / name, folder / name)
    wanted = json.loads((SOURCE / "package.json").read_text())["dependencies"]["@huggingface/hub"]
    if _installed_version(folder) != wanted:
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"npm could not install @huggingface/hub: {done.stderr.strip()[-300:]}")
    return folder / "judge.mjs"


def _installed_version(folder: Path) -> str | None:
    package = folder / "node_modules" / "@huggingface" / "hub" / "package.json"
    return json.loads(package.read_text())["version"] if package.exists() else None


@pytest.mark.parametrize("transport", ["xet", "lfs"])
def test_the_javascript_client_works_against_it(
    hub: DevHub, alice: HfApi, judge: Path, transport: str
) -> None:
    repo = f"alice/js-{transport}"
    done = subprocess.run(
        ["node", judge.name, hub.url, hub.token("alice"), repo, transport],
        cwd=judge.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    (info,) = alice.get_paths_info(repo, "deep/er/model.safetensors", revision=said["commit"])
    assert info.lfs is not None
    assert info.lfs.sha256 == said["sha256"]
    assert (hub.log.count(kind="xet", repo=repo, method="POST") > 0) == (transport == "xet")
