"""A GPU computes the same bits as the CPU: subnormals, −0.0, NaN payloads and ties included.

The code of the GPU also runs with tensors on the CPU; so these tests hold it where there is none.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

import hubdiff
from hubdiff import merge, numerics, nvcomp
from hubdiff.device import Cpu, Gpu, Work
from hubdiff.encodings import ENCODINGS, SEGMENT, Stream, tails
from hubdiff.encodings._frames import write_varint
from hubdiff.encodings.tails import Tail
from hubdiff.errors import CorruptPayload, RefError
from hubdiff.jobs.merging import choose_device
from hubdiff.manifest import Part
from hubdiff.merge import engine_for
from hubdiff.numerics import DTYPES, Difference
from hubdiff.stream import workers_for

DEVICES = [
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    ),
    pytest.param(
        "mps",
        marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU here"),
    ),
    "cpu",
]


def every_pattern(dtype: str, seed: int) -> torch.Tensor:
    """All 65,536 patterns of a 16-bit dtype, shuffled; as many random ones of float32."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "F32":
        words = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator)
        return words.to(torch.int32).view(torch.float32)
    patterns = torch.arange(-(1 << 15), 1 << 15)[torch.randperm(1 << 16, generator=generator)]
    return patterns.to(torch.int16).view(DTYPES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("delta", ["BF16", "F16"])
def test_a_device_computes_the_bits_of_the_cpu(delta, target, scale, device):
    given, hi = every_pattern(target, 1), every_pattern(delta, 2)
    lo = torch.where(torch.arange(1 << 16) % 50 == 0, every_pattern(delta, 3), 0.0).to(hi.dtype)
    expected = numerics.add(given, Difference(hi, lo), scale, given.dtype)
    there = Difference(hi.to(device), lo.to(device))
    result = numerics.add(given.to(device), there, scale, given.dtype).cpu()
    assert torch.equal(numerics.bits(result), numerics.bits(expected))


def test_auto_is_cuda_where_there_is_one():
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(RefError):
        choose_device(name)


def test_the_cpu_keeps_its_own_way():
    """Where there is no GPU nothing is copied and nothing is decoded otherwise than before."""
    assert engine_for("cpu") is None
    assert isinstance(engine_for("cuda"), Gpu)
    values = np.arange(5, dtype=np.uint8)
    with Cpu().block() as work:
        assert work.bring(values.data).data_ptr() == values.ctypes.data


def test_a_gpu_gets_workers_whatever_the_number_of_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert workers_for(remote=False) == 1
    assert workers_for(remote=False, gpu=True) == 4


# --- decoding: the same bits as numpy's, and the same refusals ---

PLACES = [*DEVICES[:2], pytest.param("cpu", id="the GPU's code on the CPU")]
DTYPE_OF = {1: "U8", 2: "BF16", 4: "F32", 8: "F64"}


def part_of(encoding: str, width: int) -> Part:
    return Part("delta", ("hi",), encoding, DTYPE_OF[width], 0, "")


def both(encoding: str, width: int, blob: bytes, count: int, device: str) -> list[object]:
    """What the CPU and the device make of a blob: bytes, or the words of the refusal."""
    part, view = part_of(encoding, width), memoryview(blob)
    return answers(device, lambda work: work.decode(part, view, count, "here"))


def answers(device: str, make: Callable[[Work], torch.Tensor]) -> list[object]:
    found: list[object] = []
    for engine in (Cpu(), Gpu(device)):
        try:
            with engine.block() as work:
                data = work.send(make(work).view(torch.uint8))
                work.settle()
            found.append(bytes(data))
        except CorruptPayload as error:
            found.append(str(error))
    return found


def symbols(seed: int, count: int, common: float, distinct: int) -> np.ndarray:
    """Symbols as deltas have them: ``common`` of them −0.0, the rest spread unevenly."""
    rng = np.random.default_rng(seed)
    bits = np.minimum(rng.geometric(4 / distinct, count), 0xFFFF).astype(np.uint16)
    bits[rng.random(count) < 0.5] |= 0x8000
    bits[rng.random(count) < common] = 0x8000
    return bits


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("common", [0.0, 0.4, 0.6, 0.97, 0.9995, 1.0])
@pytest.mark.parametrize("distinct", [8, 900, 60_000])
@pytest.mark.parametrize("count", [1, 2, 5000, 100_003])
def test_every_variant_of_packed_is_decoded_alike(common, distinct, count, device):
    bits = symbols(3, count, common, distinct)
    ours, theirs = both("packed", 2, ENCODINGS["packed"].encode(bits), count, device)
    assert ours == theirs == bits.tobytes()


@pytest.mark.parametrize("device", PLACES)
def test_a_whole_segment_is_decoded_alike(device):
    for common in (0.45, 0.9, 0.999):
        bits = symbols(4, SEGMENT, common, 2000)
        ours, theirs = both("packed", 2, ENCODINGS["packed"].encode(bits), SEGMENT, device)
        assert ours == theirs == bits.tobytes()


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("encoding", ["planes", "plain"])
def test_the_other_encodings_are_decoded_alike(encoding, width, device):
    bits = np.random.default_rng(1).integers(0, 1 << 8 * width - 1, 1001, dtype=f"u{width}")
    bits[:500] &= 0xFF
    ours, theirs = both(encoding, width, ENCODINGS[encoding].encode(bits), 1001, device)
    assert ours == theirs == bits.tobytes()
    assert both(encoding, width, ENCODINGS[encoding].encode(bits), 1000, device)[0] != ours


@pytest.mark.parametrize("device", PLACES)
def test_an_encoding_that_can_not_hold_the_dtype_is_refused_alike(device):
    ours, theirs = both("packed", 4, b"\x00\x00\x00", 3, device)
    assert ours == theirs
    assert "can't hold F32" in ours


def raw(data: bytes) -> bytes:
    return write_varint(len(data)) + data


def direct(count: int) -> bytes:
    return b"\x01" + 2 * raw(bytes(range(count)))


def ranks(size: int, content: bytes, escapes: int = 0) -> bytes:
    head = bytes([2, size]) + write_varint(escapes) + raw(content)
    return head + 2 * raw(bytes(range(size))) + (direct(escapes) if escapes else b"")


def gaps(others: int, coarse: bytes, fine_bits: int = 0, fine: bytes = b"") -> bytes:
    head = struct.pack("<BH", 4, 0x8000) + write_varint(others) + bytes([fine_bits])
    head += write_varint(len(coarse) - others) + raw(coarse) + fine
    return head + b"\x01" + 2 * raw(bytes(others))


def bitmap(others: int, marks: bytes) -> bytes:
    head = struct.pack("<BH", 5, 0x8000) + write_varint(others) + raw(marks)
    return head + b"\x01" + 2 * raw(bytes(others))


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (ranks(3, bytes([3]) * 600), "a rank is beyond the table of 3"),
        (ranks(1, bytes([254]) * 600), "a rank is beyond the table of 1"),
        (ranks(0, bytes(600)), "a rank is beyond the table of 0"),
        (ranks(1, bytes(599) + b"\xff"), "1 escapes, 0 are declared"),
        (ranks(1, bytes(600), 1), "0 escapes, 1 are declared"),
        (ranks(1, bytes(598) + b"\xff\xff", 1), "2 escapes, 1 are declared"),
        (b"\x03" + bytes(75) + ranks(3, bytes([3]) * 600), "a rank is beyond the table of 3"),
        (b"\x03" + bytes(75) + b"\x03" + bytes(75), "variant 3"),
        (b"\x03" + bytes(74), "the signs needs 75 bytes"),
        (gaps(1, b"\xff"), "the gaps are not 1"),
        (gaps(1, b"\x00\xff"), "the gaps are not 1"),
        (gaps(1, b"\x00\x00"), "the gaps are not 1"),
        (gaps(2, b"\x00\xff"), "the gaps are not 2"),
        (gaps(1, b"\xff\xff\x5a"), "the gaps reach place 600 of 600"),
        (gaps(1, b"\xfe", 8, b"\x00"), "the gaps reach place 65024 of 600"),
        (bitmap(1, bytes(75)), "the bitmap marks 0 symbols, 1 are declared"),
        (bitmap(2, bytes(74) + b"\x07"), "the bitmap marks 3 symbols, 2 are declared"),
        (bitmap(0, bytes(75)), "the number of others is 0, expected 1 to 600"),
        (b"\x07", "variant 7"),
        (gaps(1, b"\x00") + b"\x00", "1 bytes follow"),
    ],
)
def test_what_is_impossible_is_refused_in_the_same_words(blob, says, device):
    ours, theirs = both("packed", 2, blob, 600, device)
    assert ours == theirs
    assert says in ours


@pytest.mark.parametrize(
    "blob", ["0294000a0000000000000085ff000000", "040080020000018502170001670000"]
)
def test_of_two_faults_the_same_one_is_named(blob):
    ours, theirs = both("packed", 2, bytes.fromhex(blob), 10, "cpu")
    assert ours == theirs
    assert isinstance(ours, str)


@given_any(
    seed=st.integers(0, 1 << 16),
    common=st.sampled_from([0.0, 0.4, 0.7, 0.99, 0.999]),
    flips=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 3),
    encoding=st.sampled_from(["packed", "planes"]),
    stored=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_damage_is_read_alike_or_refused_alike(seed, common, flips, cut, encoding, stored):
    """Blobs without frames reach what lies behind them: no checksum stops the damage before."""
    count = 40 if stored else 4000
    bits = symbols(seed, count, common, 300)
    blob = bytearray(ENCODINGS[encoding].encode(bits))
    for place, value in flips:
        blob[place % len(blob)] = value
    blob = blob[: len(blob) - cut]
    ours, theirs = both(encoding, 2, bytes(blob), count, "cpu")
    assert ours == theirs


# --- tails ---


def tail_of(blob: bytes, hi: np.ndarray, device: str, dtype: str = "BF16") -> list[object]:
    """What the CPU and the device make of a tail, as ``both``."""
    part, view = Part("delta", ("hi", "lo"), "packed", dtype, 0, ""), memoryview(blob)
    return answers(device, lambda work: work.tail(part, view, work.place(hi), "here"))


def differences(seed: int, count: int, unchanged: float, share: float) -> list[np.ndarray]:
    """``hi`` and a ``lo`` of a share of what changed."""
    rng = np.random.default_rng(seed)
    hi, lo = rng.integers(0, 1 << 16, (2, count), np.uint16)
    hi[rng.random(count) < unchanged] = 0x8000
    hi[0], lo[0] = 0x3C01, 0x3401
    lo[1:][(rng.random(count - 1) > share) | (hi[1:] == 0x8000)] = 0
    return [hi, lo]


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("unchanged", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("share", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5000, 100_003])
@pytest.mark.parametrize("stored", [1, 1 << 30])
def test_every_tail_is_decoded_alike(count, share, unchanged, dtype, stored, device):
    hi, lo = differences(5, count, unchanged, share)
    ours, theirs = tail_of(tails.encode(Tail.of(lo), hi, dtype, stored), hi, device, dtype)
    assert ours == theirs == lo.tobytes()


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b"\x03", "there is no variant 3"),
        (b"\x00" + gaps(1, b"\xff\xfe")[3:], "the gaps reach place 509 of 306"),
        (b"\x00\x01\x00\x00" + raw(b"\x10") + b"\x00\x01\x00", "a place has no tail"),
        (b"\x00\x01\x00\x00" + raw(b"\x00") + b"\x00\x00\x00", "a place has no tail"),
        (b"\x01" + gaps(1, b"\xff")[3:], "the gaps are not 1"),
        (b"\x01" + gaps(2, b"\x00\x05")[3:], "the gaps reach place 6 of 6"),
        (b"\x02\x00" + gaps(1, b"\x02")[3:] + b"\x00\x00", "the gaps reach place 2 of 2"),
        (b"\x02\x00\x00" + gaps(1, b"\x00")[3:] + b"\x00", "the gaps reach place 0 of 0"),
    ],
)
def test_an_impossible_tail_is_refused_in_the_same_words(blob, says, device):
    hi = np.array([1, 2, 3, 8, 2, 16, *[0x8000] * 300], np.uint16)
    ours, theirs = tail_of(blob, hi, device)
    assert ours == theirs
    assert says in ours


@given_any(
    seed=st.integers(0, 1 << 16),
    share=st.sampled_from([0.01, 0.5, 1.0]),
    flips=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 3),
    count=st.sampled_from([30, 4000, 9000]),
    stored=st.sampled_from([1, 1 << 30]),
)
@settings(max_examples=100, deadline=None)
def test_a_damaged_tail_is_read_alike_or_refused_alike(seed, share, flips, cut, count, stored):
    hi, lo = differences(seed, count, 0.3, share)
    blob = bytearray(tails.encode(Tail.of(lo), hi, "BF16", stored))
    for place, value in flips:
        blob[place % len(blob)] = value
    ours, theirs = tail_of(bytes(blob[: len(blob) - cut]), hi, "cpu")
    assert ours == theirs


@pytest.mark.parametrize("device", PLACES)
def test_a_tail_of_another_dtype_is_refused_alike(device):
    ours, theirs = tail_of(b"\x00\x00", np.array([1], np.uint32), device, "F32")
    assert ours == theirs
    assert "a tail can't hold F32" in ours


def test_a_wrong_blob_spoils_its_own_block_only():
    good = symbols(1, 600, 0.3, 50)
    engine = Gpu("cpu")
    part, blob = part_of("packed", 2), memoryview(ENCODINGS["packed"].encode(good))
    with engine.block() as work:
        work.decode(part, blob, 600, "the first")
        work.decode(part, memoryview(gaps(1, b"\xff")), 600, "the second")
        with pytest.raises(CorruptPayload, match="the second"):
            work.settle()
    with engine.block() as work:
        again = work.decode(part, blob, 600, "a")
        work.settle()
    assert torch.equal(again, Cpu().decode(part, blob, 600, "a"))


# --- a whole apply ---


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device whose name apply takes; for "cpu" the code of the GPU is run with it."""
    if request.param == "cpu":
        monkeypatch.setattr(merge, "engine_for", Gpu)
    return request.param


def odd_numbers(dtype: torch.dtype, seed: int, count: int = 1 << 15) -> torch.Tensor:
    """Any pattern at all: subnormals, both zeros, NaNs with payloads, infinities."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    signed = {2: torch.int16, 4: torch.int32}[torch.empty(0, dtype=dtype).element_size()]
    values = words.to(signed).view(dtype)
    tame = (torch.randn(count, generator=generator) * 0.02).to(dtype)
    return torch.where(torch.arange(count) % 3 == 0, values, tame)


def odd_model(folder: Path, seed: int, step: float, *, mixed: bool) -> Path:
    """Tensors of three dtypes, all of whose patterns occur, moved by about ``step``."""
    kinds = {"bf": torch.bfloat16, "half": torch.float16, "single": torch.float32}
    tensors = {}
    for index, (name, dtype) in enumerate(kinds.items()):
        if mixed:
            dtype = list(kinds.values())[(index + 1) % 3]
        values = odd_numbers(dtype, seed + index)
        if step:
            generator = torch.Generator().manual_seed(99)
            noise = torch.randn(len(values), generator=generator) * step
            moved = (values.float() + noise).to(dtype)
            moved[::7] = odd_numbers(dtype, seed + 50 + index)[::7]
            same = torch.arange(len(values)) % 2 == 0
            moved[same] = values[same]
            values = moved
        tensors[name] = values.reshape(-1, 64)
    tensors["whole.bias"] = torch.arange(40 + seed % 2) + int(step > 0)
    tensors["none"] = torch.empty(0, 4)
    return models.save(folder, tensors)


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_apply_gives_the_same_files_on_every_device(tmp_path, device, plain):
    base = odd_model(tmp_path / "base", 0, 0.0, mixed=False)
    tuned = odd_model(tmp_path / "tuned", 0, 1e-3, mixed=False)
    targets = {
        "own base": base,
        "other values": odd_model(tmp_path / "values", 20, 0.0, mixed=False),
        "other dtypes": odd_model(tmp_path / "dtypes", 40, 0.0, mixed=True),
    }
    delta = tmp_path / "delta"
    hubdiff.push_delta(tuned, delta, base=base, plain=plain)
    for name, target in targets.items():
        for scale in (1.0, 0.7):
            results = []
            for where in ("cpu", device):
                with pytest.MonkeyPatch.context() as patch:
                    if where == "cpu" and len(results) == 0:
                        patch.setattr(merge, "engine_for", lambda _: Cpu())
                    output = tmp_path / f"{name} {scale} {len(results)}"
                    hubdiff.apply(
                        delta, target, output=output, scale=scale, device=where, force=True
                    )
                results.append(models.hashes(output)["model.safetensors"])
            assert results[0] == results[1], (name, scale)
    assert (
        models.hashes(tmp_path / "own base 1.0 1")["model.safetensors"]
        == (models.hashes(tuned)["model.safetensors"])
    )


def test_a_tensor_of_several_blocks_is_the_same_on_every_device(tmp_path, device):
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(2500, 1200, generator=generator) * 0.02).to(torch.bfloat16)
    base = models.save(tmp_path / "base", {"w": values})
    noise = torch.randn(2500, 1200, generator=generator) * 2e-4
    tuned = models.save(tmp_path / "tuned", {"w": (values.float() + noise).to(torch.bfloat16)})
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    hubdiff.apply(tmp_path / "delta", base, output=tmp_path / "out", device=device)
    name = "model.safetensors"
    assert models.hashes(tmp_path / "out")[name] == models.hashes(tuned)[name]


def test_damage_is_refused_on_every_device(tmp_path, device):
    base = models.save(tmp_path / "base", models.weights())
    tuned = models.save(tmp_path / "tuned", models.moved(models.weights()))
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    (layer,) = (tmp_path / "delta").glob("delta-*.safetensors")
    content = bytearray(layer.read_bytes())
    content[len(content) // 2] ^= 0x10
    layer.write_bytes(content)
    with pytest.raises(hubdiff.HubdiffError):
        hubdiff.apply(tmp_path / "delta", base, output=tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("place", ["cuda", "cuda:0", {"": "cuda:0"}, 0])
def test_load_merges_into_the_memory_of_the_gpu(tmp_path, place):
    base = models.save(tmp_path / "base", models.weights())
    tuned = models.save(tmp_path / "tuned", models.moved(models.weights()))
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    ours = hubdiff.load(tmp_path / "delta", base, device_map=place)
    expected = hubdiff.load(tmp_path / "delta", base, device="cpu")
    assert all(value.device.type == "cuda" for value in ours.state_dict().values())
    for name, value in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name].cpu().view(torch.uint8), value.view(torch.uint8))


def test_what_stays_on_the_device_is_what_would_have_been_written(tmp_path, monkeypatch):
    """load on a GPU: the spans are placed as tensors, and no byte of them is hashed or sent."""
    from hubdiff.device import _GpuWork
    from hubdiff.writer import TensorFile

    base = models.save(tmp_path / "base", models.weights(), shards=2)
    tuned = models.save(tmp_path / "tuned", models.moved(models.weights()), shards=2)
    hubdiff.push_delta(tuned, tmp_path / "delta", base=base)
    monkeypatch.setattr(merge, "engine_for", Gpu)
    monkeypatch.setattr(_GpuWork, "send", None)
    monkeypatch.setattr(TensorFile, "write_at", lambda *_: None)
    state = hubdiff.load(tmp_path / "delta", base).state_dict()
    expected = models.moved(models.weights())
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure, for minutes")
def test_the_benchmark_checks_itself(tmp_path):
    script = Path(__file__).parent / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no CUDA device" in done.stdout
    assert "the right bits" in done.stdout


# --- nvCOMP: its package needs a GPU to do anything ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_nvcomp_decodes_our_frames(monkeypatch):
    monkeypatch.setenv("HUBDIFF_NVCOMP", "1")
    pytest.importorskip("nvidia.nvcomp", reason="nvCOMP is not installed: hubdiff[nvcomp]")
    decode = nvcomp.frame_decoder(torch.device("cuda:0"))
    assert decode is not None
    stream, content = framed(1 << 20)
    body = torch.frombuffer(bytearray(stream.body), dtype=torch.uint8).cuda()
    assert decode(stream, body).cpu().numpy().tobytes() == content


def framed(size: int, declared: int | None = None) -> tuple[Stream, bytes]:
    content = np.random.default_rng(0).geometric(0.3, size).astype(np.uint8).tobytes()
    body = zstandard.ZstdCompressor().compress(content)
    return Stream(declared or size, memoryview(body), "the ranks", "packed"), content


def test_without_nvcomp_frames_are_decoded_on_the_cpu(monkeypatch):
    monkeypatch.setenv("HUBDIFF_NVCOMP", "1")
    monkeypatch.setitem(sys.modules, "nvidia", None)
    assert nvcomp.frame_decoder(torch.device("cuda")) is None
    assert nvcomp.frame_decoder(torch.device("cpu")) is None


def test_nvcomp_has_to_be_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", types.SimpleNamespace(nvcomp=StandIn()))
    assert nvcomp.frame_decoder(torch.device("cuda")) is None
    monkeypatch.setenv("HUBDIFF_NVCOMP", "1")
    assert nvcomp.frame_decoder(torch.device("cuda")) is not None


class StandIn(types.SimpleNamespace):
    """The calls of nvCOMP's Python API that are made, answered by zstandard."""

    BitstreamKind = types.SimpleNamespace(RAW="raw")

    class Codec:
        def __init__(self, **options: object) -> None:
            assert options["algorithm"] == "Zstd"
            assert options["bitstream_kind"] == "raw"
            assert options["uncomp_chunk_size"] == nvcomp.LARGEST

        def decode(self, source: torch.Tensor) -> torch.Tensor:
            try:
                content = zstandard.ZstdDecompressor().decompress(source.numpy().tobytes())
            except zstandard.ZstdError as error:
                raise RuntimeError(str(error)) from error
            return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    @staticmethod
    def as_array(source: torch.Tensor, cuda_stream: int) -> torch.Tensor:
        return source


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> nvcomp.Frames:
    monkeypatch.setattr(nvcomp.Frames, "_stream", lambda self: 0)
    return nvcomp.Frames(StandIn(), torch.device("cpu"))


def test_frames_come_from_the_decoder_of_the_device(frames, monkeypatch):
    monkeypatch.setattr(nvcomp, "frame_decoder", lambda device: frames)
    monkeypatch.setattr(Stream, "_unpacked", None)  # the CPU's own way is shut
    bits = symbols(6, 50_000, 0.4, 500)
    blob = memoryview(ENCODINGS["packed"].encode(bits))
    with Gpu("cpu").block() as work:
        decoded = work.decode(part_of("packed", 2), blob, 50_000, "here")
        work.settle()
    assert decoded.numpy().tobytes() == bits.tobytes()


def test_a_frame_that_is_too_large_for_nvcomp_is_decoded_on_the_cpu(frames, monkeypatch):
    monkeypatch.setattr(nvcomp, "frame_decoder", lambda device: frames)
    monkeypatch.setattr(nvcomp, "LARGEST", 0)
    monkeypatch.setattr(nvcomp.Frames, "__call__", None)
    bits = symbols(6, 50_000, 0.4, 500)
    blob = memoryview(ENCODINGS["packed"].encode(bits))
    with Gpu("cpu").block() as work:
        decoded = work.decode(part_of("packed", 2), blob, 50_000, "here")
        work.settle()
    assert decoded.numpy().tobytes() == bits.tobytes()


def test_a_frame_is_asked_for_its_size_before_it_is_decoded(frames):
    stream, _ = framed(5000, declared=9000)
    with pytest.raises(CorruptPayload, match="holds 5000 bytes, expected 9000"):
        frames(stream, torch.empty(0))


def test_a_frame_that_can_not_be_decoded_is_corrupt(frames):
    stream, _ = framed(5000)
    body = torch.frombuffer(bytearray(stream.body)[:-20], dtype=torch.uint8)
    with pytest.raises(CorruptPayload, match="can't be read"):
        frames(stream, body)
