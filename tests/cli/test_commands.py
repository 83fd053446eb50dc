"""What each command hands to the library, and what it says of the result."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from hubdiff.jobs.inspect import inspect
from hubdiff.summary import percent, size_text
from tests import models
from tests.cli.running import Family, Said

Run = Callable[..., Said]


# --- push-delta ---


def test_push_delta_says_sizes_and_what_to_do_next(
    hubdiff: Run, family: Family, tmp_path: Path
) -> None:
    repo = str(tmp_path / "delta with spaces")
    said = hubdiff("push-delta", family.tuned, repo, "--base", family.base)
    assert said.code == 0, said.err
    size = inspect(repo).summary.delta_bytes
    assert f"{size_text(size)}, " in said.out
    assert "packed" in said.out
    assert "1 file of tuned not carried (6 bytes)" in said.err

    next_command = said.out.splitlines()[-1].strip()
    assert next_command.endswith("--output DIR")
    output = str(tmp_path / "out")
    arguments = shlex.split(next_command.replace("DIR", shlex.quote(output)))
    assert hubdiff(*arguments[1:]).code == 0
    assert models.hashes(Path(output))["model-00001-of-00002.safetensors"]


def test_push_delta_in_json(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    repo = str(tmp_path / "delta")
    said = hubdiff("push-delta", family.tuned, repo, "--base", family.base, "--json")
    document = json.loads(said.out)
    assert document["where"] == repo
    assert document["delta_bytes"] == inspect(repo).summary.delta_bytes


def test_push_delta_dry_run_writes_nothing(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    repo = tmp_path / "delta"
    said = hubdiff("push-delta", family.tuned, str(repo), "--base", family.base, "--dry-run")
    assert said.code == 0, said.err
    assert "nothing was written" in said.out
    assert not list(tmp_path.iterdir())


def test_push_delta_with_filters_and_plain(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    repo = str(tmp_path / "delta")
    filters = ("--include", "*mlp*", "--include", "*attn*", "--exclude", "*.1.*", "--plain")
    said = hubdiff("push-delta", family.tuned, repo, "--base", family.base, *filters)
    assert said.code == 0, said.err
    assert "note: made with --include or --exclude" in said.err
    made = inspect(repo).manifest
    assert made.filters == {"include": ("*mlp*", "*attn*"), "exclude": ("*.1.*",)}
    parts = [record.part("delta") for record in made.tensors]
    assert {part.encoding for part in parts if part} == {"plain"}


def test_push_delta_to_the_hub_says_where_it_is(
    hubdiff: Run, family: Family, new_name: Callable[[], str]
) -> None:
    repo = new_name()
    said = hubdiff("push-delta", family.tuned, repo, "--base", family.base)
    assert said.code == 0, said.err
    assert f"delta      {repo}\n" in said.out
    assert f"/{repo}/commit/" in said.out
    assert f"hubdiff apply {repo} --to" in said.out
    as_pr = ("push-delta", family.tuned, repo, "--base", family.base, "--pr", "--json")
    other = hubdiff(*as_pr, "--plain")
    assert "/discussions/" in json.loads(other.out)["pr_url"]
    same = hubdiff(*as_pr)
    assert json.loads(same.out)["pr_url"] is None
    assert f"note: {repo} holds exactly this already: no pull request" in same.err
    assert hubdiff("inspect", repo).out.startswith(f"delta       {repo}@")


# --- apply ---


def test_apply_dry_run_prints_the_plan(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("apply", family.delta, "--to", family.other, "--output", str(output))
    said = hubdiff(*arguments, "--scale", "0.5", "--dry-run")
    assert said.code == 0, said.err
    assert "transfer at scale 0.5" in said.out
    assert "model-00001-of-00002.safetensors" in said.out
    assert "merge" in said.out
    plan = json.loads(hubdiff(*arguments, "--scale", "0.5", "--dry-run", "--json").out)["plan"]
    for number in (*plan["read"].values(), plan["write"], plan["peak_memory"]):
        assert size_text(number) in said.out
    assert not list(tmp_path.iterdir())


def test_apply_says_which_case_it_runs(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    for target, case in ((family.base, "own base"), (family.other, "transfer")):
        output = str(tmp_path / case)
        said = hubdiff("apply", family.delta, "--to", target, "--output", output)
        assert said.code == 0, said.err
        assert f"case     {case}\n" in said.out
        assert f"result   {output}\n" in said.out
        assert "note: the target is " in said.err


def test_apply_records_the_command_as_typed(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("apply", family.delta, "--to", family.other, "--output", str(output))
    assert hubdiff(*arguments, "--scale", "0.5").code == 0
    record = json.loads((output / "hubdiff-result.json").read_text())
    assert record["command"] == ["hubdiff", *arguments, "--scale", "0.5"]


def test_apply_takes_several_deltas(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("apply", f"{family.delta}:0.7", f"{family.delta}:-0.2", "--to", family.other)
    arguments += ("--output", str(output), "--method", "dare", "--density", "0.5", "--seed", "3")
    scales = ("--scale", "*.mlp.*=0.5", "--scale", "0.9", "--scale", "model.layers.{0..1}.*=2")
    said = hubdiff(*arguments, *scales, "--dry-run")
    assert said.code == 0, said.err
    for words in (
        f"0.7 × {family.delta}",
        f"-0.2 × {family.delta}",
        "dare, density 0.5, seed 3",
        "0.9 for *",
        "2 for model.layers.{0..1}.*",
        "transfer, scaled by tensor",
    ):
        assert words in said.out
    assert hubdiff(*arguments, *scales).code == 0
    record = json.loads((output / "hubdiff-result.json").read_text())
    assert [delta["weight"] for delta in record["deltas"]] == [0.7, -0.2]
    assert record["method"] == {"name": "dare", "density": 0.5, "seed": 3}
    assert list(record["scale"].items()) == [
        ("*", 0.9), ("*.mlp.*", 0.5), ("model.layers.{0..1}.*", 2.0)
    ]  # fmt: skip
    assert record["command"] == ["hubdiff", *arguments, *scales]


def test_a_weight_that_is_no_number_is_refused(hubdiff: Run, family: Family) -> None:
    for weight in ("nan", "1e39"):
        arguments = ("apply", f"{family.delta}:{weight}", "--to", family.other)
        said = hubdiff(*arguments, "--output", "out")
        assert said.code == 1
        assert "finite float32" in said.err


def test_apply_force_replaces(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    (output / "model.safetensors").write_bytes(b"an older model")
    arguments = ("apply", family.delta, "--to", family.base, "--output", str(output))
    refused = hubdiff(*arguments)
    assert refused.code == 1
    assert "--force" in refused.err
    assert (output / "mine.txt").exists()
    assert hubdiff(*arguments, "--force").code == 0
    assert not (output / "mine.txt").exists()


def test_apply_to_the_hub_says_what_the_hub_copied(
    hubdiff: Run, family: Family, put_repo: Callable[..., str], new_name: Callable[[], str]
) -> None:
    files = {path.name: path.read_bytes() for path in Path(family.other).iterdir()}
    target, result = put_repo(files), new_name()
    one_shard = ("--include", "model.embed_tokens.weight")
    said = hubdiff("apply", family.delta, "--to", target, "--push-to", result, *one_shard)
    assert said.code == 0, said.err
    assert f"result   {result}\n" in said.out
    assert "copied   1 file, by the Hub itself\n" in said.out
    assert f"/{result}/commit/" in said.out


# --- inspect ---


def test_inspect_shows_each_layer(hubdiff: Run, family: Family) -> None:
    said = hubdiff("inspect", family.delta)
    assert said.code == 0, said.err
    rows = [line.split() for line in said.out.splitlines()]
    heading = rows.index(["layer", "attention", "mlp", "norm", "embedding"])
    assert [row[0] for row in rows[heading + 1 : heading + 4]] == ["outside", "0", "1"]
    assert "pytorch_model.bin, 6 bytes: " in said.out
    assert "16 changed, 5 unchanged, 0 added, 0 removed" in said.out


def test_inspect_in_json(hubdiff: Run, family: Family) -> None:
    document = json.loads(hubdiff("inspect", family.delta, "--json").out)
    sizes = document["bytes"]
    files = Path(family.delta).glob("delta-*.safetensors")
    assert sizes["delta"] == sum(file.stat().st_size for file in files)
    assert sizes["delta"] == sizes["portable"] + sizes["exact"]
    assert document["portable"] is True
    assert [row["layer"] for row in document["layers"] if row["kind"] == "mlp"] == [0, 1]
    assert document["not_carried"][0]["path"] == "pytorch_model.bin"


def test_bars() -> None:
    from hubdiff.cli.inspect import bar

    assert [bar(share, 4) for share in (0, 1e-9, 0.5, 1)] == ["", "▏", "██", "████"]


# --- verify, unpack, demo ---


def test_verify_with_both_sides(hubdiff: Run, family: Family) -> None:
    said = hubdiff("verify", family.delta, "--base", family.base, "--tuned", family.tuned)
    assert said.code == 0, said.err
    assert "is whole" in said.out
    assert "7 files of tuned rebuilt" in said.out


def test_verify_fails_on_one_wrong_byte(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    for file in Path(family.delta).rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(family.delta)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    layer = next(tmp_path.glob("delta-*.safetensors"))
    data = bytearray(layer.read_bytes())
    data[-1] ^= 1
    layer.write_bytes(data)
    said = hubdiff("verify", str(tmp_path))
    assert said.code == 1
    assert layer.name in said.err
    assert said.out == ""


def test_unpack_writes_tensors_any_tool_reads(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    from safetensors import safe_open

    output = tmp_path / "dense"
    said = hubdiff("unpack", family.delta, "--output", str(output))
    assert said.code == 0, said.err
    assert "16 tensors; 5 unchanged, left out" in said.out
    with safe_open(output / "delta.safetensors", "pt") as file:
        assert len(file.keys()) == 16


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_model_is_not_a_delta(hubdiff: Run, family: Family, command: str) -> None:
    said = hubdiff(command, family.base)
    assert said.code == 1
    assert "not a delta" in said.err


def test_demo_tells_its_story_on_stderr_and_its_result_on_stdout(
    hubdiff: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The demo itself has its own test; here it is only what it is asked and what it says."""
    from hubdiff import demo
    from hubdiff.progress import Progress

    result = demo.DemoResult(
        v2=0.1,
        result=0.9,
        tuned=0.95,
        examples=300,
        answers=(demo.Answered("sort ba = ", "xx", "ab", "ab"),),
        model_bytes=10**6,
        delta_bytes=10**5,
        restored=("config.json",),
        steps=(demo.Step("push-delta", "hubdiff push-delta a b", {"a": 1000}),),
        card=None,
        picture=None,
        seconds=61.0,
    )
    asked: list[Path | None] = []

    def short(folder: Path | None, *, progress: Progress) -> demo.DemoResult:
        asked.append(folder)
        progress.note("$ hubdiff push-delta a b")
        return result

    monkeypatch.setattr(demo, "demo", short)
    said = hubdiff("demo")
    assert said.code == 0, said.err
    assert said.err == "$ hubdiff push-delta a b\n"
    assert "0.90" in said.out
    assert "10 %" in said.out
    kept = hubdiff("demo", "--json", "--keep", str(tmp_path))
    assert json.loads(kept.out)["result"] == 0.9
    assert asked == [None, tmp_path]


# --- low-rank and export ---


def test_a_truncated_delta_says_its_error_and_becomes_an_adapter(
    hubdiff: Run, family: Family, tmp_path: Path
) -> None:
    repo, adapter = str(tmp_path / "delta"), str(tmp_path / "adapter")
    said = hubdiff("push-delta", family.tuned, repo, "--base", family.base, "--energy", "0.3")
    assert said.code == 0, said.err
    lossy = inspect(repo).manifest.lossy
    assert lossy is not None
    assert lossy.energy == 0.3
    error = f"{percent(lossy.error)}, measured as ‖Δ − stored‖/‖Δ‖"
    assert f"error      {error}" in said.out
    assert "note: lossy" in said.err
    assert "low-rank" in said.out

    shown = hubdiff("inspect", repo)
    assert error in shown.out
    assert "rebuilds    no: the delta is lossy" in shown.out
    assert "Error of the factors, the worst first" in shown.out

    said = hubdiff("export", repo, "--as", "peft", "--output", adapter)
    assert said.code == 0, said.err
    assert "adapter_model.safetensors" in said.out
    assert json.loads(hubdiff("export", repo, "--as", "peft", "--output", adapter, "--force",
                              "--json").out)["same_files"] is False  # fmt: skip


def test_export_takes_formats_it_knows(hubdiff: Run, family: Family, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    said = hubdiff("export", family.delta, "--as", "gguf", "--output", output)
    assert said.code == 1
    assert "gguf" in said.err
    said = hubdiff("export", family.delta, "--as", "peft", "--output", output)
    assert said.code == 1
    assert "no factors" in said.err
    assert "--rank" in said.err
    assert not list(tmp_path.iterdir())


def test_two_ways_to_store_are_no_command_line(
    hubdiff: Run, family: Family, tmp_path: Path
) -> None:
    for options in (("--rank", "2", "--energy", "0.5"), ("--rank", "2", "--plain"), ("--rank", "0"),
                    ("--energy", "1")):  # fmt: skip
        delta = str(tmp_path / "delta")
        said = hubdiff("push-delta", family.tuned, delta, "--base", family.base, *options)
        assert said.code == 2, said.err
        assert options[0] in said.err
    assert not list(tmp_path.iterdir())
