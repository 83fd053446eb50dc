from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hubdiff import markdown

RENDERER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NASTY = st.text(
    st.sampled_from("\\`*_{}[]()<>#+-.!|~$&=:@/1 a\n\r\t\"'\u2028\u202e\x00") | st.characters(),
    max_size=30,
)
PLAIN = {"text", "softbreak"}


def inline(source: str) -> list[Token]:
    """The inline tokens of a source that must be one paragraph."""
    tokens = RENDERER.parse(source)
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    return tokens[1].children or []


def squeezed(value: str) -> str:
    return "".join(value.split())


@given(NASTY)
@example("1. one")
@example("# title")
@example("- item")
@example("===")
@example("[a](https://b)")
@example("<script>alert(1)</script>")
@example("&lt;b&gt;")
def test_text_is_only_text(value: str) -> None:
    shown = markdown.text(value)
    if not shown:
        return
    tokens = inline(shown)
    assert {token.type for token in tokens} <= {"text", "text_special"}
    assert squeezed("".join(t.content for t in tokens)) == squeezed(markdown.one_line(value))


@given(NASTY)
def test_text_stays_in_its_table_cell(value: str) -> None:
    html = RENDERER.render(f"| a | b |\n|---|---|\n| {markdown.text(value)} | x |\n")
    assert html.count("<td") == 2
    assert "<td>x</td>" in html  # a cell too many would push it out of the row
    html = RENDERER.render(f"| a | b |\n|---|---|\n| {markdown.code(value)} | x |\n")
    assert html.count("<td") == 2
    assert "<td>x</td>" in html  # a cell too many would push it out of the row


@given(NASTY)
@example("`")
@example("``a`")
@example("|")
def test_code_is_only_code(value: str) -> None:
    tokens = inline(markdown.code(value))
    if markdown.one_line(value):
        assert [token.type for token in tokens] == ["code_inline"]
        shown = tokens[0].content.replace("\\|", "|")
        assert squeezed(shown) == squeezed(markdown.one_line(value))


@given(NASTY)
@example("```\n# out")
def test_a_block_can_not_be_left(value: str) -> None:
    tokens = RENDERER.parse(markdown.block(value, "sh"))
    assert [token.type for token in tokens] == ["fence"]


@pytest.mark.parametrize(
    "value", ["org/my_model-v1.5", "Qwen/Qwen2.5-0.5B", "another copy of the weights (ONNX)", "0.8"]
)
def test_ordinary_words_stay_as_they_are(value: str) -> None:
    assert markdown.text(value) == value
    assert markdown.code(value) == f"`{value}`"


def test_links_go_only_to_repos() -> None:
    commit = "a" * 40
    assert markdown.repo_link("org/x", commit) == (
        f"[`org/x`](https://huggingface.co/org/x/tree/{commit}) at commit `{'a' * 12}`"
    )
    assert markdown.repo_link("org/x", "main) [y](z") == "[`org/x`](https://huggingface.co/org/x)"
    for hostile in ("a/b/c", "../x", "a b", "org/x\n", "a](https://evil)", "", "é/x"):
        assert markdown.repo_link(hostile, commit) == markdown.code(hostile)
        assert not markdown.is_repo_id(hostile)
