"""Hostile bytes for everything that reads a stranger's delta: only ``HubdiffError`` may come out.

    python tests/fuzz.py --inputs 200000

Each input is a valid one (the golden deltas and blobs, and files made here) with a few mutations:
bytes flipped, cut, repeated or swapped; and in JSON, values replaced by others of any type and
size. The target is drawn for each: the manifest, a safetensors header, the index of a payload, a
blob of every encoding, the sample, the vocabulary. An input is an argument of a function that reads
such bytes, in this process, so 200,000 of them take minutes. Fails on another exception, on an
input that takes longer than ``MOST_SECONDS``, and where the process grows by ``MOST_BYTES``. The
same seed tries the same inputs. Needs Linux for the peak.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hubdiff import sample, vocab
from hubdiff.encodings import ENCODINGS, SEGMENT, tails
from hubdiff.encodings.payload import index_bytes, parse_index
from hubdiff.encodings.tails import Tail
from hubdiff.errors import HubdiffError
from hubdiff.manifest import parse_manifest
from hubdiff.safetensors_io import parse_header

GOLDEN = Path(__file__).parent / "golden"
MOST_SECONDS, MOST_BYTES = 5.0, 300 << 20
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**40, 0.5, -0.0, 1e308, float("inf")),
    *("", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "BF16", "F4", "packed", "low-rank"),
    *([], {}, [[]], [None], {"": None}, [2**40, 2**40], "0" * 64, "f" * 40),
)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few changes to bytes."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(6):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1 if found:
                found[at % len(found)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del found[at:]
            case 3:
                found[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
            case 4:
                del found[at : at + rng.choice((1, 2, 8))]
            case _:
                part = found[at : at + rng.choice((1, 8, 64))]
                found[at:at] = part * rng.choice((1, 2, 9))
    return bytes(found)


def strange(rng: random.Random, document: Any) -> Any:
    """JSON with a few values, keys or list items that are others."""
    found = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 2, 5))):
        holder, key = _somewhere(rng, found)
        if holder is None:
            return rng.choice(ODD)
        match rng.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("", "x", *map(str, holder)))] = holder.pop(key)
            case 2 if isinstance(holder, list):
                holder.insert(rng.randrange(len(holder) + 1), holder[key])
            case _:
                holder[key] = rng.choice((*ODD, *_values(found)[:50]))
    return found


def _somewhere(rng: random.Random, document: Any) -> tuple[Any, Any]:
    """A random place: its holder and its key there."""
    here, place = document, (None, None)
    while isinstance(here, dict | list) and here:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = rng.choice(keys)
        place, here = (here, key), here[key]
        if rng.random() < 0.25:
            break
    return place


def _values(document: Any) -> list[Any]:
    if isinstance(document, dict):
        return [leaf for value in document.values() for leaf in _values(value)]
    if isinstance(document, list):
        return [leaf for value in document for leaf in _values(value)]
    return [document]


def either(rng: random.Random, text: bytes) -> bytes:
    """JSON text with its bytes or its values changed."""
    if rng.random() < 0.3:
        return mutated(rng, text)
    return json.dumps(strange(rng, json.loads(text))).encode()


# --- the targets: a valid input, and what reads it ---

Target = Callable[[random.Random], None]


def _manifests() -> Target:
    texts = [file.read_bytes() for file in sorted(GOLDEN.rglob("hubdiff.json"))]
    assert texts

    def run(rng: random.Random) -> None:
        parse_manifest(either(rng, rng.choice(texts)), "m")

    return run


def _headers() -> Target:
    files = sorted(GOLDEN.rglob("*.safetensors"))
    raws = []
    for file in files:
        data = file.read_bytes()
        raws.append((data[8 : 8 + int.from_bytes(data[:8], "little")], len(data)))

    def run(rng: random.Random) -> None:
        text, size = rng.choice(raws)
        text = either(rng, text)
        length = len(text) if rng.random() < 0.9 else rng.randrange(2**64)
        parse_header(length.to_bytes(8, "little") + text, size, "h")

    return run


def _indices() -> Target:
    def run(rng: random.Random) -> None:
        count, layers = (
            rng.choice((0, 1, SEGMENT, 5 * SEGMENT, 99 * SEGMENT + 1)),
            rng.choice((1, 2)),
        )
        size = index_bytes(count, layers)
        raw = np.random.default_rng(rng.randrange(2**32)).integers(0, 2**32, size // 4, np.uint32)
        if rng.random() < 0.5:
            raw %= 1000
        data = raw.tobytes() if rng.random() < 0.7 else mutated(rng, raw.tobytes())
        blobs = parse_index(data, count, layers, rng.choice((0, size, size + 10**6, 2**40)))
        assert all(blob.size >= 0 for blob in blobs)

    return run


def _blobs() -> Target:
    """Golden blobs, small enough to try many, and what encoders make of drawn units."""
    rng = np.random.default_rng(0)
    cases: list[tuple[str, bytes, int, np.dtype[Any]]] = []
    for name, encoding in ENCODINGS.items():
        for width in sorted(encoding.widths):
            kind = np.dtype(f"<u{width // 8}")
            for count, values in ((1, 4), (300, 3), (300, 2**7), (5000, 40), (5000, 2**7)):
                units = rng.integers(0, values, count).astype(kind)
                cases.append((name, encoding.encode(units), count, kind))
            sparse = np.full(5000, 5, kind)
            sparse[::97] = 9
            cases.append((name, encoding.encode(sparse), 5000, kind))

    def run(random_: random.Random) -> None:
        name, blob, count, kind = random_.choice(cases)
        if random_.random() < 0.1:
            count = random_.choice((0, 1, count - 1, count + 1, 2 * count))
        ENCODINGS[name].decode(mutated(random_, blob), np.empty(count, kind))

    return run


def _tails() -> Target:
    rng = np.random.default_rng(1)
    hi = (0x3800 + rng.integers(0, 700, 5000) * rng.choice((1, 2, 8), 5000)).astype(np.uint16)
    hi[::5] = 0x8000
    cases = []
    for one_in, size in ((3, 10**6), (50, 10**6), (900, 4)):
        elements = np.flatnonzero((rng.integers(0, one_in, 5000) == 0) & (hi != 0x8000))
        patterns = ((hi[elements] - (9 << 7)) & 0x7FC0 | 0x40).astype(np.uint16)
        for dtype in ("BF16", "F16"):
            cases.append((dtype, tails.encode(Tail(elements, patterns), hi, dtype, size)))

    def run(random_: random.Random) -> None:
        dtype, blob = random_.choice(cases)
        tails.decode(mutated(random_, blob), hi, dtype)

    return run


def _samples() -> Target:
    chosen = sample.choose({"a.weight": 9000, "b.weight": 700}, "BF16")
    units = np.arange(chosen.elements, dtype=np.uint16)
    data = sample.encode(chosen, units, units)

    def run(rng: random.Random) -> None:
        sample.decode(chosen, mutated(rng, data), "s")

    return run


def _vocabularies() -> Target:
    packed = vocab.pack(vocab.Vocabulary({f"token {n}": n for n in range(300)}))
    tokenizer = json.dumps(
        {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "c", "id": 2}]}
    ).encode()

    def run(rng: random.Random) -> None:
        if rng.random() < 0.5:
            vocab.unpack(mutated(rng, packed), "v")
        else:
            files = {"tokenizer.json": either(rng, tokenizer)}
            vocab.read_vocabulary(files.get)

    return run


TARGETS: dict[str, Callable[[], Target]] = {
    "manifest": _manifests,
    "header": _headers,
    "index": _indices,
    "blob": _blobs,
    "tail": _tails,
    "sample": _samples,
    "vocabulary": _vocabularies,
}


def fuzz(inputs: int, seed: int, only: str | None = None) -> Counter[str]:
    """How many inputs of each target were refused, and how many were read. Raises what it finds."""
    targets = {name: make() for name, make in TARGETS.items() if only in (None, name)}
    names, found = list(targets), Counter[str]()
    for name in names:  # whatever is compiled or imported late is no part of an input's time
        _try(targets[name], name, random.Random(f"{seed} warm {name}"))
    before = _peak()
    for number in range(inputs):
        name = names[number % len(names)]
        rng = random.Random(f"{seed} {number}")
        began = time.monotonic()
        outcome = _try(targets[name], f"{name}, input {number} of seed {seed}", rng)
        found[f"{name} {outcome}"] += 1
        took = time.monotonic() - began
        if took > MOST_SECONDS:
            raise AssertionError(f"{name}, input {number} of seed {seed}: {took:.1f} s")
    grown = _peak() - before
    if grown > MOST_BYTES:
        raise AssertionError(f"the process grew by {grown / 1e6:.0f} MB")
    return found


def _try(target: Target, what: str, rng: random.Random) -> str:
    try:
        target(rng)
    except HubdiffError:
        return "refused"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return "read"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    options = parser.parse_args()
    began = time.monotonic()
    counts = fuzz(options.inputs, options.seed, options.only)
    for line, count in sorted(counts.items()):
        print(f"{line}: {count:,}")
    print(
        f"{options.inputs:,} inputs, {time.monotonic() - began:.0f} s, peak {_peak() / 1e6:.0f} MB"
    )
    sys.exit(0)
