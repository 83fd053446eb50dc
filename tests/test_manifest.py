"""The manifest: JSON ⇄ values, and no field of it trusted unseen."""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from models import moved, save, weights

from hubdiff.errors import BadManifest, NewerFormat
from hubdiff.jobs.push import push_delta
from hubdiff.manifest import manifest_json, parse_manifest
from hubdiff.safetensors_io import MAX_HEADER_BYTES

Document = dict[str, Any]
Trail = tuple[str | int, ...]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A manifest with everything in it: added, removed and unchanged tensors, an exact layer, side
    files, a file that is not carried."""
    import torch

    folder = tmp_path_factory.mktemp("manifest")
    old = {**weights(), "position_ids": torch.arange(8), "gone.weight": torch.ones(3)}
    new = {**moved(old), "score.weight": torch.ones(3, 4)}
    del new["gone.weight"]
    new["position_ids"] = old["position_ids"] + 1
    new["model.norm.weight"] = old["model.norm.weight"].clone()
    old["model.norm.weight"][0], new["model.norm.weight"][0] = 0.0, -0.0
    base = save(folder / "base", old)
    tuned = save(folder / "tuned", new, files={"README.md": "# Tuned", "chat.jinja": "{{ x }}"})
    (tuned / "training_args.bin").write_bytes(b"pickle")
    push_delta(tuned, folder / "delta", base=base)
    return (folder / "delta" / "hubdiff.json").read_bytes()


@pytest.fixture
def document(text: bytes) -> Document:
    loaded: Document = json.loads(text)
    return loaded


def parse(document: Any) -> Any:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_manifest(data, "org/delta/hubdiff.json")


def refused(document: Any, *words: str) -> BadManifest:
    with pytest.raises(BadManifest) as caught:
        parse(document)
    for word in ("org/delta/hubdiff.json", *words):
        assert word in str(caught.value)
    assert caught.value.next_step
    return caught.value


def test_what_is_parsed_prints_the_same_bytes(text: bytes) -> None:
    manifest = parse_manifest(text, "w")
    assert manifest_json(manifest).encode() == text
    assert parse_manifest(manifest_json(manifest).encode(), "w") == manifest


def test_the_fixture_has_every_kind_of_field(document: Document) -> None:
    """Or the tests below would say less than they seem to."""
    groups = {part["group"] for tensor in document["tensors"] for part in tensor["parts"]}
    assert groups == {"delta", "exact"}
    assert {file["source"] for file in document["tuned"]["files"]} == {"weights", "delta", "base"}
    assert document["tuned"]["not_carried"]
    assert document["removed"] == ["gone.weight"]
    assert any(tensor["base_dtype"] is None for tensor in document["tensors"])
    assert any(not tensor["parts"] for tensor in document["tensors"])


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    base, tuned = save(tmp_path / "base", weights()), save(tmp_path / "tuned", moved(weights()))
    for name in ("one", "two"):
        push_delta(tuned, tmp_path / name, base=base)
    for file in sorted(os.listdir(tmp_path / "one")):
        one, two = tmp_path / "one" / file, tmp_path / "two" / file
        # The card of a folder says the folder's name.
        if file != "README.md" and one.is_file():
            assert one.read_bytes() == two.read_bytes(), file


def test_no_path_of_this_machine_is_in_it(text: bytes, tmp_path_factory: Any) -> None:
    assert str(tmp_path_factory.getbasetemp()).encode() not in text


# --- every field ---

# Written for other readers; this one goes by other fields.
DERIVED = {("portable",)}
OPTIONAL = {("sample",), ("same_tokens",)}


def fields(document: Any, trail: Trail = ()) -> Iterator[Trail]:
    """Every field once: of a list, those of the first item that has them."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield (*trail, key)
            yield from fields(value, (*trail, key))
    elif isinstance(document, list):
        seen = set()
        for number, item in enumerate(document):
            for found in fields(item, (*trail, number)):
                if found[len(trail) + 1 :] not in seen:
                    seen.add(found[len(trail) + 1 :])
                    yield found


def holder(document: Any, trail: Trail) -> Any:
    for key in trail[:-1]:
        document = document[key]
    return document


def named(trail: Trail) -> str:
    text = ""
    for key in trail:
        text += f"[{key}]" if isinstance(key, int) else f".{key}"
    return text.lstrip(".")


def free_form(trail: Trail) -> bool:
    """Objects whose keys are data, not fields."""
    free = ("provenance", "aliases", "filters", "policy")
    return (len(trail) > 1 and trail[0] in free) or (len(trail) > 2 and trail[0] == "sample")


def test_every_missing_field_is_named(document: Document) -> None:
    count = 0
    for trail in fields(document):
        if trail in OPTIONAL | DERIVED or free_form(trail) or isinstance(trail[-1], int):
            continue
        damaged = copy.deepcopy(document)
        del holder(damaged, trail)[trail[-1]]
        refused(damaged, repr(named(trail)), "missing")
        count += 1
    assert count > 60


WRONG: list[Any] = [None, True, 0, -1, 1.5, "", "x", [], [1], {}, {"x": 1}, 10**400, "\ud800"]


def test_every_mistyped_field_is_refused_or_of_its_own_type(document: Document) -> None:
    """Each wrong value in each field: BadManifest that names the field, or it was not wrong."""
    refusals = 0
    for trail in fields(document):
        if trail in (*DERIVED, ("format_version",)):
            continue
        right = holder(document, trail)[trail[-1]]
        for value in WRONG:
            damaged = copy.deepcopy(document)
            holder(damaged, trail)[trail[-1]] = value
            try:
                parse(damaged)
            except BadManifest as error:
                refusals += 1
                around = {f"'{named(trail[:n])}'" for n in range(1, len(trail) + 1)}
                inside = {f"'{named(trail)}.", f"'{named(trail)}["}
                if trail[0] == "tensors":  # whose fields must fit each other
                    inside |= {f"'{named(trail[:2])}.", "'sample.blocks."}
                if error.next_step is None or not any(n in str(error) for n in around | inside):
                    pytest.fail(f"{named(trail)} = {value!r}: {error}")
            else:
                same = type(value) is type(right) or {type(value), type(right)} <= {int, float}
                nullable = value is None or right is None
                assert same or nullable, f"{named(trail)} may be {value!r}"
    assert refusals > 600


@pytest.mark.parametrize("bad", [b"NaN", b"Infinity", b"-Infinity", b"-0.5", b"1" + b"0" * 5000])
def test_numbers_are_finite(document: Document, bad: bytes) -> None:
    document["tensors"][0]["delta_norm"] = "here"
    data = json.dumps(document).encode().replace(b'"here"', bad)
    refused(data)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    refused(data)


# --- versions ---


def test_a_newer_format_is_refused_before_anything_else() -> None:
    with pytest.raises(NewerFormat, match=r"hubdiff\.json has format version 2") as caught:
        parse({"format_version": 2, "tensors": "of another shape"})
    assert "pip install --upgrade hubdiff" in str(caught.value.next_step)


@pytest.mark.parametrize("version", [0, -1, "1", True, 1.0, None])
def test_a_version_is_a_whole_number_from_1(document: Document, version: Any) -> None:
    refused({**document, "format_version": version}, "'format_version'")


def test_unknown_fields_are_ignored(document: Document, text: bytes) -> None:
    for trail in [(), *fields(document)]:
        inside = document
        for key in trail:
            inside = inside[key]
        if isinstance(inside, dict) and not free_form((*trail, "x")):
            inside["from the future"] = {"x": [1]}
    assert parse(document) == parse(text)


# --- what a stranger may try ---

UNSAFE = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "..",
    "",
    "a//b",
    "C:/x",
    "a\\b",
    ".git/hooks/x",
    "\0",
]


@pytest.mark.parametrize("path", UNSAFE)
@pytest.mark.parametrize(
    "where",
    [
        ("base", "files"),
        ("base", "side_files"),
        ("tuned", "files"),
        ("layers", "delta"),
        ("layers", "exact"),
        ("side_files",),
    ],
)
def test_unsafe_paths_are_refused(document: Document, where: Trail, path: str) -> None:
    files = holder(document, where)[where[-1]]
    files[-1]["path"] = path
    refused(document, f"{named(where)}[{len(files) - 1}].path")


def test_weights_in_a_folder_are_refused(document: Document) -> None:
    document["tuned"]["files"][0]["path"] = "sub/model.safetensors"
    refused(document, "not at the root")


def test_weights_under_the_name_of_another_file_are_refused(document: Document) -> None:
    document["tuned"]["files"][0]["path"] = "README.md"
    refused(document, "'README.md' is no .safetensors")


@pytest.mark.parametrize("field", ["name", "tuned_name"])
def test_a_tensor_twice_is_refused(document: Document, field: str) -> None:
    document["tensors"][1][field] = document["tensors"][0]["name"]
    refused(document, "two tensors")


def _frame(data: bytes, **options: Any) -> str:
    return base64.b64encode(zstandard.ZstdCompressor(**options).compress(data)).decode()


BOMBS = {
    "a header that unpacks to too much": _frame(bytes(MAX_HEADER_BYTES + 9)),
    "a frame that does not say its size": _frame(bytes(100), write_content_size=False),
    "no frame": base64.b64encode(b"x" * 40).decode(),
    "not base64": "###",
    "a frame cut short": base64.b64encode(
        zstandard.ZstdCompressor().compress(os.urandom(999))[:-9]
    ).decode(),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_header_is_not_unpacked_beyond_its_limit(document: Document, case: str) -> None:
    document["tuned"]["files"][0]["header"] = BOMBS[case]
    refused(document, "tuned.files", "header")


def _tensor(document: Document, **having: Any) -> Document:
    """The first tensor with a part like that."""
    return next(
        tensor
        for tensor in document["tensors"]
        if any(all(part[k] == v for k, v in having.items()) for part in tensor["parts"])
    )


def test_a_shape_larger_than_any_file_is_refused(document: Document) -> None:
    document["tensors"][0]["shape"] = [2**62] * 1000
    refused(document, "tensors[0].shape", "larger than any file")


PARTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "two of one group": ({"group": "delta"}, {"group": "exact", "layers": ["ulp"]}, "parts"),
    "layers of another group": ({"group": "exact"}, {"layers": ["hi", "lo"]}, "layers"),
    "layers unknown": ({"group": "delta"}, {"layers": ["hi", "mid"]}, "layers"),
    "bits of another dtype": ({"layers": ["ulp"]}, {"dtype": "F32"}, "F32 bits of a BF16"),
    "raw bits of another dtype": ({"layers": ["raw"]}, {"dtype": "F64"}, "F64 bits"),
    "a difference in integers": ({"layers": ["hi", "lo"]}, {"dtype": "I16"}, "a difference of"),
    "raw bits instead of a difference": (
        {"layers": ["hi", "lo"]},
        {"layers": ["raw"]},
        "instead of a difference",
    ),
    "a dense tail": (
        {"layers": ["hi", "lo"]},
        {"encoding": "plain"},
        "a tail as plain of BF16",
    ),
    "a tail in float32": (
        {"layers": ["hi", "lo"]},
        {"dtype": "F32"},
        "a tail as packed of F32",
    ),
    "a tail alone": (
        {"layers": ["hi", "lo"]},
        {"group": "tail", "layers": ["lo"]},
        "without the dense",
    ),
    "a correction of an integer": ({"dtype": "I64"}, {"layers": ["ulp"]}, "difference of I64"),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_do_not_fit_their_tensor_are_refused(document: Document, case: str) -> None:
    having, change, words = PARTS[case]
    tensor = _tensor(document, **having)
    part = next(p for p in tensor["parts"] if all(p[k] == v for k, v in having.items()))
    if case == "two of one group":
        tensor["parts"] = [part, {**part}]
    else:
        part.update(change)
    refused(document, words)


@pytest.mark.parametrize("parts", [[], "a difference"])
def test_an_added_tensor_is_there_whole(document: Document, parts: Any) -> None:
    added = next(tensor for tensor in document["tensors"] if tensor["base_dtype"] is None)
    added["parts"] = _tensor(document, layers=["hi", "lo"])["parts"] if parts else []
    refused(document, "it has no base")
