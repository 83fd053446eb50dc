"""The workflows and actions that are shipped, and those that `hubdiff init-ci` writes: held against
the linters that GitHub users have, and against what hubdiff promises of them."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import git
import pytest
import yaml

from hubdiff.backport.config import read_config
from hubdiff.backport.init_ci import init_ci

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github" / "actions").glob("*/action.yml"))
# Anything of these may be a stranger's text.
UNTRUSTED = re.compile(r"\$\{\{[^}]*\b(github|inputs|needs|matrix|steps|secrets|env|vars|runner)\b")
PINNED = re.compile(r"\$/\.github/actions/[a-z]+|[\w.-]+/[\w./-]+@[0-9a-f]{40}")


linter_here = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="zizmor and check-jsonschema need Python 3.11"
)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with what init-ci writes."""
    root = tmp_path_factory.mktemp("rendered")
    git.Repo.init(root).close()
    init_ci(root, commit=COMMIT)
    return root


@pytest.fixture(scope="module")
def caller(rendered: Path) -> Path:
    return rendered / ".github" / "workflows" / "hubdiff.yml"


def tool(name: str, *arguments: str, cwd: Path = ROOT) -> None:
    """A linter of the ``dev`` extra, beside the interpreter; it must find nothing."""
    bin = Path(sys.executable).parent
    assert (bin / name).is_file(), f"{name} is missing: pip install -e '.[dev]'"
    path = f"{bin}:{os.environ['PATH']}"  # actionlint calls shellcheck
    done = subprocess.run(
        [str(bin / name), *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": path, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def document(file: Path) -> dict[str, Any]:
    """As YAML 1.2 has it, where "on" is a word."""
    found: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    return found


def jobs(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = document(file)["jobs"]
    return found


def steps(file: Path) -> Iterator[dict[str, Any]]:
    found = document(file)
    if "runs" in found:
        yield from found["runs"]["steps"]
    for job in found.get("jobs", {}).values():
        yield from job.get("steps", ())


# --- linters ---


def test_actionlint_and_shellcheck_find_nothing(caller):
    tool("actionlint", "-no-color", *map(str, [*WORKFLOWS, caller]))


def test_shellcheck_finds_nothing_in_scripts_of_actions(tmp_path):
    """actionlint looks into workflows only."""
    for number, step in enumerate(step for file in ACTIONS for step in steps(file)):
        if "run" in step:
            script = tmp_path / f"{number}.sh"
            # As GitHub runs it; variables come from the step's env.
            names = " ".join([*step.get("env", {}), "RUNNER_TEMP", "GITHUB_ACTION_PATH"])
            script.write_text(f"#!/bin/bash\nset -eo pipefail\nexport {names}\n{step['run']}")
            tool("shellcheck", str(script))


@linter_here
def test_zizmor_finds_nothing(rendered):
    for folder in (ROOT / ".github", rendered / ".github"):
        tool("zizmor", "--offline", "--persona=pedantic", "--no-progress", str(folder))


@linter_here
def test_they_follow_githubs_schemas(caller):
    for schema, files in (
        ("vendor.github-workflows", [*WORKFLOWS, caller]),
        ("custom.github-workflows-require-timeout", [*WORKFLOWS, caller]),
        ("vendor.github-actions", ACTIONS),
    ):
        tool("check-jsonschema", "--builtin-schema", schema, *map(str, files))


# --- installing ---


def test_the_hubdiff_of_the_very_commit_is_installed(tmp_path):
    """With pip, from the folder that GitHub has the action in. What hubdiff depends on is borrowed;
    with a GPU no other torch is fetched either."""
    borrowed = "\n".join(path for path in sys.path if path.endswith("site-packages"))
    pth = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/borrowed.pth"
    program(tmp_path / "bin" / "nvidia-smi", "exit 0")
    program(
        tmp_path / "bin" / "python",
        f'{shlex.quote(sys.executable)} "$@" || exit',
        f'[ "$2" != venv ] || echo {shlex.quote(borrowed)} > "$3/{pth}"',
    )
    setup(tmp_path)
    (path,) = (tmp_path / "path").read_text().splitlines()
    code = "import hubdiff; from hubdiff.card import template; template('github/hubdiff.yml'); "
    done = subprocess.run(
        [f"{path}/python", "-c", f"{code}print(hubdiff.__file__)"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "hubdiff-venv"))
    assert (Path(path) / "hubdiff").is_file()


def test_without_a_gpu_torch_comes_from_the_cpu_index_first(tmp_path):
    program(
        tmp_path / "bin" / "python",
        f'echo "$@" >> {shlex.quote(str(tmp_path / "asked"))}',
        '[ "$2" != venv ] || { mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; }',
    )
    program(tmp_path / "bin" / "nvidia-smi", "exit 9")
    setup(tmp_path)
    _, torch, hubdiff = (tmp_path / "asked").read_text().splitlines()
    assert "--index-url https://download.pytorch.org/whl/cpu" in torch
    assert torch.endswith(" torch")
    assert hubdiff.endswith("/.github/actions/setup/../../..[backport]")
    assert all("constraints.txt" in line for line in (torch, hubdiff))


def program(file: Path, *lines: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    file.chmod(0o755)


def setup(folder: Path, **environment: str) -> None:
    """The script of the action that installs, with the programs in ``folder``/bin."""
    action = ROOT / ".github" / "actions" / "setup"
    (script,) = (step["run"] for step in steps(action / "action.yml") if "env" in step)
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        env={
            **os.environ,
            "EXTRAS": "backport",
            "GITHUB_ACTION_PATH": str(action),
            "GITHUB_PATH": str(folder / "path"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "RUNNER_OS": "Linux",
            "RUNNER_TEMP": str(folder),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- promises ---


@pytest.mark.parametrize("file", [*WORKFLOWS, *ACTIONS], ids=lambda f: str(f.relative_to(ROOT)))
def test_all_that_is_used_is_pinned_to_a_commit(file):
    used = [step["uses"] for step in steps(file) if "uses" in step]
    assert all(PINNED.fullmatch(one) for one in used), used


@pytest.mark.parametrize("file", [*WORKFLOWS, *ACTIONS], ids=lambda f: str(f.relative_to(ROOT)))
def test_no_text_of_a_stranger_becomes_part_of_a_script(file):
    scripts = [step["run"] for step in steps(file) if "run" in step]
    assert not [script for script in scripts if UNTRUSTED.search(script)]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.name)
def test_nothing_is_granted_but_to_a_job_and_every_job_ends(file):
    found = document(file)
    assert found["permissions"] == {}
    for job in found["jobs"].values():
        assert "timeout-minutes" in job
        assert "permissions" in job


def test_every_grant_says_what_for(caller):
    for file in (*WORKFLOWS, caller):
        for line in file.read_text().splitlines():
            if re.match(r"\s+[a-z-]+: (read|write)\b", line):
                assert " # " in line, line


BACKPORT = ROOT / ".github" / "workflows" / "backport.yml"


def test_who_may_do_what():
    granted = {name: job["permissions"] for name, job in jobs(BACKPORT).items()}
    assert granted == {
        "watch": {"contents": "read"},
        "port": {"contents": "read"},
        "publish": {"id-token": "write"},
        "record": {"contents": "write"},
        "report": {"contents": "read", "issues": "write"},
    }


def test_the_job_that_runs_tasks_has_nothing_to_write_with():
    port = jobs(BACKPORT)["port"]
    assert "write" not in port["permissions"].values()
    text = str(port)
    assert "secrets.HF_TOKEN" not in text
    assert "github.token" not in text
    runners = [
        name
        for name, job in jobs(BACKPORT).items()
        if any("hubdiff backport run" in step.get("run", "") for step in job["steps"])
    ]
    assert runners == ["port"]


def test_the_right_to_write_is_only_in_the_step_that_needs_it():
    holders = {
        (name, step["name"])
        for name, job in jobs(BACKPORT).items()
        for step in job["steps"]
        if re.search(r"secrets\.HF_TOKEN|github\.token", str(step))
    }
    assert holders == {
        ("publish", "Publish"),
        ("record", "Commit and push"),
        ("report", "Write the summary and the dashboard"),
    }
    for job in jobs(BACKPORT).values():
        assert "env" not in job
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] == "false"


def test_only_what_code_of_tasks_cannot_change_is_published():
    """Each job that takes the plan compares it with the digest that watch gave."""
    for name, job in jobs(BACKPORT).items():
        takes = [s for s in job["steps"] if s.get("uses") == "$/.github/actions/take"]
        assert len(takes) == (name != "watch")
        for step in takes:
            assert step["with"]["digest"] == "${{ needs.watch.outputs.digest }}"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_plan_that_was_replaced_is_noticed(tmp_path, replaced):
    plan = tmp_path / "hubdiff" / "plan.json"
    plan.parent.mkdir()
    plan.write_text("{}\n")
    digest = hashlib.sha256(b"{ }\n" if replaced else b"{}\n").hexdigest()
    action = ROOT / ".github" / "actions" / "take" / "action.yml"
    (script,) = (step["run"] for step in steps(action) if "DIGEST" in step.get("env", {}))
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        env={**os.environ, "DIGEST": digest, "RUNNER_TEMP": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == int(replaced)
    assert ("it was replaced" in done.stdout) == replaced


def test_one_item_does_not_stop_another_and_all_is_told():
    found = jobs(BACKPORT)
    for name in ("port", "publish"):
        assert found[name]["strategy"]["fail-fast"] == "false"
        assert "count != '0'" in found[name]["if"]
    for name in ("publish", "record", "report"):
        assert "!cancelled()" in found[name]["if"]


def test_a_dry_run_has_no_job_that_writes():
    for name, job in jobs(BACKPORT).items():
        if "write" in job["permissions"].values():
            assert "!inputs.dry-run" in job["if"], name


def test_a_secret_is_named_and_never_all_are_inherited(caller):
    for file in (*WORKFLOWS, caller):
        assert not re.search(r"secrets:\s*inherit", file.read_text())


def test_the_callers_workflow(caller):
    found = document(caller)
    assert found["permissions"] == {}
    assert found["concurrency"] == {"group": "hubdiff", "cancel-in-progress": "false"}
    assert set(found["on"]) == {"schedule", "workflow_dispatch", "repository_dispatch"}
    minute = int(found["on"]["schedule"][0]["cron"].split()[0])
    assert minute % 2 == 1
    (job,) = found["jobs"].values()
    assert job["uses"] == f"hubdiff/hubdiff/.github/workflows/backport.yml@{COMMIT}"
    # It may give no less than the jobs need, and gives no more.
    needed = {
        (name, value)
        for one in jobs(BACKPORT).values()
        for name, value in one["permissions"].items()
        if value == "write"
    }
    assert set(job["permissions"].items()) == needed
    called = document(BACKPORT)["on"]["workflow_call"]
    assert set(job["with"]) <= set(called["inputs"])
    assert set(job["secrets"]) <= set(called["secrets"])


def test_the_payload_of_an_event_only_narrows(caller):
    (job,) = jobs(caller).values()
    taken = {name for name, value in job["with"].items() if "client_payload" in value}
    assert taken == {"base"}


def test_the_configuration_that_init_ci_writes_can_be_read(rendered):
    config = read_config(rendered / "hubdiff.yaml")
    assert [family.name for family in config.families] == ["my-family"]


def test_so_can_it_with_all_that_is_commented_out(rendered, tmp_path):
    text = (rendered / "hubdiff.yaml").read_text()
    body = text.partition("\nfamilies:")[2]
    taken = re.sub(r"(?m)^( *)# (?=[a-z_]+:|- |  )", r"\1", body)
    file = tmp_path / "hubdiff.yaml"
    file.write_text(f"families:{taken}")
    (family,) = read_config(file).families
    (delta,) = family.deltas
    assert delta.gate.recovery == 0.5
    assert delta.scales == (0.6, 0.8, 1.0)
    assert family.discover.new_version
