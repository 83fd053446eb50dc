"""GitHub Actions on this machine: the rendered workflow of a user's repository, really executed by
act (github.com/nektos/act), against a loopback Hub and a stand-in for GitHub.

``Repository`` is the user's: a clone with the files that ``hubdiff init-ci`` writes, and the remote
that jobs check out from and push to, over HTTP and with their token. ``run`` is one event; what
became of each job and step is in the ``Run``. Not as at GitHub: actions/checkout, upload- and
download-artifact are ``stubs/``; ``$/`` is written out, as act does not know it; permissions and
concurrency are read by nobody; setup-python and the installation are left out (``preinstalled``).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from act.git_server import GitServer
from github_fake import TOKEN, GitHubFake

from hubdiff.backport.init_ci import HOME, WORKFLOW, init_ci

ROOT = Path(__file__).parents[2]
STUBS = Path(__file__).parent / "stubs"
NAME = "acme/models"
COMMIT = "c0ffee" * 6 + "beef"
_ACTION = re.compile(r"^\s*-?\s*uses:\s*(actions/([a-z-]+)@[0-9a-f]{40})", re.MULTILINE)
_OURS = re.compile(r"uses: \$/(\S+)")
_SECONDS = 540


def tool(name: str) -> str:
    """A program of the ``dev`` extra, which lies beside the interpreter."""
    path = Path(sys.executable).parent / name
    assert path.is_file(), f"{path} is missing: pip install -e '.[dev]'"
    return str(path)


@dataclass
class Run:
    """One event's run. ``jobs``: "watch" or "port 0123456789ab" → success or failure; what was
    skipped is not there. ``steps`` likewise, by (job, step). ``artifacts`` is their folder,
    ``summary`` what was written into the step summaries, ``output`` the log, ``pushes`` who came to
    push to the repository."""

    code: int
    output: str
    jobs: dict[str, str]
    steps: dict[tuple[str, str], str]
    artifacts: Path
    summary: str
    pushes: list[str | None]

    @property
    def plan(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.artifacts / "plan" / "plan.json").read_text())
        return found

    def failed(self) -> set[str]:
        return {job for job, result in self.jobs.items() if result != "success"}


@dataclass
class Repository:
    """``clone`` is the user's, ``remote`` what GitHub has, both on ``branch``; ``folder`` is for
    all else. ``secrets`` are the repository's; ``workflow_inputs`` are what its workflow gives the
    reusable one."""

    folder: Path
    clone: Path
    hub: str
    github: GitHubFake
    secrets: dict[str, str] = field(default_factory=dict)
    workflow_inputs: dict[str, Any] = field(default_factory=dict)
    branch: str = "main"
    runs: int = 0

    def __post_init__(self) -> None:
        self.remote.parent.mkdir(parents=True, exist_ok=True)
        git("init", "--quiet", "--bare", f"--initial-branch={self.branch}", str(self.remote))
        self.clone.mkdir(parents=True, exist_ok=True)
        git("init", "--quiet", f"--initial-branch={self.branch}", cwd=self.clone)
        # act takes the repository's name from here; nothing is fetched from it.
        git("remote", "add", "origin", f"https://github.com/{NAME}", cwd=self.clone)
        git("remote", "set-url", "--push", "origin", str(self.remote), cwd=self.clone)
        init_ci(self.clone, commit=COMMIT)
        self._write_inputs()
        self._copy_ours()
        self._write_programs()

    @property
    def remote(self) -> Path:
        return self.folder / "github" / NAME

    @property
    def ours(self) -> Path:
        """A copy of this checkout's actions, of which act can read everything."""
        return self.folder / "ours"

    def commit(self, message: str = "change") -> None:
        """All that is changed in the clone, onto the remote's branch."""
        git("add", "--all", cwd=self.clone)
        git("commit", "--quiet", "--allow-empty", f"--message={message}", cwd=self.clone)
        if self.log():
            git("pull", "--quiet", "--rebase", str(self.remote), self.branch, cwd=self.clone)
        git("push", "--quiet", "origin", f"HEAD:{self.branch}", cwd=self.clone)

    def pull(self) -> None:
        git("pull", "--quiet", "--ff-only", str(self.remote), self.branch, cwd=self.clone)

    def log(self) -> list[str]:
        """Subjects of the remote's commits, the newest first."""
        return git("log", "--format=%s", "--branches", cwd=self.remote).splitlines()

    def on_remote(self, path: str) -> str:
        """A file as the remote's branch has it."""
        return git("show", f"{self.branch}:{path}", cwd=self.remote)

    def lock(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.on_remote("hubdiff.lock"))
        return found

    def run(
        self,
        event: str = "schedule",
        *,
        inputs: Mapping[str, str] | None = None,
        payload: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """The workflow on ``event``, from what the remote's branch has. ``inputs`` are those of
        workflow_dispatch, ``payload`` is repository_dispatch's; ``environment`` is added to that of
        every step."""
        self.runs += 1
        folder = self.folder / f"run-{self.runs}"
        folder.mkdir()
        self.pull()  # a run begins with what was pushed
        event_file = folder / "event.json"
        event_file.write_text(json.dumps({"action": "hubdiff", "client_payload": payload or {}}))
        with GitServer(self.remote.parents[1], TOKEN) as server:
            steps = self._environment(folder, server, environment or {})
            done = subprocess.run(
                [
                    *(tool("act"), event, f"--directory={self.clone}", f"--workflows={WORKFLOW}"),
                    *("--json", "--no-cache-server", "--no-skip-checkout"),
                    "--platform=ubuntu-latest=-self-hosted",
                    f"--env-file={folder / 'none'}",
                    f"--secret-file={folder / 'none'}",
                    *([f"--eventpath={event_file}"] if payload is not None else []),
                    *(f"--local-repository={of}={at}" for of, at in self._actions().items()),
                    *(f"--input={name}={value}" for name, value in (inputs or {}).items()),
                    *(f"--env={name}={value}" for name, value in steps.items()),
                    *(f"--secret={name}={value}" for name, value in self._secrets().items()),
                ],
                env={**os.environ, "HOME": str(self._home()), "XDG_CACHE_HOME": str(folder)},
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
            return _read(done, folder, server.pushes)

    # --- what act is given ---

    def _home(self) -> Path:
        """Of act and of all steps: without the file, act asks which image it may use."""
        home = self.folder / "home"
        config = home / ".config" / "act" / "actrc"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.touch()
        return home

    def _secrets(self) -> dict[str, str]:
        return {"GITHUB_TOKEN": TOKEN, **self.secrets}

    def _environment(
        self, folder: Path, server: GitServer, more: Mapping[str, str]
    ) -> dict[str, str]:
        ref = f"refs/heads/{self.branch}"
        own = self.github.environment(
            repository=NAME, ref=ref, workflow_ref=f"{NAME}/{WORKFLOW}@{ref}"
        )
        del own["GITHUB_TOKEN"]  # a job has it only where the workflow hands it on
        return {
            **own,
            "ACT_ARTIFACTS": str(folder / "artifacts"),
            "ACT_REMOTE": f"{server.url}/{NAME}",
            "ACT_STUBS": str(STUBS),
            "GITHUB_SERVER_URL": server.url,
            "HF_ENDPOINT": self.hub,
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HOME": str(self._home()),
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",  # a step has a terminal here, which it has not at GitHub
            "TERM": "dumb",
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            **more,
        }

    def _actions(self) -> dict[str, str]:
        """Every action that is used, with the folder that it is here."""
        files = [*(self.ours / ".github").rglob("*.yml")]
        used = {found for file in files for found in _ACTION.findall(file.read_text())}
        return {f"{HOME}@{COMMIT}": str(self.ours)} | {
            action: str(STUBS / name) for action, name in used
        }

    def _copy_ours(self) -> None:
        shutil.copytree(ROOT / ".github", self.ours / ".github")
        for file in (self.ours / ".github").rglob("*.yml"):
            written_out = _OURS.sub(rf"uses: {HOME}/\1@{COMMIT}", file.read_text())
            file.write_text(written_out)

    def _write_inputs(self) -> None:
        """What a user would write into the workflow that init-ci made."""
        file = self.clone / WORKFLOW
        inputs = {"preinstalled": True, **self.workflow_inputs}
        lines = "".join(f"      {name}: {json.dumps(value)}\n" for name, value in inputs.items())
        text = file.read_text().replace("    with:\n", f"    with:\n{lines}")
        file.write_text(text.replace("# HF_TOKEN: $", "HF_TOKEN: $"))

    def _write_programs(self) -> None:
        """hubdiff of this checkout, first on the PATH."""
        program = self.folder / "bin" / "hubdiff"
        program.parent.mkdir()
        program.write_text(
            "#!/bin/sh\n"
            f"export PYTHONPATH={shlex.quote(str(ROOT))}\n"
            f'exec {shlex.quote(sys.executable)} -m hubdiff "$@"\n'
        )
        program.chmod(0o755)


def _read(done: subprocess.CompletedProcess[str], folder: Path, pushes: list[str | None]) -> Run:
    jobs: dict[str, str] = {}
    steps: dict[tuple[str, str], str] = {}
    said, summary = [], ""
    for line in done.stdout.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            said.append(line)
            continue
        job = " ".join([str(entry.get("jobID", "")), *map(str, entry.get("matrix", {}).values())])
        said.append(f"[{job}] {str(entry.get('msg', '')).rstrip()}")
        if entry.get("command") == "summary":
            summary += entry["content"]
        if "stepResult" in entry and entry.get("stage") == "Main":
            steps[job, str(entry.get("step"))] = entry["stepResult"]
        if "jobResult" in entry:
            # act says of every job of a matrix what is so of all of them together.
            own = {result for (name, _), result in steps.items() if name == job}
            jobs[job] = "failure" if "failure" in own else "success"
    output = "\n".join([*said, done.stderr])
    (folder / "output.txt").write_text(output)
    return Run(done.returncode, output, jobs, steps, folder / "artifacts", summary, pushes)


def git(*words: str, cwd: Path | None = None) -> str:
    """Git's output. Nothing of the user's own settings is read."""
    identity = {f"GIT_{who}_NAME": "Someone" for who in ("AUTHOR", "COMMITTER")}
    identity |= {f"GIT_{who}_EMAIL": "someone@example.org" for who in ("AUTHOR", "COMMITTER")}
    done = subprocess.run(
        ["git", *words],
        cwd=cwd,
        env={**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
