"""load: which class is made, what is refused, and how long the temporary folder lives."""

from __future__ import annotations

import builtins
import gc
import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as serialize

import hubdiff
from hubdiff.errors import CheckpointError, HubdiffError, IntegrityError
from hubdiff.safetensors_io import parse_header
from hubdiff.writer import OutputFile, TensorFile


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A delta and its base. Temporary folders are made in ``tmp_path / "temporary"``."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return make_pair(tmp_path)


def make_pair(folder: Path, **config: Any) -> tuple[Path, Path]:
    base = models.save(folder / "base", models.weights(), **config)
    tuned = models.save(folder / "tuned", models.moved(models.weights()), **config)
    hubdiff.push_delta(tuned, folder / "delta", base=base)
    return folder / "delta", base


def left_over(folder: Path) -> list[Path]:
    return list((folder / "temporary").glob("hubdiff-*"))


def test_the_model_is_loaded_and_the_folder_is_gone(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    model = hubdiff.load(*pair, dtype=torch.bfloat16)
    expected = models.moved(models.weights())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(model.state_dict()["lm_head.weight"], expected["lm_head.weight"])
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("model_type", ["llama", "custom"])
def test_code_that_comes_with_a_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Nor is anybody asked whether to run it."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig\nclass C(LlamaConfig):\n"
    code += "    model_type = 'custom'\n"
    delta, base = make_pair(
        tmp_path,
        files={"own.py": code},
        model_type=model_type,
        auto_map={"AutoConfig": "own.C"},
    )
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    if model_type == "llama":
        hubdiff.load(delta, base)
    else:
        with pytest.raises(CheckpointError, match="custom code"):
            hubdiff.load(delta, base)
    assert not ran.exists()


def test_trust_remote_code_is_refused_before_the_work(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(HubdiffError, match="trust_remote_code"):
        hubdiff.load(*pair, trust_remote_code=True)
    assert left_over(tmp_path) == []
    assert hubdiff.load(*pair, trust_remote_code=False) is not None


def test_device_map_without_accelerate_says_what_to_install(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr("hubdiff.jobs.load.find_spec", lambda name: None)
    with pytest.raises(HubdiffError, match="accelerate") as caught:
        hubdiff.load(*pair, device_map="auto")
    assert "pip install accelerate" in (caught.value.next_step or "")


@pytest.mark.parametrize(
    "architectures",
    [["utils"], ["AutoTokenizer"], ["AutoModel"], "LlamaForCausalLM", [1], [], ["Nothing"]],
)
def test_an_architecture_that_is_no_model_is_refused(tmp_path: Path, architectures: object) -> None:
    delta, base = make_pair(tmp_path, architectures=architectures)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hubdiff.load(delta, base)


@pytest.mark.parametrize(
    "changes", [{"model_type": None}, {"hidden_size": "wide"}, {"num_attention_heads": 0}]
)
def test_a_config_of_nonsense_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    delta, base = make_pair(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hubdiff.load(delta, base)


def test_no_config_of_the_callers_is_the_results(pair: tuple[Path, Path]) -> None:
    """None is the default of from_pretrained itself: it asks nobody on the network."""
    assert same_bits(hubdiff.load(*pair, config=None), hubdiff.load(*pair))


def test_no_config_is_refused(tmp_path: Path) -> None:
    base = models.save(tmp_path / "base", models.weights())
    tuned = models.save(tmp_path / "tuned", models.moved(models.weights()))
    for folder in (base, tuned):
        (folder / "config.json").unlink()
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hubdiff.load(tmp_path / "delta", base)


def test_weights_left_on_the_disk_live_as_long_as_the_model(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate leaves on the disk is read from the folder at every step."""
    import transformers

    original = transformers.LlamaForCausalLM.from_pretrained.__func__

    def offloading(cls: type, *args: Any, **kwargs: Any) -> Any:
        model = original(cls, *args, **kwargs)
        model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
        return model

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", classmethod(offloading))
    model = hubdiff.load(*pair, device_map="auto")
    (folder,) = left_over(tmp_path)
    assert json.loads((folder / "model" / "config.json").read_text())
    del model
    gc.collect()
    assert left_over(tmp_path) == []


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files that hubdiff opens for writing."""
    names: list[str] = []
    original = OutputFile.__init__

    def recording(self: OutputFile, path: Path, size: int) -> None:
        names.append(path.name)
        original(self, path, size)

    monkeypatch.setattr(OutputFile, "__init__", recording)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


def same_bits(model: Any, other: Any) -> bool:
    """Every parameter and buffer, by name, dtype and bits."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))
        for name in ours
    )


@pytest.mark.parametrize("onto", ["own base", "sibling"])
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"dtype": "auto"},
        {"dtype": torch.float32},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_it_is_the_model_that_apply_and_from_pretrained_give(
    tmp_path: Path, written: list[str], wanted: dict[str, Any], onto: str
) -> None:
    delta, base = make_pair(tmp_path)
    target = base
    if onto == "sibling":
        target = models.save(tmp_path / "next", models.weights(seed=5), shards=2)
    hubdiff.apply(delta, target, output=tmp_path / "folder", force=True)
    written.clear()
    model = hubdiff.load(delta, target, **wanted)
    assert set(written) <= {"config.json", "generation_config.json"}
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "folder", **wanted)
    assert same_bits(model, expected)
    assert model.config.to_dict() == {
        **expected.config.to_dict(),
        "_name_or_path": model.config.to_dict()["_name_or_path"],
    }
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    tensors = models.weights()
    del tensors["lm_head.weight"]
    base = models.save(tmp_path / "base", tensors, tie_word_embeddings=True)
    tuned = models.save(tmp_path / "tuned", models.moved(tensors), tie_word_embeddings=True)
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    model = hubdiff.load(tmp_path / "delta", base)
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()
    assert torch.equal(embedding, models.moved(tensors)["model.embed_tokens.weight"])


def test_shards_that_did_not_change_come_too(tmp_path: Path, written: list[str]) -> None:
    """On the own base and in a transfer they are files taken whole, not merged tensors."""
    tensors = models.weights()
    tuned = models.moved(tensors)
    names = list(tensors)
    tuned |= {name: tensors[name] for name in names[::2]}  # all of the first shard
    base_folder = models.save(tmp_path / "base", tensors, shards=2)
    tuned_folder = models.save(tmp_path / "tuned", tuned, shards=2)
    hubdiff.push_delta(tuned_folder, tmp_path / "delta", base=base_folder)
    other = models.weights(seed=8)
    for target in (base_folder, models.save(tmp_path / "next", other, shards=2)):
        written.clear()
        state = hubdiff.load(tmp_path / "delta", target).state_dict()
        assert not any(name.endswith(".safetensors") for name in written)
        kept = tensors if target == base_folder else other
        assert all(torch.equal(state[name], kept[name]) for name in names[::2])
        assert not torch.equal(state[names[1]], kept[names[1]])


def test_an_unchanged_shard_of_another_name_comes_too(tmp_path: Path, put_repo: Any) -> None:
    """Only the Hub lists the hashes by which a rebuild knows it without reading it."""
    tensors = models.weights()
    tuned = models.moved(tensors)
    tuned |= {name: tensors[name] for name in list(tensors)[::2]}
    base = models.save(tmp_path / "base", tensors, shards=2)
    folder = models.save(tmp_path / "tuned", tuned, shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-0", "other-0"))
    for file in folder.glob("model-0*"):
        file.rename(file.with_name(file.name.replace("model-0", "other-0")))
    hubdiff.push_delta(folder, tmp_path / "delta", base=base)
    repo = put_repo(contents(base))
    dry = hubdiff.apply(tmp_path / "delta", repo, output=tmp_path / "out", dry_run=True)
    copied = [file["path"] for file in dry.plan["files"] if file["action"] == "copy from target"]
    assert "other-00001-of-00002.safetensors" in copied
    state = hubdiff.load(tmp_path / "delta", repo).state_dict()
    assert all(torch.equal(state[name], tuned[name]) for name in tuned)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 2000), max_size=6), seed=st.integers(0, 99))
def test_a_file_in_memory_takes_its_bytes_in_any_pieces_and_order(
    cuts: list[int], seed: int
) -> None:
    tensors = {
        "a": torch.arange(60, dtype=torch.float64).reshape(3, 20),
        "b": torch.randn(7, 11).to(torch.bfloat16),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int32),
        "flags": torch.arange(9) % 2 == 0,
    }
    data = serialize(tensors)
    length = 8 + int.from_bytes(data[:8], "little")
    header = parse_header(data[:length], len(data), "here")
    file = TensorFile(header, torch.device("cpu"))
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    pieces = list(itertools.pairwise(edges))
    random.Random(seed).shuffle(pieces)
    for begin, end in pieces:
        file.write_at(begin, bytearray(data[begin:end]))
    assert file.tensors.keys() == tensors.keys()
    assert all(torch.equal(file.tensors[name], tensors[name]) for name in tensors)


def test_transformers_does_not_reserve_the_memory_twice(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would, on a GPU, before it sees that the weights lie there already."""
    reserved: list[int] = []

    def warmup(*args: Any) -> None:
        reserved.append(1)

    monkeypatch.setattr(transformers.modeling_utils, "caching_allocator_warmup", warmup)
    hubdiff.load(*pair, device_map="cpu")
    assert reserved == []
    assert transformers.modeling_utils.caching_allocator_warmup is warmup


def test_from_the_hub(tmp_path: Path, put_repo: Any, written: list[str]) -> None:
    delta, base = make_pair(tmp_path)
    repos = put_repo(contents(delta)), put_repo(contents(base))
    written.clear()
    model = hubdiff.load(*repos)
    assert not any(name.endswith(".safetensors") for name in written)
    expected = load_file(tmp_path / "tuned" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)


def test_a_fused_layout_of_transformers_is_made_from_the_tensors(tmp_path: Path) -> None:
    """Mixtral's experts are one tensor each on disk and one for all in the class."""
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        num_local_experts=2,
        vocab_size=64,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert any(".experts.1." in name for name in tensors)
    tuned = models.save(tmp_path / "tuned", models.moved(tensors))
    (tuned / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    hubdiff.push_delta(tuned, tmp_path / "delta", base=tmp_path / "base")
    model = hubdiff.load(tmp_path / "delta", tmp_path / "base")
    assert same_bits(model, transformers.MixtralForCausalLM.from_pretrained(tuned))


def test_damage_raises_and_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    delta, base = pair
    (file,) = delta.glob("delta-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(HubdiffError):
        hubdiff.load(delta, base)
    assert left_over(tmp_path) == []


def test_a_rebuild_that_is_not_the_tuned_file_is_refused(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No damage to the input could get this far: the arithmetic itself is made wrong."""
    from hubdiff import kernels

    original = kernels.add

    def wrong(target: np.ndarray, hi: np.ndarray, out: np.ndarray) -> bool:
        numbers = original(target, hi, out)
        out ^= 1
        return bool(numbers)

    monkeypatch.setattr(kernels, "add", wrong)
    with pytest.raises(IntegrityError, match="rebuilt"):
        hubdiff.load(*pair, device="cpu")


def test_a_base_that_only_looks_like_the_own_base_becomes_a_transfer(tmp_path: Path) -> None:
    delta, _ = make_pair(tmp_path)
    tensors = models.weights()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1  # behind the probe
    sibling = models.save(tmp_path / "sibling", tensors)
    hubdiff.apply(delta, sibling, output=tmp_path / "folder", force=True)
    expected = load_file(tmp_path / "folder" / "model.safetensors")
    state = hubdiff.load(delta, sibling).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


_MEASURED = """
import json, re, resource, sys
from pathlib import Path
import torch
import hubdiff

def memory(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

# No file may grow beyond this, and a larger write ends the process.
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
torch.set_num_threads(1)
hubdiff.load(*sys.argv[1:3])  # all that is loaded and allocated once
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
model = hubdiff.load(*sys.argv[3:5])
after = memory("VmHWM")
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps([size, after - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_model_lies_in_memory_once_and_on_no_disk(tmp_path: Path) -> None:
    rows, hidden = 40_000, 2048
    big = {"hidden_size": hidden, "vocab_size": rows, "num_hidden_layers": 0}
    tensors = {
        "model.embed_tokens.weight": torch.full((rows, hidden), 0.5, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": torch.full((rows, hidden), 0.25, dtype=torch.bfloat16),
    }
    base = models.save(tmp_path / "large" / "base", tensors, **big)
    tensors["lm_head.weight"][::100] = 0.375
    tuned = models.save(tmp_path / "large" / "tuned", tensors, **big)
    hubdiff.push_delta(tuned, tmp_path / "large" / "delta", base=base)
    (tmp_path / "small").mkdir()
    pairs = [*make_pair(tmp_path / "small"), tmp_path / "large" / "delta", base]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *map(str, pairs)],
        capture_output=True,
        text=True,
        check=True,
    )
    size, more = json.loads(done.stdout.splitlines()[-1])
    assert size > 300e6
    assert more < size + 200e6  # the model once, and the blocks in flight
