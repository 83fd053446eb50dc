from __future__ import annotations

import ast
import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hubdiff import card

RENDERER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
BASE_COMMIT, TUNED_COMMIT, CODE_COMMIT = "a" * 40, "b" * 40, "c" * 40

MANIFEST: dict[str, Any] = {
    "format_version": 1,
    "base": {
        "repo": "org/base-v1",
        "revision": "main",
        "commit": BASE_COMMIT,
        "licence": "llama3.1",
        "gated": True,
        "files": [],
    },
    "tuned": {
        "repo": "me/tuned",
        "commit": TUNED_COMMIT,
        "licence": "apache-2.0",
        "gated": False,
        "files": [{"path": "model.safetensors", "size": 2000, "source": "weights"}],
        "not_carried": [
            {"path": f"onnx/{i}.onnx", "size": 1000, "reason": "another copy (ONNX)"}
            for i in range(7)
        ],
    },
    "portable": True,
    "removed": ["gone"],
    "tensors": [
        {
            "name": "w",
            "shape": [100],
            "dtype": "BF16",
            "base_dtype": "BF16",
            "parts": [{"group": "delta", "encoding": "packed", "bytes": 90}],
            "changed": 60,
            "delta_norm": 0.25,
            "base_norm": 10.0,
        }
    ],
    "layers": {"delta": [{"path": "d", "size": 500}], "exact": []},
    "provenance": {"remote": "https://example.org/code", "commit": CODE_COMMIT, "dirty": True},
}
RECORD: dict[str, Any] = {
    "case": "transfer",
    "scale": 0.5,
    "target": {"repo": "org/base-v2", "commit": "e" * 40, "licence": "llama3.1", "gated": True},
    "deltas": [
        {
            "repo": "me/delta",
            "commit": "d" * 40,
            "weight": 1.0,
            "base": MANIFEST["base"],
            "tuned": MANIFEST["tuned"],
        }
    ],
    "command": ["hubdiff", "apply", "me/delta", "--to", "my base"],
    "side_files": [{"path": "config.json", "source": "merged", "note": "both | changed it"}],
    "left_out": [{"path": "a.gguf", "reason": "another copy of the weights (GGUF)"}],
    "notes": ["rope_theta: target value kept"],
    "added": ["score.weight"],
    "kept": ["lm_head.weight"],
}


def changed(manifest: dict[str, Any], **sides: Any) -> dict[str, Any]:
    """A copy where ``side={...}`` updates a part and any other value replaces it."""
    copied = copy.deepcopy(manifest)
    for name, value in sides.items():
        if isinstance(value, dict) and isinstance(copied.get(name), dict):
            copied[name].update(value)
        else:
            copied[name] = value
    return copied


def delta_card(*given: Any, **more: Any) -> ModelCard:
    """The card as the Hub's client reads it."""
    return ModelCard(card.delta_card(*given, **more))


def result_card(*given: Any, **more: Any) -> ModelCard:
    return ModelCard(card.result_card(*given, **more))


def test_the_hubs_client_reads_the_metadata_as_it_was_meant() -> None:
    for made in (card.delta_card(MANIFEST, repo="me/delta"), card.result_card(RECORD, repo="me/r")):
        read = ModelCard(made)
        assert str(read) == made
        assert read.data.to_dict() == metadata(made)


def metadata(content: str) -> dict[str, Any]:
    _, header, _ = content.split("---\n", 2)
    parsed = yaml.safe_load(header)
    assert isinstance(parsed, dict)
    return parsed


def blocks(content: str, language: str) -> list[str]:
    return [t.content for t in RENDERER.parse(content) if t.type == "fence" and t.info == language]


def test_delta_metadata() -> None:
    facts = {"pipeline_tag": "text-generation", "language": ["en", "no"], "license": "ignored"}
    assert metadata(str(delta_card(MANIFEST, repo="me/delta", tuned_card=facts))) == {
        "base_model": ["org/base-v1"],
        "base_model_relation": "adapter",
        "language": ["en", "no"],
        "library_name": "hubdiff",
        "license": "llama3.1",
        "pipeline_tag": "text-generation",
        "tags": ["hubdiff", "diff-vector", "tuned_model:me/tuned"],
    }


def test_delta_body_has_what_was_measured() -> None:
    text = delta_card(MANIFEST, repo="me/delta", measurements={"Time to make": "3 s"}).text
    for words in (
        "# me/delta",
        f"https://huggingface.co/org/base-v1/tree/{BASE_COMMIT}",
        f"https://huggingface.co/me/tuned/tree/{TUNED_COMMIT}",
        "| Delta / tuned weights | 25 % |",
        "| Elements left as they were | 40 % |",
        "| ‖Δ‖ / ‖base‖ | 2.5 % |",
        "1 changed, 0 unchanged, 0 added, 1 removed",
        "packed (90 bytes)",
        "none needed",
        "| Time to make | 3 s |",
        "](layers.png)",
        "`onnx/4.onnx` and 2 more | 7 kB | another copy (ONNX) |",
        "The strictest is llama3.1. The base is gated",
        f"`https://example.org/code` at commit `{CODE_COMMIT}`, with changes that were not",
    ):
        assert words in text
    assert "More Information Needed" not in text
    assert "None" not in text


def test_usage_can_be_pasted() -> None:
    content = str(delta_card(MANIFEST, repo="me/delta"))
    (shell,) = blocks(content, "sh")
    commands = [shlex.split(line) for line in shell.splitlines()]
    base = f"org/base-v1@{BASE_COMMIT}"
    assert commands == [
        ["pip", "install", "hubdiff"],
        ["hubdiff", "apply", "me/delta", "--to", base, "--output", "./restored"],
    ]
    (python,) = blocks(content, "python")
    call = ast.parse(python).body[-1].value  # type: ignore[attr-defined]
    assert [argument.value for argument in call.args] == ["me/delta", base]


def test_a_folder_has_a_name_and_never_a_repo() -> None:
    local = {"repo": None, "commit": None, "licence": None, "name": "my tune"}
    manifest = changed(MANIFEST, tuned=local, base={**local, "name": "base; rm -rf ~"})
    content = str(delta_card(manifest, repo=None, name="out"))
    assert "base_model" not in metadata(content)
    assert "base_model_relation" not in metadata(content)
    assert "`my tune` (a local folder)" in content
    (shell,) = blocks(content, "sh")
    assert shlex.split(shell.splitlines()[1])[2:5] == ["./out", "--to", "./base; rm -rf ~"]


def test_own_work_in_a_folder_inherits_the_licence_of_its_base() -> None:
    manifest = changed(MANIFEST, tuned={"repo": None, "licence": None, "name": "mine"})
    content = delta_card(manifest, repo="me/delta")
    assert content.data.license == "llama3.1"
    unstated = changed(MANIFEST, tuned={"licence": None})
    assert delta_card(unstated, repo="me/delta").data.license == "unknown"


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("LICENSE", f"https://huggingface.co/org/base-v1/blob/{BASE_COMMIT}/LICENSE"),
        ("https://example.org/terms", "https://example.org/terms"),
        ("javascript:alert(1)", None),
        (None, None),
    ],
)
def test_other_licences_keep_name_and_link(link: str | None, expected: str | None) -> None:
    manifest = changed(MANIFEST, base={"licence": "other"})
    facts = {"license_name": "base-terms", "license_link": link}
    found = metadata(str(delta_card(manifest, repo="me/delta", base_card=facts)))
    assert found["license"] == "other"
    assert found["license_name"] == "base-terms"
    assert found.get("license_link") == expected


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("My Own Terms (v2)!", {"license": "other", "license_name": "my-own-terms-v2"}),
        ("mit-0", {"license": "other", "license_name": "mit-0"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("???", {"license": "other"}),
        ("llama3.3", {"license": "llama3.3"}),
    ],
)
def test_only_a_licence_the_hub_lists_is_stated_by_its_id(
    licence: str, expected: dict[str, str]
) -> None:
    """The Hub refuses any other, and with it a push that took hours."""
    sides = {name: {"repo": None, "licence": licence, "name": "mine"} for name in ("base", "tuned")}
    found = metadata(str(delta_card(changed(MANIFEST, **sides), repo="me/delta")))
    assert {key: found[key] for key in found if key.startswith("license")} == expected
    delta = {**RECORD["deltas"][0], **sides}
    record = changed(RECORD, target=sides["base"], deltas=[delta])
    found = metadata(str(result_card(record, repo="me/result")))
    assert {key: found[key] for key in found if key.startswith("license")} == expected


@pytest.mark.parametrize("portable", [True, False])
def test_a_part_of_a_tune_does_not_promise_the_whole(portable: bool) -> None:
    filters = {"include": ["*.mlp.*", "a`b"], "exclude": ["*.norm.*"]}
    manifest = changed(MANIFEST, filters=filters, portable=portable)
    content = delta_card(manifest, repo="me/delta").content
    for promise in ("tuned model again, every bit", "writes the tuned repo back", "./restored"):
        assert promise not in content
        assert promise in delta_card(MANIFEST, repo="me/delta").content
    assert "--include `*.mlp.*`, ``a`b``" in content
    assert "--exclude `*.norm.*`" in content
    assert "can't give the tuned model again" in content


def test_changes_in_the_checkout_may_be_unknown() -> None:
    provenance = {**MANIFEST["provenance"], "dirty": None}
    assert "not known" in delta_card(changed(MANIFEST, provenance=provenance), repo="me/d").text
    assert "not known" not in delta_card(MANIFEST, repo="me/d").text


def test_a_result_claims_no_more_than_was_done() -> None:
    text = result_card(RECORD, repo="me/result").text
    assert "exact difference" not in text
    assert "the target has none" not in text
    assert "both the tune and the target changed:" not in text


def test_a_delta_for_its_own_base_only_says_so() -> None:
    manifest = changed(MANIFEST, portable=False, not_portable_reason="fp8 weights")
    text = delta_card(manifest, repo="me/delta").text
    assert "It fits no other base: fp8 weights." in text
    assert "carries the tune over" not in text
    assert "Name another base" not in text


def test_optional_parts_are_left_out() -> None:
    manifest = changed(MANIFEST, provenance=None, master=None, tuned={"not_carried": []})
    text = delta_card(manifest, repo="me/delta", picture=None).text
    for words in ("Training code", "does not carry", "layers.png", "master"):
        assert words not in text
    master = {"repo": "me/master", "commit": "f" * 40}
    assert "me/master" in delta_card(changed(MANIFEST, master=master), repo="me/delta").text


@pytest.mark.parametrize("manifest", [{}, {"base": None, "tuned": None, "tensors": None}])
def test_a_sparse_manifest_still_has_a_card(manifest: dict[str, Any]) -> None:
    assert "None" not in delta_card(manifest, repo=None).text
    assert "None" not in result_card(manifest, repo=None).text


def test_result_metadata_and_body() -> None:
    content = str(result_card(RECORD, repo="me/result"))
    assert metadata(content) == {
        "base_model": ["org/base-v2", "me/delta"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "llama3.1",
        "tags": ["hubdiff", "merge"],
    }
    for words in (
        f"https://huggingface.co/org/base-v2/tree/{'e' * 40}",
        f"https://huggingface.co/me/delta/tree/{'d' * 40}",
        "| Scale | 0.5 |",
        "| `config.json` | merged | both \\| changed it |",
        "- rope_theta: target value kept",
        "| `a.gguf` | another copy of the weights (GGUF) |",
        "Tensors taken whole from the delta, which has no difference for them: `score.weight`",
        "kept: `lm_head.weight`",
        "The target and the base of the delta are gated",
    ):
        assert words in content
    (command,) = blocks(content, "sh")
    assert shlex.split(command) == RECORD["command"]


def skeleton(content: str) -> list[str]:
    """What the Markdown is made of: headings, tables, cells, links, HTML. Text is left out."""
    parsed = RENDERER.parse(content.split("---\n", 2)[2])
    kinds = []
    for token in parsed:
        kinds.append(token.type)
        for child in token.children or ():
            if child.type not in ("text", "text_special", "softbreak"):
                kinds.append(f"{child.type} {child.attrGet('href') or child.attrGet('src') or ''}")
    return kinds


HOSTILE = st.text(
    st.sampled_from("`|<>[]()*_#\n\r\\{}%\"'$&-:!~/ ") | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=25,
).map(lambda text: f"x {text} y")


def named(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and the record with ``text`` wherever others choose the words."""
    side = {"repo": text, "commit": text, "licence": "mit", "name": text}
    manifest = changed(
        MANIFEST,
        base=side,
        tuned={**side, "not_carried": [{"path": text, "size": 1, "reason": text}]},
        provenance={"remote": text, "commit": text, "dirty": False},
    )
    manifest["tensors"][0]["parts"][0]["encoding"] = text
    record = changed(
        RECORD,
        deltas=[{**side, "weight": 1.0, "base": side, "tuned": side}],
        target=side,
        command=["hubdiff", text],
        side_files=[{"path": text, "source": "tuned", "note": text}],
        left_out=[{"path": text, "reason": text}],
        notes=[text],
        added=[text],
        kept=[text],
    )
    return manifest, record


@settings(max_examples=60, deadline=None)
@given(HOSTILE)
def test_no_name_can_break_out_of_the_card(text: str) -> None:
    harmless, hostile = named("x plain y"), named(text)
    for make, index in ((delta_card, 0), (result_card, 1)):
        expected = str(make(harmless[index], repo=None, name="x plain y"))  # type: ignore[operator]
        content = str(make(hostile[index], repo=None, name=text))  # type: ignore[operator]
        assert skeleton(content) == skeleton(expected)
        assert metadata(content) == metadata(expected)


@settings(max_examples=60, deadline=None)
@given(HOSTILE)
def test_no_card_of_a_parent_can_break_the_metadata(text: str) -> None:
    manifest = changed(MANIFEST, base={"licence": "other"}, tuned={"licence": text})
    facts = {
        "pipeline_tag": text,
        "language": [text],
        "library_name": text,
        "license_name": text,
        "license_link": text,
    }
    found = metadata(str(delta_card(manifest, repo="me/d", tuned_card=facts, base_card=facts)))
    assert set(found) <= {
        *("base_model", "base_model_relation", "library_name", "tags"),
        *("license", "license_name", "license_link", "language", "pipeline_tag"),
    }
    assert found["library_name"] == "hubdiff"
    assert found["tags"] == ["hubdiff", "diff-vector", "tuned_model:me/tuned"]


def test_jinja_in_a_name_is_only_text() -> None:
    manifest = changed(MANIFEST, tuned={"repo": None, "name": "{{ 7 * 7 }}{% raw %}"})
    assert "`{{ 7 * 7 }}{% raw %}`" in delta_card(manifest, repo="me/delta").text


def test_templates_are_found_in_a_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "{{" in card.template("delta_card.md")
    installed = tmp_path / "site-packages" / "hubdiff"
    (installed / "templates").mkdir(parents=True)
    (installed / "templates" / "delta_card.md").write_text("shipped")
    monkeypatch.setattr(card, "__file__", str(installed / "card.py"))
    assert card.template("delta_card.md") == "shipped"
    with pytest.raises(FileNotFoundError, match=r"result_card\.md"):
        card.template("result_card.md")
