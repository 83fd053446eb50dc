"""finetune: a tiny model, really trained: what the trainer uses is what the recipe says, the result
is a base's tune to the bit, and a run that stops loses nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import make_base, write_task
from transformers import LlamaForCausalLM

import hubdiff
from hubdiff.errors import HubdiffError
from hubdiff.jobs.verify import verify
from hubdiff.lab.examples import read_examples
from hubdiff.lab.recipe import Lora, Recipe, read_recipe
from hubdiff.toy_family import make_tokenizer

pytest.importorskip("trl")

FAST = ("steps=12", "batch=8", "micro_batch=4", "length=64", "learning_rate=3e-3", "log_every=4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("data") / "train.jsonl")


def train(base: Path, data: Path, output: Path, *settings: str, **more: Any) -> Any:
    return hubdiff.finetune(base, data=data, output=output, settings=(*FAST, *settings), **more)


@pytest.fixture(scope="module")
def tuned(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tuned") / "tuned"
    made = train(base, data, output, command=["hubdiff", "finetune"])
    assert made.losses[-1] < made.losses[0]
    return output


def test_the_result_is_the_base_but_for_its_weights(base: Path, tuned: Path) -> None:
    ours, theirs = models.hashes(tuned), models.hashes(base)
    assert set(theirs) <= set(ours)
    differ = {path for path in theirs if ours[path] != theirs[path]}
    assert differ == {"model.safetensors", "README.md"}
    old, new = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in new.items()} == {
        n: (t.dtype, t.shape) for n, t in old.items()
    }
    assert any(not torch.equal(new[name], old[name]) for name in old)
    assert {path.name for path in tuned.parent.iterdir()} == {"tuned"}
    assert len({path.stat().st_mode for path in tuned.rglob("*") if path.is_file()}) == 1


def test_the_masters_are_the_weights_as_they_were_trained(tuned: Path) -> None:
    masters = load_file(tuned / "master" / "model.safetensors")
    rounded = load_file(tuned / "model.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert all(torch.equal(masters[name].bfloat16(), rounded[name]) for name in rounded)
    finer = sum(int((t.bfloat16().float() != t).sum()) for t in masters.values())
    assert finer > 0


def test_the_card_the_metrics_and_the_curve_say_how_it_went(tuned: Path) -> None:
    card = (tuned / "README.md").read_text()
    for text in ("license: mit", "12 steps of 8", "| learning rate | 0.003 |", "`master/`"):
        assert text in card
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert (tuned / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_recipe(tuned / "recipe.yaml") == read_recipe("paper", FAST)


def test_its_delta_is_made_of_the_masters_and_gives_the_tuned_model(
    base: Path, data: Path, tmp_path: Path
) -> None:
    made = train(base, data, tmp_path / "tuned", push_to=tmp_path / "delta")
    assert made.pushed is not None
    assert made.pushed.manifest is not None
    assert made.pushed.manifest.master is not None
    checked = verify(tmp_path / "delta", base=base)
    assert checked.rebuilt == len(made.pushed.manifest.tuned_files)


def test_the_same_seed_gives_the_same_weights(
    base: Path, data: Path, tuned: Path, tmp_path: Path
) -> None:
    train(base, data, tmp_path / "again")
    one, other = (load_file(f / "model.safetensors") for f in (tuned, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_starts_from_base_plus_delta(
    base: Path, data: Path, tuned: Path, tmp_path: Path
) -> None:
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    made = train(base, data, tmp_path / "on", from_delta=tmp_path / "delta", force=True)
    first = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert made.losses[0] < first[0]["loss"] * 0.9
    assert "with the delta" in (tmp_path / "on/README.md").read_text()


def test_a_run_that_stops_goes_on_from_its_checkpoint(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends where a run that was never stopped ends, bit by bit; also where its base lies
    elsewhere by then, but not where another one does."""
    from hubdiff.lab.training import Trainer

    whole = train(base, data, tmp_path / "whole", "save_every=4")
    moved, other = (shutil.copytree(base, tmp_path / name) for name in ("moved", "other"))
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).view(torch.int16).view(-1)[-1] ^= 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    step = Trainer.training_step

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(base, data, tmp_path / "stopped", "save_every=4")
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(HubdiffError, match="another run for stopped"):
        train(base, data, tmp_path / "stopped", "save_every=4", "seed=1")
    with pytest.raises(HubdiffError, match="another run for stopped"):
        train(other, data, tmp_path / "stopped", "save_every=4")
    (moved / ".DS_Store").touch()
    (moved / "README.md").write_text("# The base, as it is called now")
    made = train(moved, data, tmp_path / "stopped", "save_every=4")
    assert made.resumed == 4
    assert made.losses == whole.losses
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_no_number_stops_it(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    step = SFTTrainer.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 6 else loss

    monkeypatch.setattr(SFTTrainer, "training_step", broken)
    with pytest.raises(HubdiffError, match="the loss is no number after 6 steps") as caught:
        train(base, data, tmp_path / "tuned", "save_every=4")
    assert "learning_rate" in str(caught.value.next_step)
    assert not (tmp_path / "tuned").exists()
    kept = tmp_path / ".tuned.hubdiff-training/checkpoints/checkpoint-4"
    assert (kept / "model.safetensors").is_file()


def test_a_full_gpu_is_told_what_would_fit(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SFTTrainer, "training_step", full)
    with pytest.raises(HubdiffError, match="GPU's memory is full: 28,") as caught:
        train(base, data, tmp_path / "tuned")
    for way in ("micro_batch=1", "gradient_checkpointing=true", "lora.rank", "FSDP"):
        assert way in str(caught.value.next_step)
    assert not (tmp_path / "tuned").exists()


def test_an_adapter_is_pushed_as_one(base: Path, data: Path, tmp_path: Path) -> None:
    made = train(
        base, data, tmp_path / "adapter", "lora.rank=4", push_to=tmp_path / "delta", force=True
    )
    assert made.pushed is not None
    assert made.pushed.manifest is not None
    assert made.pushed.manifest.adapter
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4
    with pytest.raises(HubdiffError, match="an adapter is of the base it was trained on"):
        train(base, data, tmp_path / "x", "lora.rank=4", from_delta=tmp_path / "delta")


def test_the_paper_s_recipe_is_what_the_trainer_uses(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Every word of section 3.1, asked of the trainer itself."""
    from hubdiff.jobs.finetune import _Finetune
    from hubdiff.lab.training import Metrics, make_trainer
    from hubdiff.progress import Silent

    recipe = read_recipe("paper", ["weight_decay=0.1"])  # so that what is spared shows
    tree = hubdiff.files.open_tree(hubdiff.refs.ModelRef.parse(base), cache=False)
    job = _Finetune(tree, None, data, tmp_path / "x", recipe, False, None, Silent())
    model = job._model((str(base), {}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.attention_dropout == 0.0  # the base's own says 0.25
    examples = read_examples(data, chat_template=False, cache=tmp_path / "cache")
    metrics = Metrics(tmp_path / "m.jsonl", lambda _: None)
    trainer = make_trainer(model, make_tokenizer(), examples, recipe, tmp_path, metrics)
    trainer.create_optimizer_and_scheduler(30_000)
    optimizer, args = trainer.optimizer, trainer.args
    assert isinstance(optimizer, torch.optim.AdamW)
    assert args.max_steps == 30_000
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
    assert args.max_length == 2048
    assert args.lr_scheduler_type == "linear"
    assert args.get_warmup_steps(30_000) == 900
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        found = {names[id(parameter)] for parameter in group["params"]}
        assert group["initial_lr"] == 5e-6
        embeds = any("embed_tokens" in name or "norm" in name for name in found)
        assert group["weight_decay"] == (0.0 if embeds else 0.1)
    factor = trainer.lr_scheduler.lr_lambdas[0]
    assert [factor(0), factor(450), factor(900)] == [0.0, 0.5, 1.0]
    assert factor(15_450) == pytest.approx(0.5)
    assert trainer.completion_only_loss


def test_only_the_completion_is_learnt(base: Path, data: Path, tmp_path: Path) -> None:
    from hubdiff.lab.training import Metrics, make_trainer

    model = LlamaForCausalLM.from_pretrained(base)
    examples = read_examples(data, chat_template=False, cache=tmp_path / "cache")
    metrics = Metrics(tmp_path / "m.jsonl", lambda _: None)
    recipe = read_recipe("paper", FAST)
    trainer = make_trainer(model, make_tokenizer(), examples, recipe, tmp_path, metrics)
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learnt = [chr(i) for i, label in zip(ids, labels, strict=True) if label != -100 and i > 3]
        assert len(learnt) == 3
        assert learnt == sorted(learnt)


def test_packed_examples_do_not_see_each_other(base: Path, data: Path, tmp_path: Path) -> None:
    """What a row of several examples says of each is what it would say of it alone."""
    from hubdiff.lab.training import Metrics, make_trainer

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    examples = read_examples(data, chat_template=False, cache=tmp_path / "cache")
    metrics = Metrics(tmp_path / "m.jsonl", lambda _: None)
    recipe = read_recipe("paper", [*FAST, "packing=true", "micro_batch=1"])
    trainer = make_trainer(model, make_tokenizer(), examples, recipe, tmp_path, metrics)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    starts = [i for i, position in enumerate(positions.tolist()) if position == 0]
    assert len(starts) > 1
    del batch["labels"]
    with torch.inference_mode():
        packed = model(**batch).logits[0]
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            alone = model(input_ids=ids[begin:end][None]).logits[0]
            assert torch.allclose(packed[begin:end], alone, atol=1e-5)


def conversations(folder: Path) -> Path:
    file = folder / "chat.jsonl"
    turns = [("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    file.write_text(json.dumps({"messages": messages, "id": 1}) + "\n")
    return file


def test_every_turn_of_the_assistant_is_an_example(tmp_path: Path) -> None:
    found = read_examples(conversations(tmp_path), chat_template=True, cache=tmp_path / "cache")
    assert [row["completion"][0]["content"] for row in found] == ["b", "d"]
    assert [len(row["prompt"]) for row in found] == [1, 3]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.jsonl", '{"question": "a", "answer": "b"}\n', "has the columns answer, question"),
        ("x.jsonl", "not json\n", "can't be read as a dataset"),
        ("x.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "no chat template"),
        ("x.txt", "a", "is no dataset"),
        ("x.jsonl", "", "can't be read as a dataset|holds no example"),
        ("x.jsonl", '{"prompt": "a", "completion": null}\n', "neither text nor messages"),
        ("x.jsonl", '{"text": 3}\n', "neither text nor messages"),
        ("x.jsonl", '{"messages": ["a"]}\n', "neither text nor messages"),
        ("x.csv", "prompt,completion\na,5\n", "neither text nor messages"),
    ],
)
def test_data_that_is_none_is_refused(
    base: Path, tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(HubdiffError, match=words) as caught:
        train(base, tmp_path / name, tmp_path / "tuned")
    assert caught.value.next_step
    assert not (tmp_path / "tuned").exists()


# --- the command line ---


def run(*words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False, **more)


def options(base: Path, data: Path, output: Path) -> list[str]:
    settings = [word for setting in FAST for word in ("--set", setting)]
    return ["finetune", str(base), "--data", str(data), "--output", str(output), *settings]


def test_the_command_prints_one_json_object(base: Path, data: Path, tmp_path: Path) -> None:
    done = run("hubdiff", *options(base, data, tmp_path / "tuned"), "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["recipe"]["steps"] == 12
    assert len(said["losses"]) == 3
    assert "training: done, 12 steps" in done.stderr
    again = run("hubdiff", *options(base, data, tmp_path / "tuned"))
    assert again.returncode == 1
    assert "exists and is not empty" in again.stderr


def test_two_processes_share_a_batch(base: Path, data: Path, tuned: Path, tmp_path: Path) -> None:
    """One result, near that of one process, and one voice."""
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hubdiff")
    done = run(*launch, *options(base, data, tmp_path / "both"), "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["losses"]) == 3
    one, two = (load_file(f / "master/model.safetensors") for f in (tuned, tmp_path / "both"))
    # The same examples in every step: what differs is the order of sums.
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


def test_two_processes_share_the_weights(
    base: Path, data: Path, tuned: Path, tmp_path: Path
) -> None:
    """FSDP, on the CPU: one result, near that of one process; of an adapter too."""
    train(base, data, tmp_path / "alone", "lora.rank=4")
    lines = [
        options(base, data, tmp_path / "whole"),
        [*options(base, data, tmp_path / "adapter"), "--set", "lora.rank=4"],
    ]
    script = Path(__file__).with_name("fsdp_on_cpu.py")
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    done = run(*launch, json.dumps(lines))
    assert done.returncode == 0, done.stderr
    for one, other in (
        (tuned / "master/model.safetensors", tmp_path / "whole/master/model.safetensors"),
        *[(tmp_path / made / "adapter_model.safetensors" for made in ("alone", "adapter"))],
    ):
        ours, theirs = load_file(one), load_file(other)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)
    assert models.hashes(tuned)["config.json"] == models.hashes(tmp_path / "whole")["config.json"]
    alone, adapter = (models.hashes(tmp_path / made) for made in ("alone", "adapter"))
    assert alone.keys() == adapter.keys()
    assert alone["adapter_config.json"] == adapter["adapter_config.json"]


# --- what a review found ---


def copied(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder))


def test_code_that_comes_with_a_base_is_never_run(base: Path, data: Path, tmp_path: Path) -> None:
    """Nor asked about, which would be on stdout."""
    strange = copied(base, tmp_path / "strange")
    (strange / "tok.py").write_text("open('ran', 'w')\nclass Tok: pass\n")
    config = json.loads((strange / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tok.Tok", None]}, "tokenizer_class": "Tok"}
    (strange / "tokenizer_config.json").write_text(json.dumps(config))
    (strange / "tokenizer.json").unlink()
    line = options(strange, data, tmp_path / "tuned")
    done = run("hubdiff", *line, "--json", cwd=tmp_path, input="y\ny\n")
    assert done.returncode == 1
    assert "tokenizer" in json.loads(done.stdout)["error"]["message"]
    assert not (tmp_path / "ran").exists()


def test_a_base_that_lacks_weights_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    """They would have been drawn at random."""
    holed = copied(base, tmp_path / "holed")
    weights = load_file(holed / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, holed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HubdiffError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        train(holed, data, tmp_path / "tuned")
    with pytest.raises(HubdiffError, match="lacks"):
        hubdiff.connectivity(holed, holed, data=data, points=2)


def test_a_start_from_a_delta_keeps_what_the_dtype_would_round_away(
    base: Path, data: Path, tmp_path: Path
) -> None:
    weights = load_file(base / "model.safetensors")
    master = {name: tensor.float() * (1 + 2**-12) for name, tensor in weights.items()}
    for name, tensors in (("master", master), ("same", weights)):
        folder = copied(base, tmp_path / name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hubdiff.push_delta(
        tmp_path / "same", tmp_path / "delta", base=base, tuned_master=tmp_path / "master"
    )
    train(base, data, tmp_path / "on", "learning_rate=1e-12", "steps=1",
          from_delta=tmp_path / "delta", force=True)  # fmt: skip
    found = load_file(tmp_path / "on/master/model.safetensors")
    assert all(torch.allclose(found[name], master[name], rtol=1e-4) for name in master)
    assert not all(torch.equal(found[name], weights[name].float()) for name in weights)


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_from(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubdiff.lab.training import Trainer

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    step = Trainer.training_step
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(base, data, tmp_path / "x", "save_every=2")
    newest = tmp_path / ".x.hubdiff-training/checkpoints/checkpoint-6"
    (newest / "trainer_state.json").unlink()
    assert train(base, data, tmp_path / "x", "save_every=2").resumed == 4


def test_weights_that_are_no_numbers_are_not_kept(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss may be fine while a gradient is not."""
    from trl import SFTTrainer

    step = SFTTrainer.training_step

    def broken(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 11:
            next(model.parameters()).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", broken)
    with pytest.raises(HubdiffError, match="a weight is no number after 12 steps"):
        train(base, data, tmp_path / "tuned", "save_every=4")
    checkpoints = tmp_path / ".tuned.hubdiff-training/checkpoints"
    kept = {path.name for path in checkpoints.glob("checkpoint-*")}
    assert kept == {"checkpoint-4", "checkpoint-8"}


def test_what_the_run_reads_is_not_overwritten(base: Path, data: Path, tmp_path: Path) -> None:
    mine = copied(base, tmp_path / "base")
    with pytest.raises(HubdiffError, match="lies in"):
        train(mine, data, mine / "tuned")
    output = copied(base, tmp_path / "tuned")
    shutil.copyfile(data, output / "train.jsonl")
    with pytest.raises(HubdiffError, match="which this command reads"):
        train(mine, output / "train.jsonl", output, force=True)
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta/x").write_text("mine")
    with pytest.raises(HubdiffError, match="exists and is not empty"):
        train(mine, data, tmp_path / "new", push_to=tmp_path / "delta")
    assert not (tmp_path / "new").exists()


def test_a_corrected_command_is_not_held_up_by_the_wrong_one(
    base: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n')
    for setting, source in (("seed=1", tmp_path / "bad.jsonl"), ("length=8", data)):
        with pytest.raises(HubdiffError):
            train(base, source, tmp_path / "tuned", setting)
    train(base, data, tmp_path / "tuned")


def test_examples_that_teach_nothing_are_left_out(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 80, "completion": "y"}, {"prompt": "sort ba = ", "completion": "ab"}]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    assert train(base, file, tmp_path / "tuned").examples == 8


def test_one_buffer_in_float32_makes_no_float32_model(
    base: Path, data: Path, tmp_path: Path
) -> None:
    old = copied(base, tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    train(old, data, tmp_path / "tuned")
    found = load_file(tmp_path / "tuned/model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert (tmp_path / "tuned/master").is_dir()


# --- recipes ---


def test_recipes_are_read_and_checked(tmp_path: Path) -> None:
    assert read_recipe() == Recipe()
    file = tmp_path / "my.yaml"
    file.write_text("steps: 5\nlora:\n  rank: 8\n")
    assert read_recipe(file, ["lora.alpha=4", "learning_rate=1e-4"]) == Recipe(
        steps=5, learning_rate=1e-4, lora=Lora(rank=8, alpha=4)
    )
    assert read_recipe(file, ["lora=null"]).lora is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps", "is no setting"),
        ("stepz=3", "has 'stepz'; known are batch"),
        ("steps=many", "is 'many', not int"),
        ("steps=0", "is 0, which makes no sense"),
        ("steps=1.5", "is 1.5, not int"),
        ("learning_rate=.nan", "which makes no sense"),
        ("schedule=step", "not one of linear, cosine, constant"),
        ("packing=1", "is 1, not bool"),
        ("lora=5", "is 5, not Lora or NoneType"),
        ("lora.rank=0", "which makes no sense"),
        ("steps=[", "is not YAML"),
        ("steps=2020-99-99", "is not YAML"),
        ("seed=4294967296", "which makes no sense"),
        ("weight_decay=.nan", "which makes no sense"),
        ("lora.dropout=2", "which makes no sense"),
        ("lora.alpha=0", "which makes no sense"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: str, words: str) -> None:
    with pytest.raises(HubdiffError, match=words):
        read_recipe("paper", [setting])


def test_a_batch_must_divide(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(HubdiffError, match="a batch of 8 does not divide"):
        train(base, data, tmp_path / "x", "micro_batch=3")
