"""Several processes, started by the real torchrun, write the bytes of one; and when one of them
fails, dies or differs, nothing is published and all of them say so.

Starting torch in four processes takes seconds: one torchrun runs several command lines, whose
output each rank writes into files.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st
from models import hashes
from on_hub import listing

from hubdiff.cli import run
from hubdiff.devhub import DevHub
from hubdiff.errors import OutputExists
from hubdiff.hub import HubTree, HubUpload, upload
from hubdiff.jobs import merging
from hubdiff.jobs.push import push_delta
from hubdiff.jobs.together import open_alike
from hubdiff.ranks import Ranks, launched
from hubdiff.refs import ModelRef
from hubdiff.writer.folder import FolderShare, FolderSink

PutRepo = Callable[..., str]
NewName = Callable[[], str]

# Runs command lines one after the other. A line is for all ranks, or "LINE" of a step is overridden
# for one rank; "code" is run before, in that rank, as what goes wrong there.
SCRIPT = """
import json, os, sys
from hubdiff.cli import run

rank = os.environ["RANK"]
keep = os.dup(1), os.dup(2)
for step in json.loads(sys.argv[1]):
    os.chdir(step["folder"])
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{step['said']}.{name}.{rank}", os.O_WRONLY | os.O_CREAT), fd)
    exec(step["code"].get(rank, ""))
    code = run(step["lines"].get(rank, step["lines"]["all"]))
    sys.stdout.flush(), sys.stderr.flush()
    print(code, file=open(f"{step['said']}.code.{rank}", "w"))
for fd, kept in zip((1, 2), keep):
    os.dup2(kept, fd)
"""


@dataclass
class Step:
    """A command line in a folder. ``lines`` and ``code`` are for single ranks."""

    folder: Path
    line: Sequence[str]
    lines: dict[str, Sequence[str]] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Said:
    """What each rank said and its exit code; ``whole`` is torchrun's."""

    out: list[str]
    err: list[str]
    codes: list[int | None]
    whole: int

    @property
    def failures(self) -> list[str]:
        return [line for text in self.err for line in text.splitlines() if "error: " in line]


def torchrun(
    count: int, steps: Sequence[Step], *, machines: int = 1, **environment: str
) -> list[Said]:
    """Run the steps with ``count`` ranks: one torchrun, or as many as there were machines."""
    said = steps[0].folder / ".said"
    said.mkdir(parents=True, exist_ok=True)
    described = [
        {
            "folder": str(step.folder),
            "said": str(said / f"{os.getpid()}-{number}"),
            "lines": {"all": list(step.line), **step.lines},
            "code": step.code,
        }
        for number, step in enumerate(steps)
    ]
    script = said / "script.py"
    script.write_text(SCRIPT)
    for file in said.glob("*-*"):
        file.unlink()
    where = ["--standalone"] if machines == 1 else _meeting_place(machines)
    command = ["-m", "torch.distributed.run", *where, f"--nproc-per-node={count // machines}"]
    agents = [
        subprocess.Popen(
            [sys.executable, *command, str(script), json.dumps(described)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(machines)
    ]
    return [_said(step["said"], count, _ended(agents)) for step in described]


def _ended(agents: list[subprocess.Popen[bytes]]) -> int:
    """The exit code of a torchrun that failed, or 0. When one failed, the others may wait for it
    for minutes, long after their ranks have ended."""
    until = time.monotonic() + 120
    while any(agent.poll() is None for agent in agents) and time.monotonic() < until:
        if any(agent.poll() for agent in agents):
            until = min(until, time.monotonic() + 20)
        time.sleep(0.1)
    for agent in agents:
        if agent.poll() is None:
            agent.kill()
    return max(abs(agent.wait()) for agent in agents)


def _meeting_place(machines: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"--rdzv-endpoint=127.0.0.1:{port}"
    return [f"--nnodes={machines}", "--rdzv-backend=c10d", "--rdzv-id=test", endpoint]


def _said(prefix: str, count: int, whole: int) -> Said:
    def read(kind: str, rank: int) -> str:
        file = Path(f"{prefix}.{kind}.{rank}")
        return file.read_text() if file.exists() else ""

    codes = [read("code", rank).strip() for rank in range(count)]
    return Said(
        [read("out", rank) for rank in range(count)],
        [read("err", rank) for rank in range(count)],
        [int(code) if code else None for code in codes],
        whole,
    )


def alone(folder: Path, *line: str) -> None:
    """The same command line in one process: this one."""
    folder.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run(line) == 0
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several files that are cut differently, and a delta."""
    folder = tmp_path_factory.mktemp("ranks")
    before = models.weights()
    after = models.moved(before)
    after["model.layers.0.mlp.up_proj.weight"][0, :4] = torch.tensor([0.0, -0.0, torch.nan, 1.0])
    after["model.extra"] = torch.arange(7).to(torch.bfloat16)
    models.save(folder / "base", before, shards=3)
    models.save(folder / "tuned", after, shards=5, files={"README.md": "# tuned\n"})
    models.save(folder / "other", models.moved(before, 1e-3, 7, frozen="nothing"), shards=4)
    models.save(folder / "one", models.moved(before, 1e-3, 8, frozen="nothing"))
    # All that the probes see is the base's.
    sibling = {name: tensor.clone() for name, tensor in before.items()}
    sibling["model.layers.1.mlp.up_proj.weight"][-1] += 1
    models.save(folder / "sibling", sibling, shards=3)
    push_delta(folder / "tuned", folder / "delta", base=folder / "base")
    return folder


PUSH = ("push-delta", "../tuned", "./delta", "--base", "../base")
REBUILD = ("apply", "../delta", "--to", "../base", "--output", "rebuilt")
TRANSFER = ("apply", "../delta", "--to", "../other", "--output", "moved", "--json")


def apply_to(target: str, output: str) -> tuple[str, ...]:
    return ("apply", "../delta", "--to", f"../{target}", "--output", output)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".said")


# --- the same bytes ---


@pytest.mark.usefixtures("pictures")
def test_four_ranks_write_the_bytes_of_one_process(world: Path) -> None:
    lines = [PUSH, REBUILD, TRANSFER, apply_to("sibling", "sibling"), apply_to("one", "one")]
    for line in lines:
        alone(world / "by-one", *line)
    folder = world / "by-four"
    folder.mkdir()
    said = torchrun(4, [Step(folder, line) for line in (*lines, ("inspect", "../delta"))])
    assert [step.codes for step in said[:5]] == [[0] * 4] * 5

    # Every byte of every file: manifest, card, picture and record too.
    right = {k: v for k, v in hashes(world / "by-one").items() if not k.startswith(".")}
    assert {k: v for k, v in hashes(folder).items() if not k.startswith(".")} == right
    tuned, rebuilt = hashes(world / "tuned"), hashes(folder / "rebuilt")
    assert {name: rebuilt[name] for name in tuned} == tuned
    assert leftovers(folder) == []

    # Rank 0 speaks, and only it.
    assert json.loads(said[2].out[0])["files"]
    assert all(not step.out[rank] and not step.err[rank] for step in said[:5] for rank in (1, 2, 3))
    assert "merging, rank 0 of 4" in said[1].err[0]
    assert "1 of the 4 ranks have work" in said[4].err[0]
    assert "ranks have work" not in said[2].err[0]

    # What is not shared is not done four times.
    assert said[5].codes == [2] * 4
    assert "runs in one" in said[5].err[0]
    assert not any(said[5].err[1:] + said[5].out)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_ranks_make_one_commit_of_the_same_bytes(
    devhub: DevHub, world: Path, tmp_path: Path, xet: bool
) -> None:
    hub = HfApi(endpoint=devhub.url, token=devhub.token())
    other = f"org/other-{xet}"
    hub.create_repo(other)
    hub.upload_folder(repo_id=other, folder_path=world / "other")
    delta, result, part = (f"org/{name}-{xet}" for name in ("delta", "result", "part"))
    # The last leaves files of the target as they are: the Hub copies them by itself.
    lines = [
        ("push-delta", str(world / "tuned"), delta, "--base", str(world / "base")),
        ("apply", delta, "--to", other, "--push-to", result),
        ("apply", delta, "--to", other, "--push-to", part, "--include", "*embed*"),
    ]
    for line in lines:
        alone(tmp_path, *line)
    right = [listing(devhub, repo) for repo in (delta, result, part)]
    for repo in (result, part):
        hub.delete_repo(repo)
    # Two commits to one delta would be told apart by the record of what was put on what.
    same = hub.model_info(delta).sha
    devhub.log.clear()
    said = torchrun(2, [Step(tmp_path, line) for line in lines], **devhub.environment(xet=xet))
    assert [step.codes for step in said] == [[0, 0]] * 3, [step.err for step in said]
    assert [listing(devhub, repo) for repo in (delta, result, part)] == right
    assert hub.model_info(delta).sha == same
    for repo in (result, part):
        assert devhub.log.count(kind="commit", repo=repo) == 1
    assert devhub.log.count(kind="xet" if xet else "lfs") > 0
    assert devhub.log.count(kind="lfs" if xet else "xet") == 0
    assert devhub.log.count(kind="copy", repo=other) > 0


# --- one fails ---

ELSEWHERE = (
    "from hubdiff.writer import folder; folder.VISIBLE_SECONDS = 0.5; os.chdir(os.path.pardir)"
)
SILENT = """
from hubdiff import merge, ranks
ranks.LOST_SECONDS = 2.0
if rank == "1":
    import time
    beat, work = ranks._Watch._beat, merge._weights
    def cut_off(*args):
        ranks._Watch._beat = lambda *args: None
        time.sleep(4)
        return work(*args)
    merge._weights = cut_off
"""
HURRIED = "from hubdiff import ranks; ranks.LOST_SECONDS = 2.0"
RESTORED = """
from hubdiff import merge, ranks
ranks.LOST_SECONDS = 30.0
if rank == "1":
    ranks._Watch._beat, merge._weights = beat, work
"""


def test_what_one_rank_finds_ends_all_and_is_said_once(world: Path) -> None:
    folder = world / "failing"
    folder.mkdir()
    damaged = world / "damaged"
    models_of = {path.name: path.read_bytes() for path in (world / "delta").glob("*.safetensors")}
    subprocess.run(["cp", "-r", world / "delta", damaged], check=True)
    name = sorted(n for n in models_of if n.startswith("delta-"))[2]
    (damaged / name).write_bytes(models_of[name][:-9] + b"x" + models_of[name][-8:])

    plan = (*apply_to("other", "out"), "--json")
    here, there = (str(world / name) for name in ("delta", "other"))
    unseen = ("apply", here, "--to", there, "--output", "unseen")
    push = ("push-delta", str(world / "tuned"), "./unseen", "--base", str(world / "base"))
    bad = ("apply", "../damaged", "--to", "../other", "--output", "damage")
    steps = [
        Step(folder, plan, lines={"1": (*plan, "--scale", "0.5")}),
        Step(folder, unseen, code={"1": ELSEWHERE}),
        Step(folder, push, code={"1": ELSEWHERE}),
        Step(folder, apply_to("other", "silent"), code={"0": SILENT, "1": SILENT}),
        Step(folder, bad, code={"0": RESTORED, "1": RESTORED}),
        Step(folder, ("apply", "../delta", "--output", "out")),
    ]
    differ, unshared, push_unshared, silent, damage, usage = said = torchrun(2, steps)
    assert [p.name for p in folder.iterdir() if not p.name.startswith(".")] == []
    # Where nothing was written nothing is left; the others may go on where they were.
    assert leftovers(folder) == [".damage.hubdiff-partial", ".silent.hubdiff-partial"]
    assert [step.codes for step in said] == [[1, 1]] * 5 + [[2, 2]]

    assert sum("the plan of rank 1 is not that of rank 0" in text for text in differ.failures) == 1
    assert sum("failed (while comparing the plan)" in text for text in differ.failures) == 1
    answer = json.loads(differ.out[0])["error"]
    assert answer["type"] in ("RankLost", "HubdiffError")
    assert "the plan of rank 1" in answer["message"] or answer["cause"]["rank"] == 1

    for step in (unshared, push_unshared):
        assert "rank 1: error: rank 1 on" in step.err[1]
        assert "not the same for all ranks" in step.err[1]
        assert "--push-to REPO" in step.err[1]
        assert "rank 0: error: rank 1 failed (while opening the place" in step.err[0]

    assert "rank 1 has not been heard of for 2 s" in silent.err[0]
    assert "nothing was published" in silent.err[0]
    assert "Run the same command again" in silent.err[0]
    assert "rank 0 stopped (while merging); nothing was published" in silent.err[1]

    # The rank with that file says what it found, the other only that it did.
    found = [text for text in damage.failures if "failed (while merging)" not in text]
    assert len(found) == 1
    assert len(damage.failures) == 2
    assert "hash" in found[0] or "decode" in found[0] or "frame" in found[0], found

    assert "Missing option '--to'" in usage.err[0]
    assert not usage.err[1]


KILLED = """
import pathlib, signal, time
from hubdiff import extract, merge
def others_finished():
    journal = pathlib.Path(".rebuilt.hubdiff-partial/.hubdiff-journal.jsonl")
    return not journal.exists() or '"path"' in journal.read_text()
def dies(work):
    calls = []
    def call(*args):
        calls.append(args)
        if len(calls) == 2:
            until = time.monotonic() + 60
            while not others_finished() and time.monotonic() < until:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*args)
    return call
merge._weights, extract._compare = dies(merge._weights), dies(extract._compare)
"""


def test_a_killed_rank_ends_all_and_another_number_of_ranks_resumes(world: Path) -> None:
    folder = world / "killed"
    folder.mkdir()
    (said,) = torchrun(2, [Step(folder, REBUILD, code={"1": KILLED})])
    assert said.whole != 0
    assert said.codes[1] is None
    assert said.codes[0] == 1
    assert "rank 0: error: " in said.err[0]
    assert "nothing was published" in said.err[0]
    assert "Run the same command again" in said.err[0]
    assert not (folder / "rebuilt").exists()

    partial = folder / ".rebuilt.hubdiff-partial"
    finished = {}
    for journal in partial.glob(".hubdiff-journal*"):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        names = [record["path"] for record in records if "path" in record]
        finished[journal.name] = {name: (partial / name).stat().st_ino for name in names}
    assert len(finished) == 2
    assert all(finished.values())
    alone(folder, *REBUILD)
    tuned, rebuilt = hashes(world / "tuned"), hashes(folder / "rebuilt")
    assert {name: rebuilt[name] for name in tuned} == tuned
    assert set(rebuilt) == {*tuned, "hubdiff-result.json"}
    for files in finished.values():
        for name, inode in files.items():
            assert (folder / "rebuilt" / name).stat().st_ino == inode, f"{name} was made again"
    assert leftovers(folder) == []


def test_a_rank_killed_on_another_machine_makes_no_commit(
    devhub: DevHub, world: Path, tmp_path: Path
) -> None:
    """Two torchruns, as on two machines: only hubdiff itself tells the one of the other."""
    repo = "org/killed-delta"
    line = ("push-delta", str(world / "tuned"), repo, "--base", str(world / "base"))
    environment = devhub.environment("demo")
    step = Step(tmp_path, line, code={"0": HURRIED, "1": KILLED.replace("== 2", "== 1")})
    (said,) = torchrun(2, [step], machines=2, **environment)
    assert said.whole != 0
    assert said.codes == [1, None]
    assert "rank 1 has not been heard of" in said.err[0] or "torchrun" in said.err[0]
    assert "nothing was published" in said.err[0]
    assert listing(devhub, repo) == {}
    # The same command again.
    (said,) = torchrun(2, [Step(tmp_path, line)], **environment)
    assert said.codes == [0, 0]
    layers = {k: v for k, v in hashes(world / "delta").items() if k.endswith(".safetensors")}
    found = listing(devhub, repo)
    assert layers
    assert {name: found[name] for name in layers} == layers


# --- the pieces ---


@given(st.lists(st.integers(0, 10**12), max_size=60), st.integers(1, 9))
def test_shares_are_a_fair_split_without_a_word(sizes: list[int], count: int) -> None:
    items = list(enumerate(sizes))
    shares = [_rank(k, count).share(items, lambda item: item[1]) for k in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    loads = [sum(size for _, size in share) for share in shares]
    assert max(loads) <= sum(sizes) / count + max(sizes, default=0)


def _rank(rank: int, size: int, said: Any = None) -> Ranks:
    """A rank of its own: what rank 0 broadcasts is given."""
    ranks = Ranks()
    ranks.rank, ranks.size, ranks.local = rank, size, rank  # type: ignore[misc]
    if said is not None:
        ranks.broadcast = lambda value, what: said  # type: ignore[method-assign]
    return ranks


def test_a_branch_that_moves_can_not_part_the_ranks(put_repo: PutRepo) -> None:
    repo = put_repo({"config.json": b"1"})
    sent: list[Any] = []
    first = _rank(0, 2)
    first.broadcast = lambda value, what: sent.append(value) or value  # type: ignore[method-assign]
    (tree,) = open_alike(first, [ModelRef.parse(repo)], cache=False)
    put_repo({"config.json": b"2"}, repo)
    said = json.loads(json.dumps(sent[0]))
    (other,) = open_alike(_rank(1, 2, said), [ModelRef.parse(repo)], cache=False)
    assert tree is not None
    assert other is not None
    assert other.pin.commit == tree.pin.commit
    assert other.read_bytes("config.json") == b"1"


def test_only_torchrun_makes_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters set these variables in every container, also where one command runs alone."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert launched() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launched() == 8


def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPUs are not here: what is tested is which of them is asked for."""
    monkeypatch.setattr(merging, "_cuda_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    chosen = [str(merging.choose_device("auto", _rank(k, 8))) for k in range(8)]
    assert chosen == [f"cuda:{k % 4}" for k in range(8)]
    assert str(merging.choose_device("cuda", _rank(2, 4))) == "cuda:2"
    assert str(merging.choose_device("cuda:1", _rank(2, 4))) == "cuda:1"
    assert str(merging.choose_device("cpu", _rank(2, 4))) == "cpu"


def test_a_rank_that_outlives_rank_0_keeps_the_next_run_out(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = FolderSink(output, "a run")
    share = FolderShare(output, 1, first.invite())
    for name in ("a run", "another"):
        with pytest.raises(OutputExists, match="another run is writing"):
            FolderSink(output, name)
    share.put("model.safetensors", b"of rank 1")
    share.close()
    assert FolderSink(output, "a run").done("model.safetensors")
    assert FolderSink(output, "another").done("model.safetensors") is None


def test_a_deposit_is_committed_without_being_sent_again(
    devhub: DevHub,
    put_repo: PutRepo,
    new_name: NewName,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upload, "IN_MEMORY", 1000)
    weights, source = os.urandom(200_000), put_repo({"copied.safetensors": b"weights"})
    local = tmp_path / "stored.safetensors"
    local.write_bytes(weights)
    repo = new_name()
    first = HubUpload(repo)
    other = HubUpload(repo, parent=first.parent)
    other.add("stored.safetensors", local)
    local.unlink()
    other.add_bytes("small.json", b"{}")
    other.copy("copied.safetensors", HubTree(ModelRef.parse(source)).pin, "copied.safetensors")
    deposit = json.loads(json.dumps(other.deposit()))
    assert len(json.dumps(deposit)) < 1000
    first.add_bytes("README.md", b"# all of it\n")
    devhub.log.clear()
    first.accept(deposit)
    first.commit("All")
    assert devhub.log.count(kind="xet") + devhub.log.count(kind="lfs") == 0
    tree = HubTree(ModelRef.parse(repo))
    assert {path: tree.read_bytes(path) for path in tree.files() if path != ".gitattributes"} == {
        "stored.safetensors": weights,
        "small.json": b"{}",
        "copied.safetensors": b"weights",
        "README.md": b"# all of it\n",
    }
