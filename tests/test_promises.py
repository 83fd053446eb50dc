"""The promises hubdiff makes, each the name of a test. Everything goes through the public jobs,
most of it over HTTP with the Hub's own client, and is judged by what the Hub lists or by arithmetic
done another way."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import numpy as np
import on_hub
import pytest
import rounding
import torch
from blake3 import blake3
from on_hub import Family, NewName, PutRepo, contents, ids, listing
from safetensors import safe_open

from hubdiff.devhub import DevHub
from hubdiff.errors import (
    BadManifest,
    CheckpointError,
    CorruptPayload,
    IntegrityError,
)
from hubdiff.hub import HubTree, retry
from hubdiff.jobs.apply import apply
from hubdiff.jobs.push import push_delta
from hubdiff.progress import Silent
from hubdiff.refs import ModelRef

RECORD = "hubdiff-result.json"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.001)


# --- 1. every bit ---


def test_own_base_restores_every_bit(
    devhub: DevHub, put_repo: PutRepo, new_name: NewName, tmp_path: Path, dtype: torch.dtype
) -> None:
    base, tuned = strange_pair(tmp_path, dtype)
    base_repo, tuned_repo = put_repo(contents(base)), put_repo(contents(tuned))
    expected = listing(devhub, tuned_repo)
    assert len(expected) == len(contents(tuned))

    # From folder to folder.
    push_delta(tuned, tmp_path / "delta", base=base)
    applied = apply(tmp_path / "delta", base, output=tmp_path / "rebuilt")
    assert applied.plan["case"] == "own base"
    assert ids(tmp_path / "rebuilt", expected) == expected

    # All of it on the Hub.
    delta_repo, result_repo = new_name(), new_name()
    push_delta(tuned_repo, delta_repo, base=base_repo)
    assert apply(delta_repo, base_repo, push_to=result_repo).plan["case"] == "own base"
    assert listing(devhub, result_repo) == expected

    # From the Hub to a folder, over a stream that breaks off again and again.
    devhub.faults.add("short", "cdn-files", times=5, after_bytes=10_000)
    apply(delta_repo, base_repo, output=tmp_path / "fetched")
    assert ids(tmp_path / "fetched", expected) == expected
    assert set(contents(tmp_path / "fetched")) == {*expected, RECORD}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def strange_pair(folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """A base in one file and its fine-tune in three, with all that is hard to restore: specials,
    tensors that are not floats, empty, of one element, new, gone, and other dtypes."""
    base = models.weights(0, dtype)
    tuned = models.moved(base)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, -1e-7, 3e4])
    pairs = torch.cartesian_prod(special, special).to(dtype)
    base["model.special"], tuned["model.special"] = pairs[:, 0].clone(), pairs[:, 1].clone()
    base["model.patterns"], tuned["model.patterns"] = any_bits(dtype, 1), any_bits(dtype, 2)
    base["model.wide"] = torch.linspace(-1, 1, 50, dtype=torch.float64)
    tuned["model.wide"] = base["model.wide"] * (1 + 1e-12)
    base["model.count"], tuned["model.count"] = torch.arange(9), torch.arange(9) * 3
    base["model.mask"], tuned["model.mask"] = torch.ones(7).bool(), torch.zeros(7).bool()
    base["model.empty"] = tuned["model.empty"] = torch.zeros(0, 4, dtype=dtype)
    base["model.one"] = torch.tensor(1.0, dtype=dtype)
    tuned["model.one"] = torch.tensor(2.0, dtype=dtype)
    base["model.gone"] = torch.ones(3, dtype=dtype)
    tuned["model.new"] = torch.arange(5).to(dtype)
    models.save(folder / "base", base, files={"README.md": on_hub.card(license="mit")})
    readme = on_hub.card("# Tuned", license="mit")
    files = {"README.md": readme, "chat_template.jinja": "{{ x }}", "notes.txt": "é\r\n"}
    models.save(folder / "tuned", tuned, shards=3, files=files, tuned_on="sums")
    return folder / "base", folder / "tuned"


def any_bits(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every kind of float there is, quiet and signalling NaNs with payloads among them."""
    raw = np.random.default_rng(seed).integers(0, 256, 4 * 1000, np.uint8)
    return torch.from_numpy(raw).view(dtype)


# --- 2. target + Δ, rounded once ---

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
@pytest.mark.parametrize(
    ("of", "onto"),
    [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (BF16, FP16), (FP16, BF16)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_result_is_target_plus_exact_delta_rounded_once(
    tmp_path: Path, of: torch.dtype, onto: torch.dtype, plain: bool
) -> None:
    base, tuned, target = three_models(of, onto)
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "tuned", tuned)
    models.save(tmp_path / "target", target)
    push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base", plain=plain)

    applied = apply(tmp_path / "delta", tmp_path / "target", output=tmp_path / "result", force=True)
    assert applied.plan["case"] == "transfer"
    result = load(tmp_path / "result")
    for name, given in target.items():
        expected = rounded_sum(name, given, tuned[name], base[name], 1, onto)
        found = rounding.patterns(result[name])
        # Where the sum is nothing, either zero will do.
        same = (found == expected) | ((result[name].reshape(-1) == 0).numpy() & (expected == 0))
        assert same.all(), f"{name}: {np.flatnonzero(~same)[:5]}"

    for scale in (0.7, -1.0, 0.0):
        output = tmp_path / f"scaled {scale}"
        apply(tmp_path / "delta", tmp_path / "target", output=output, scale=scale, force=True)
        result = load(output)
        for name, given in target.items():
            expected = rounded_sum(name, given, tuned[name], base[name], scale, onto)
            apart = rounding.ulps_apart(rounding.patterns(result[name]), expected, onto)
            assert apart.max() <= 1, (name, scale)


def three_models(
    of: torch.dtype, onto: torch.dtype
) -> tuple[on_hub.Tensors, on_hub.Tensors, on_hub.Tensors]:
    """Base, tuned and target of usual weights, and one tensor each of every exponent there is."""
    base = models.weights(0, of)
    tuned = models.moved(base, frozen="nothing")
    target = models.moved(models.weights(0, onto), step=1e-3, seed=5, frozen="nothing")
    for seed, (side, dtype) in enumerate(((base, of), (tuned, of), (target, onto))):
        drawn = any_bits(dtype, seed)[:800]
        side["model.wild"] = torch.where(torch.isfinite(drawn), drawn, 0.5)
    return base, tuned, target


def rounded_sum(
    name: str,
    target: torch.Tensor,
    tuned: torch.Tensor,
    base: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> np.ndarray:
    """round(target + scale·(tuned − base)) from the three models alone."""
    factor = float(np.float32(scale))
    if name == "model.wild":
        terms = zip(*map(rounding.fractions, (target, tuned, base)), strict=True)
        scaled = rounding.Fraction(factor)
        sums = [t + scaled * (x - y) for t, x, y in terms]
        return np.array([rounding.round_exact(value, dtype) for value in sums], np.uint64)
    assert rounding.exact_in_float64(target, tuned, base)
    t, x, y = (tensor.double().numpy().reshape(-1) for tensor in (target, tuned, base))
    return rounding.round_float64(t + factor * (x - y), dtype)


def load(folder: Path) -> on_hub.Tensors:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


# --- 3. planned bytes only ---


@pytest.fixture
def family(put_repo: PutRepo, tmp_path: Path) -> Family:
    """A tune that changed one layer's attention, and a target in three shards."""
    return on_hub.family(put_repo, tmp_path, only="layers.1.self_attn")


@pytest.fixture
def delta_repo(devhub: DevHub, family: Family, new_name: NewName) -> str:
    name = new_name()
    push_delta(family.tuned_repo, name, base=family.base_repo)
    devhub.log.clear()
    return name


@pytest.mark.parametrize("case", ["own base", "transfer"])
def test_reads_only_planned_bytes(
    devhub: DevHub, family: Family, delta_repo: str, tmp_path: Path, case: str
) -> None:
    target = family.base_repo if case == "own base" else family.target_repo
    planned = apply(delta_repo, target, output=tmp_path / "result", dry_run=True)
    assert planned.plan["case"] == case
    looked = {repo: weights_served(devhub, repo) for repo in (delta_repo, target)}
    # The dry run reads headers and, to tell the two cases apart, a few KB of one tensor.
    assert looked[target] <= headers(family, target) + 4096
    assert not (tmp_path / "result").exists()

    devhub.log.clear()
    applied = apply(delta_repo, target, output=tmp_path / "result")
    assert applied.plan == planned.plan == json.loads(json.dumps(planned.plan))
    read = applied.plan["read"]
    moved = {r: weights_served(devhub, r) - looked[r] for r in (delta_repo, target)}
    assert moved[target] + planned_side_bytes(applied.plan, "target") == read["target"]
    assert moved[delta_repo] + planned_side_bytes(applied.plan, "delta") == read["delta"]
    assert read["network"] == read["target"] + read["delta"]
    resolved = [(r.repo, r.file) for r in devhub.log.select(kind="resolve")]
    assert len(resolved) == len(set(resolved))
    assert devhub.log.bytes_served(family.tuned_repo) == 0
    if case == "transfer":
        assert devhub.log.count(repo=delta_repo, file="exact-*") == 0
        assert devhub.log.bytes_served(family.base_repo) == 0


def weights_served(hub: DevHub, repo: str) -> int:
    return hub.log.bytes_served(repo, "*.safetensors")


def headers(family: Family, repo: str) -> int:
    """Bytes to read for the headers of a model: their lengths, then all of them."""
    folder = family.base if repo == family.base_repo else family.target
    lengths = [
        int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors")
    ]
    return sum(8 + 8 + length for length in lengths)


def planned_side_bytes(plan: dict[str, Any], origin: str) -> int:
    """Bytes of the files, other than weights, that are taken whole from one place."""
    return sum(
        file["bytes"]
        for file in plan["files"]
        if file["action"] == f"copy from {origin}" and not file["path"].endswith(".safetensors")
    )


def test_a_shard_without_change_is_copied_by_the_server(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName
) -> None:
    before, result = listing(devhub, family.target_repo), new_name()
    devhub.log.clear()
    applied = apply(delta_repo, family.target_repo, push_to=result)
    after = listing(devhub, result)
    shards = sorted(path for path in before if path.endswith(".safetensors"))
    same = [path for path in shards if after[path] == before[path]]
    assert same == [shards[0], shards[2]]
    longest_header = headers(family, family.target_repo)
    for path in same:
        assert devhub.log.bytes_served(family.target_repo, path) <= longest_header
        assert path not in {file.path for file in applied.files}
    assert devhub.log.count(kind="copy", repo=family.target_repo) == 1
    assert devhub.log.count(kind="commit", repo=result) == 1


def test_files_in_the_cache_cost_no_traffic(
    devhub: DevHub, family: Family, delta_repo: str, tmp_path: Path
) -> None:
    apply(delta_repo, family.target_repo, output=tmp_path / "plain")
    planned = apply(delta_repo, family.target_repo, output=tmp_path / "x", dry_run=True)
    assert planned.plan["read"]["network"] > 0  # nothing was added to the cache unasked
    apply(delta_repo, family.target_repo, output=tmp_path / "filling", cache=True)
    devhub.log.clear()
    cached = apply(delta_repo, family.target_repo, output=tmp_path / "cached")
    assert cached.plan["read"]["network"] == 0
    for repo in (delta_repo, family.target_repo):
        assert devhub.log.bytes_served(repo) == 0
    one, other = (models.hashes(tmp_path / name) for name in ("plain", "cached"))
    named = {RECORD, "README.md"}  # these two say what they are called
    assert {k: v for k, v in one.items() if k not in named} == {
        k: v for k, v in other.items() if k not in named
    }


def test_a_dry_run_reads_no_weights_even_with_cache(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName, tmp_path: Path
) -> None:
    planned = push_delta(
        family.tuned_repo, new_name(), base=family.base_repo, dry_run=True, cache=True
    )
    apply(delta_repo, family.target_repo, output=tmp_path / "x", dry_run=True, cache=True)
    assert planned.dry_run
    limit = 4096 + headers(family, family.target_repo)
    for repo in (family.tuned_repo, family.base_repo, family.target_repo, delta_repo):
        assert weights_served(devhub, repo) <= limit, repo
    assert not devhub.log.select(method="POST", kind="commit")


def test_push_delta_reads_each_model_once(
    devhub: DevHub, family: Family, new_name: NewName
) -> None:
    pushed = push_delta(family.tuned_repo, new_name(), base=family.base_repo)
    read = pushed.as_json()["read"]
    overhead = 8 + headers(family, family.base_repo)
    assert weights_served(devhub, family.tuned_repo) <= read["tuned"] + overhead
    assert weights_served(devhub, family.base_repo) <= read["base"] + overhead
    for repo in (family.tuned_repo, family.base_repo):
        assert devhub.log.count(kind="resolve", repo=repo, file="*.safetensors") == 1


# --- 4. memory ---

PEAK = """
import sys
from pathlib import Path
from hubdiff.jobs.apply import apply
from hubdiff.jobs.push import push_delta

job, base, tuned, target, out = sys.argv[1:]
if job == "push-delta":
    push_delta(tuned, out, base=base)
else:
    apply(out, target, output=out + "-result")
# Not ru_maxrss: that of a child begins with what its parent had when it forked.
(line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")]
print(int(line.split()[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {"push-delta": [], "apply": []}
    for layers in (8, 32):
        folder = tmp_path / str(layers)
        for seed, name in enumerate(("base", "tuned", "target")):
            large_model(folder / name, layers, seed)
        for job, measured in peaks.items():
            places = [str(folder / name) for name in ("base", "tuned", "target", "delta")]
            printed = on_hub.run_script(PEAK, job, *places)
            measured.append(int(printed))
        assert (folder / "delta-result" / "model.safetensors").stat().st_size > layers * 10_000_000
    for job, (small, large) in peaks.items():
        assert large < 700, (job, peaks)
        assert large - small < 60, (job, peaks)


def large_model(folder: Path, layers: int, seed: int) -> None:
    """About ``layers`` × 10 MB of bf16 weights: one tensor over several blocks, many of one. Tuned
    (seed 1) is base with small steps; drawing one layer and repeating it is quick."""
    generator = torch.Generator().manual_seed(7)
    layer = torch.randn(5_000_000, generator=generator) * 0.02
    if seed:
        layer += torch.randn(len(layer), generator=generator) * 1e-3 * seed
    layer = layer.to(torch.bfloat16)
    tensors = {"model.embed.weight": layer.repeat(layers // 4).reshape(-1, 1000)}
    for number in range(layers - layers // 4):
        tensors[f"model.layers.{number}.weight"] = (layer + number).reshape(1000, -1)
    models.save(folder, tensors)


# --- 5. killed, and run again ---

# Every run is a process of its own, forked where everything is imported already: importing torch
# would take longer than the work, and most kills would hit that. The parent has started no thread.
RUNNER = """
import os, signal, sys, time
import hubdiff.merge
from hubdiff.hub import HubTree, retry
from hubdiff.jobs.apply import apply

retry.BACKOFF_SECONDS = 0.001
for line in sys.stdin:
    delta, target, output, seconds = line.rstrip("\\n").split("\\t")
    began = time.monotonic()
    child = os.fork()
    if not child:
        try:
            apply(delta, target, output=output)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if seconds:
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), time.monotonic() - began, flush=True)
"""


class Runner:
    """Runs ``apply`` in processes that can be killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, delta: str, target: str, output: Path, kill_after: float | None = None) -> Ran:
        pipes = self._process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        pipes.stdin.write(f"{delta}\t{target}\t{output}\t{kill_after or ''}\n")
        pipes.stdin.flush()
        status, seconds = pipes.stdout.readline().split()
        return Ran(int(status), float(seconds))

    def stop(self) -> None:
        self._process.communicate(timeout=60)


@dataclass(frozen=True)
class Ran:
    """``status`` is 0, or -9 when it was killed."""

    status: int
    seconds: float


@pytest.fixture
def runner(devhub: DevHub) -> Iterator[Runner]:
    running = Runner()
    yield running
    running.stop()


@dataclass(frozen=True)
class Work:
    """A delta and a target for ``apply``, and what has to come out."""

    delta: str
    target: str
    expected: dict[str, str]

    def is_whole(self, output: Path) -> bool:
        return {k: v for k, v in models.hashes(output).items() if k not in ONE_OFF} == self.expected


ONE_OFF = (RECORD, "README.md")  # they name the output folder


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """A transfer of 24 MB in eight shards."""
    before = {f"model.layers.{n}.weight": drawn(n) for n in range(16)}
    after = {name: (t.float() * 1.01).to(t.dtype) for name, t in before.items()}
    models.save(tmp_path / "base", before)
    models.save(tmp_path / "tuned", after, files={"chat_template.jinja": "{{ x }}"})
    other = {name: (t.float() * 0.97).to(t.dtype) for name, t in before.items()}
    target = on_hub.sharded(tmp_path / "target", on_hub.split(other, 8))
    push_delta(tmp_path / "tuned", tmp_path / "delta", base=tmp_path / "base")
    apply(tmp_path / "delta", target, output=tmp_path / "right")
    expected = {k: v for k, v in models.hashes(tmp_path / "right").items() if k not in ONE_OFF}
    return Work(str(tmp_path / "delta"), str(target), expected)


def drawn(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(768, 1024, generator=generator) * 0.02).to(torch.bfloat16)


@pytest.fixture
def remote_work(work: Work, put_repo: PutRepo) -> Work:
    """The same work, from the Hub."""
    delta, target = (put_repo(contents(Path(place))) for place in (work.delta, work.target))
    return Work(delta, target, work.expected)


KILLS = 14
KILLS_REMOTE = 4


def test_interrupted_run_leaves_nothing_that_loads(
    runner: Runner, work: Work, remote_work: Work, tmp_path: Path
) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.hubdiff-partial"
    killed = 0
    for job, kill_after in moments(runner, work, remote_work, tmp_path / "timed"):
        ran = runner.run(job.delta, job.target, output, kill_after)
        killed += ran.status == -9
        # The folder has its name when it is whole, and only then.
        assert ran.status in (0, -9)
        assert not output.exists() or job.is_whole(output)
        assert ran.status == -9 or output.exists()
        # What is left over is no model: its config, its tokenizer come after all of its weights.
        if (partial / "config.json").exists():
            weights = [name for name in work.expected if name.endswith(".safetensors")]
            found = models.hashes(partial)
            assert {name: found[name] for name in weights} == {n: work.expected[n] for n in weights}
        if not output.exists():
            assert runner.run(job.delta, job.target, output).status == 0
        assert job.is_whole(output)
        assert not partial.exists()
        shutil.rmtree(output)
    assert killed >= KILLS // 2


def moments(
    runner: Runner, work: Work, remote_work: Work, scratch: Path
) -> Iterator[tuple[Work, float]]:
    """Jobs and when to kill them: at random, spread over the time each kind of run takes."""
    chance = random.Random(20)
    for job, count in ((work, KILLS - KILLS_REMOTE), (remote_work, KILLS_REMOTE)):
        seconds = runner.run(job.delta, job.target, scratch).seconds
        shutil.rmtree(scratch)
        for number in range(count):
            yield job, seconds * (number + chance.random()) / count


def test_interrupted_run_resumes(runner: Runner, work: Work, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.hubdiff-partial"
    after = 0.5 * runner.run(work.delta, work.target, output).seconds
    resumed = 0
    for _ in range(40):  # until the moment of the kill falls between two files, however busy it is
        shutil.rmtree(output)
        runner.run(work.delta, work.target, output, after)
        finished = finished_files(partial)
        if output.exists():
            after *= 0.8
            continue
        after *= 1.0 if finished else 1.25
        assert runner.run(work.delta, work.target, output).status == 0
        assert work.is_whole(output)
        for path, identity in finished.items():
            assert file_identity(output / path) == identity, f"{path} was written again"
        resumed += bool(finished)
        if resumed == 3:
            break
    assert resumed


def test_a_damaged_leftover_is_made_again(runner: Runner, work: Work, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / ".out.hubdiff-partial"
    early, late = 0.0, runner.run(work.delta, work.target, output).seconds
    for _ in range(40):
        shutil.rmtree(output, ignore_errors=True)
        runner.run(work.delta, work.target, output, (early + late) / 2)
        finished = list(finished_files(partial))
        if finished:
            break
        # The machine may be quicker or slower by now: the window moves, and opens again.
        if output.exists():
            late = (early + 3 * late) / 4
            early *= 0.9
        else:
            early = (3 * early + late) / 4
            late *= 1.1
    with (partial / finished[0]).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"wrong")
    assert runner.run(work.delta, work.target, output).status == 0
    assert work.is_whole(output)


def finished_files(partial: Path) -> dict[str, tuple[int, int]]:
    """The files that a killed run left finished, and which files on disk they are.

    Without those that every run writes for itself.
    """
    journal = partial / ".hubdiff-journal.jsonl"
    lines = journal.read_text().splitlines()[1:] if journal.exists() else []
    found = {}
    for line in lines:
        try:
            path = json.loads(line)["path"]
        except json.JSONDecodeError:
            continue  # cut short by the kill
        if path not in ONE_OFF:
            found[path] = file_identity(partial / path)
    return found


def file_identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


# --- 6. nothing trusted ---

REFUSALS = (IntegrityError, CorruptPayload, BadManifest, CheckpointError)

# Which side's file is damaged on its way, and at which byte of an answer's body. Answers that are
# shorter pass: 5,000 leaves the headers alone and hits the weights.
DAMAGED_FOR_APPLY = [
    ("target", "model-00001-of-00003.safetensors", 5000),
    ("target", "model-00002-of-00003.safetensors", 5000),
    ("target", "model-00002-of-00003.safetensors", 4),
    ("target", "model-00002-of-00003.safetensors", 90),
    ("target", "model.safetensors.index.json", 30),
    ("target", "tokenizer.json", 3),
    ("target", "config.json", 40),
    ("base", "model.safetensors", 5000),
    ("base", "model.safetensors", 90),
    ("base", "tokenizer.json", 3),
    ("delta", "delta-00001-of-00001.safetensors", 1500),
    ("delta", "delta-00001-of-00001.safetensors", 20),
    ("delta", "hubdiff.json", 2000),
    ("delta", "tuned/chat_template.jinja", 3),
    ("delta", "tuned/config.json", 40),
]


@pytest.mark.parametrize("to_hub", [False, True], ids=["output", "push-to"])
def test_nothing_is_trusted_unchecked(
    devhub: DevHub,
    family: Family,
    delta_repo: str,
    new_name: NewName,
    tmp_path: Path,
    to_hub: bool,
) -> None:
    repos = {"delta": delta_repo, "target": family.target_repo, "base": family.base_repo}
    right = {}
    for side in ("target", "base"):
        apply(delta_repo, repos[side], output=tmp_path / f"right-{side}")
        right[side] = tmp_path / f"right-{side}"
    for number, (side, path, byte) in enumerate(DAMAGED_FOR_APPLY):
        to = "base" if side == "base" else "target"
        devhub.faults.clear()
        fault = devhub.faults.add(
            "corrupt", f"*{repos[side]}/*/{path}*", after_bytes=byte, method="GET"
        )
        output, result = tmp_path / f"out-{number}", new_name()
        try:
            if to_hub:
                apply(delta_repo, repos[to], push_to=result)
            else:
                apply(delta_repo, repos[to], output=output)
        except REFUSALS:
            assert not output.exists()
            assert not to_hub or not listing_or_nothing(devhub, result)
        else:
            found = listing(devhub, result) if to_hub else ids(output, {})
            expected = ids(right[to], found if to_hub else {})
            assert without(found, *ONE_OFF) == without(expected, *ONE_OFF), (side, path, byte)
        # A shard that the server copies is read as far as its header.
        copied = to_hub and path == "model-00001-of-00003.safetensors"
        assert fault.fired or copied, (side, path, byte)


def listing_or_nothing(hub: DevHub, repo: str) -> dict[str, str]:
    return listing(hub, repo) if on_hub.exists(hub, repo) else {}


def without(mapping: dict[str, str], *keys: str) -> dict[str, str]:
    return {key: value for key, value in mapping.items() if key not in keys}


DAMAGED_FOR_PUSH = [
    ("tuned", "model.safetensors", 5000),
    ("tuned", "model.safetensors", 90),
    ("tuned", "chat_template.jinja", 3),
    ("tuned", "config.json", 40),
    ("base", "model.safetensors", 5000),
    ("base", "model.safetensors", 90),
    ("base", "config.json", 40),
    ("base", "tokenizer.json", 3),
]


def test_no_delta_is_made_of_damaged_bytes(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName
) -> None:
    repos = {"tuned": family.tuned_repo, "base": family.base_repo}
    right = without(listing(devhub, delta_repo), "README.md")
    for side, path, byte in DAMAGED_FOR_PUSH:
        devhub.faults.clear()
        match = f"*{repos[side]}/*/{path}*"
        fault = devhub.faults.add("corrupt", match, after_bytes=byte, method="GET")
        result = new_name()
        try:
            push_delta(repos["tuned"], result, base=repos["base"])
        except REFUSALS:
            assert not listing_or_nothing(devhub, result)
        else:
            # The card names the repo; all the rest is the same for the same models.
            assert without(listing(devhub, result), "README.md") == right, (side, path, byte)
        assert fault.fired, (side, path, byte)


def test_a_delta_that_was_changed_on_disk_is_refused(family: Family, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    push_delta(family.tuned, delta, base=family.base)
    for path in ("delta-00001-of-00001.safetensors", "tuned/chat_template.jinja"):
        data = (delta / path).read_bytes()
        for position in {len(data) - 1, len(data) * 2 // 3, len(data) // 3}:
            (delta / path).write_bytes(
                data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
            )
            for to in (family.base, family.target):
                with pytest.raises(REFUSALS):
                    apply(delta, to, output=tmp_path / "result")
                assert not (tmp_path / "result").exists()
        (delta / path).write_bytes(data)
    apply(delta, family.base, output=tmp_path / "result")


# --- 7. pinned and fingerprinted ---


def test_every_ref_is_pinned_and_every_tensor_fingerprinted(
    devhub: DevHub, family: Family, new_name: NewName, tmp_path: Path
) -> None:
    pinned = {
        name: on_hub.head(devhub, getattr(family, f"{name}_repo"))
        for name in ("base", "tuned", "target")
    }
    delta = new_name()
    push_delta(family.tuned_repo, delta, base=family.base_repo)
    manifest = json.loads(HubTree(ModelRef.parse(delta)).read_bytes("hubdiff.json"))
    for side in ("base", "tuned"):
        assert manifest[side]["repo"] == getattr(family, f"{side}_repo")
        assert manifest[side]["commit"] == pinned[side]

    before, after = load(family.base), load(family.tuned)
    assert {tensor["name"] for tensor in manifest["tensors"]} == set(after)
    for tensor in manifest["tensors"]:
        assert tensor["base"] == fingerprint(before[tensor["name"]])
        assert tensor["tuned"] == fingerprint(after[tensor["name"]])
    on_the_hub = listing(devhub, delta)
    layers = [file for files in manifest["layers"].values() for file in files]
    assert layers
    assert all(on_the_hub[file["path"]] == file["sha256"] for file in layers)
    by_file = {file["path"]: file["sha256"] for file in manifest["tuned"]["files"]}
    assert by_file == models.hashes(family.tuned)

    apply(delta, family.target_repo, output=tmp_path / "result")
    record = json.loads((tmp_path / "result" / RECORD).read_text())
    (given,) = record["deltas"]
    assert given["commit"] == on_hub.head(devhub, delta)
    assert record["target"]["commit"] == pinned["target"]
    assert given["base"]["commit"] == pinned["base"]
    assert given["tuned"]["commit"] == pinned["tuned"]


def fingerprint(tensor: torch.Tensor) -> str:
    return blake3(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


class Meddler(Silent):
    """Someone who commits to a repo while the job is at work."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act

    def start(self, *args: object, **named: object) -> None:
        self._act()


def test_a_model_that_moves_on_meanwhile_stays_pinned(
    devhub: DevHub, family: Family, delta_repo: str, new_name: NewName, put_repo: PutRepo
) -> None:
    changed = {"model.safetensors": (family.base / "model.safetensors").read_bytes()}
    changed["chat_template.jinja"] = b"another"
    delta, first = new_name(), on_hub.head(devhub, family.tuned_repo)
    meddler = Meddler(lambda: put_repo(changed, family.tuned_repo))
    push_delta(family.tuned_repo, delta, base=family.base_repo, progress=meddler)
    assert on_hub.head(devhub, family.tuned_repo) != first
    right = without(listing(devhub, delta_repo), "README.md")
    assert without(listing(devhub, delta), "README.md") == right
