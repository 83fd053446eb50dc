"""report: what people are told, in a file and in one issue of a stand-in for GitHub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hubdiff.backport import github
from hubdiff.backport.charts import LOOK, picture
from hubdiff.backport.lock import Lock, read_lock
from hubdiff.backport.outcomes import Outcome, merge_outcomes, read_outcomes, read_planned
from hubdiff.backport.report import LABEL, MARK, TITLE, Reported, report
from hubdiff.errors import HubdiffError
from tests.backport_items import leave, leave_done, make_item, published, ran, write_plan
from tests.github_fake import GitHubFake

REPO = "me/models"
ANYBODY = {"user": {"login": "mallory", "type": "User"}, "author_association": "NONE"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GITHUB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")  # nothing is asked of it
    monkeypatch.setattr(github, "WAIT_SECONDS", 0.0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHubFake]:
    with GitHubFake() as fake:
        for name, value in fake.environment().items():
            monkeypatch.setenv(name, value)
        yield fake


class Runs:
    """Runs of the workflow, one after the other, on one lock."""

    def __init__(self, root: Path) -> None:
        self.root, self.lock, self.number = root, root / "hubdiff.lock", 0

    def run(self, *items: Any, adopt: tuple[Any, ...] = (), **how: Any) -> Reported:
        """Items are done, unless their folder is there already."""
        self.number += 1
        results = self.root / "results"
        for item in items:
            if not (results / item.id).exists():
                leave_done(results, item)
        plan = write_plan(self.root / str(self.number), *items, adopt=adopt)
        made = report(plan, results, lock=self.lock, **how)
        planned = read_planned(plan)
        fresh = [one.entry("2026-11-28T07:00:00Z") for one in read_outcomes(planned, results)]
        known = read_lock(self.lock)
        self.lock.write_text(known.after(planned.document, merge_outcomes(known, fresh)).dumps())
        return made


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


# --- the issue ---


def test_one_issue_is_opened_once_and_then_written_anew(hub: GitHubFake, runs: Runs) -> None:
    first = runs.run(make_item(1), issue=REPO)
    assert first.action == "created"
    (issue,) = hub.issues[REPO]
    assert (issue["title"], issue["labels"]) == (TITLE, [{"name": LABEL}])
    assert issue["body"].startswith(MARK)
    assert first.issue == issue["html_url"]
    second = runs.run(make_item(2, base="org/newer"), issue=REPO)
    assert (second.action, second.issue) == ("updated", first.issue)
    (issue,) = hub.issues[REPO]
    assert "`org/newer`" in issue["body"]
    assert "`org/base`" in issue["body"]
    assert (hub.count("POST"), hub.count("PATCH")) == (1, 1)


def test_it_is_left_alone_where_nothing_changed(
    hub: GitHubFake, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.run(make_item(1), issue=REPO)
    body = hub.issues[REPO][0]["body"]
    hub.issues[REPO][0]["body"] = body.replace("\n", "\r\n")  # as the web page sends it back
    assert runs.run(make_item(1), issue=REPO).action == "unchanged"
    monkeypatch.setenv("GITHUB_RUN_ID", "2")
    assert runs.run(issue=REPO).action == "unchanged"
    assert hub.count("PATCH") == 0


def test_no_issue_where_there_is_nothing_to_tell(hub: GitHubFake, runs: Runs) -> None:
    made = runs.run(issue=REPO)
    assert (made.action, made.issue) == (None, None)
    assert hub.issues == {}


def test_a_closed_one_is_opened_again_when_there_is_news(hub: GitHubFake, runs: Runs) -> None:
    runs.run(make_item(1), issue=REPO)
    hub.issues[REPO][0]["state"] = "closed"
    assert runs.run(issue=REPO).action == "unchanged"
    assert hub.issues[REPO][0]["state"] == "closed"
    runs.run(make_item(2), issue=REPO)
    assert hub.issues[REPO][0]["state"] == "open"
    assert len(hub.issues[REPO]) == 1


def test_it_is_found_among_many_also_without_its_label(hub: GitHubFake, runs: Runs) -> None:
    hub.drops_labels = True
    runs.run(make_item(1), issue=REPO)
    for number in range(250):
        hub.add_issue(REPO, body=f"issue {number}", **ANYBODY)
    made = runs.run(make_item(2), issue=REPO)
    assert made.action == "updated"
    assert sum(one["body"].startswith(MARK) for one in hub.issues[REPO]) == 1


def test_it_is_found_among_a_hundred_with_the_label(hub: GitHubFake, runs: Runs) -> None:
    runs.run(make_item(1), issue=REPO)
    for number in range(120):
        hub.add_issue(REPO, body=f"issue {number}", labels=[{"name": LABEL}])
    assert runs.run(make_item(2), issue=REPO).action == "updated"
    pages = [one.query["page"] for one in hub.asked if one.method == "GET"][-2:]
    assert pages == ["1", "2"]


def test_a_stranger_s_issue_is_never_taken_over(hub: GitHubFake, runs: Runs) -> None:
    stranger = hub.add_issue(REPO, body=f"{MARK} 0 -->\nmine", **ANYBODY)
    pull = hub.add_issue(REPO, body=f"{MARK} 0 -->", pull_request={"url": "x"})
    quoted = hub.add_issue(REPO, body=f"quoted: {MARK} 0 -->")
    assert runs.run(make_item(1), issue=REPO).action == "created"
    assert stranger["body"].endswith("mine")
    assert pull["body"] == f"{MARK} 0 -->"
    assert quoted["body"].startswith("quoted")
    assert len(hub.issues[REPO]) == 4


def test_a_lost_answer_opens_no_second_issue(hub: GitHubFake, runs: Runs) -> None:
    hub.fail(502, method="POST", done=True)
    assert runs.run(make_item(1), issue=REPO).action in ("updated", "unchanged")
    assert len(hub.issues[REPO]) == 1


def test_trouble_that_passes_is_waited_for(hub: GitHubFake, runs: Runs) -> None:
    hub.fail(500, times=2, method="GET")
    hub.fail(502, times=1, method="POST", body=b"<html>Bad gateway</html>")
    assert runs.run(make_item(1), issue=REPO).action == "created"
    hub.fail(429, headers={"Retry-After": "0"}, method="PATCH")
    hub.fail(403, headers={"Retry-After": "0"}, method="PATCH")
    hub.fail(200, body=b"not JSON", method="GET")
    assert runs.run(make_item(2), issue=REPO).action == "updated"
    assert len(hub.issues[REPO]) == 1


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "not accepted"), (403, "issues: write"), (404, "OWNER/REPO"), (301, "another name")],
)
def test_a_refusal_says_what_to_do(
    hub: GitHubFake, runs: Runs, status: int, advice: str, tmp_path: Path
) -> None:
    elsewhere = {"Location": f"{hub.url}/elsewhere"} if status == 301 else {}
    hub.fail(status, headers=elsewhere, times=9)
    with pytest.raises(HubdiffError, match=str(status)) as error:
        runs.run(make_item(1), issue=REPO, summary=tmp_path / "summary.md")
    assert advice in str(error.value.next_step)
    assert len(hub.asked) == 1  # nothing is asked again, no redirect is followed
    assert "In this run" in (tmp_path / "summary.md").read_text()


def test_issues_that_are_turned_off(hub: GitHubFake, runs: Runs) -> None:
    hub.issues_disabled = True
    with pytest.raises(HubdiffError, match="has been disabled") as error:
        runs.run(make_item(1), issue=REPO)
    assert "turn them on" in str(error.value.next_step)


def test_a_server_that_stays_down_is_given_up(hub: GitHubFake, runs: Runs) -> None:
    hub.fail(503, times=99)
    with pytest.raises(github.Unavailable, match="503"):
        runs.run(make_item(1), issue=REPO)
    assert len(hub.asked) == 1 + github.RETRIES


def test_nobody_there(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "x")
    monkeypatch.setenv("GITHUB_API_URL", "http://127.0.0.1:9")
    with pytest.raises(github.Unavailable, match="did not answer"):
        runs.run(make_item(1), issue=REPO)


@pytest.mark.parametrize("name", ["me", "me/", "../x", "me/a/b", "me/..", "me/a?b", "me/a b", ""])
def test_only_a_repository_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "x")
    with pytest.raises(HubdiffError, match="no repository"):
        github.GitHub(name)


def test_the_token_is_wanted_and_goes_nowhere_in_the_clear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(HubdiffError, match="GITHUB_TOKEN is not set"):
        github.GitHub(REPO)
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    monkeypatch.setenv("GITHUB_API_URL", "http://api.github.com")
    with pytest.raises(HubdiffError, match="unencrypted"):
        github.GitHub(REPO)


# --- the text ---


def html(text: str) -> str:
    return str(MarkdownIt("gfm-like", {"linkify": False}).render(text))


EVIL = (
    "<img src=x onerror=alert(1)>",
    "--> <script>alert(1)</script>",
    "[click](https://evil.org)",
    "https://evil.org www.evil.org",
    "@octocat see #12, GH-13 and me/models#14",
    "a | b \n# heading\n- list\n```\nfence",
    "`code` ``more`` ```",
    "![x](https://evil.org/pixel.png)",
    "\u202egnp.exe \x1b[31m \u200b",
    "</details>",
    '"; y-axis 0 --> 1',
    "&lt;b&gt; &#64;octocat",
)


@pytest.mark.parametrize("evil", EVIL)
def test_words_of_others_are_shown_and_do_nothing(runs: Runs, tmp_path: Path, evil: str) -> None:
    items = [make_item(n) for n in (1, 2, 3)]
    results = tmp_path / "results"
    leave(results, items[0], result=ran(items[0], status="failed", why=evil))
    leave(results, items[1], result=ran(items[1], status="refused", why=evil))
    check = {"verdict": evil, "why": evil}
    leave(results, items[2], result=ran(items[2], check=check), published=published(items[2]))
    named = make_item(4, family=evil, delta=evil)
    lock = Lock().after({}, [{**Outcome(make_item(5), "failed", evil).entry(evil), "run": evil}])
    runs.lock.write_text(lock.dumps())
    plan = write_plan(tmp_path, *items, named, skipped=[{"base": evil, "why": evil}])
    text = report(plan, results, lock=runs.lock, dry_run=True).text
    shown = html(text)
    for forbidden in ("<img", "<script", 'href="https://evil', "<h1", 'src="'):
        assert forbidden not in shown
    assert shown.count("<h2") == 1
    assert shown.count("<h3") == 3
    assert shown.count("<details>") == shown.count("</details>") == 1
    # Outside code nothing is left that GitHub would make a notice or a link of.
    prose = html_without_code(text)
    for call in ("@octocat", "#12", "#14", "GH-13", "://evil", "www.evil"):
        assert call not in prose
    assert "\x1b" not in text
    assert "\u202e" not in text


def html_without_code(text: str) -> str:
    import re

    return re.sub(r"<code.*?</code>", "", html(text), flags=re.DOTALL)


def test_only_links_that_hubdiff_makes(runs: Runs, tmp_path: Path) -> None:
    entry = Outcome(make_item(1), "done").entry("2026-11-28T07:00:00Z")
    evil = {"pr_url": "https://evil.org/me/x", "url": "javascript:alert(1)"}
    good = {"pr_url": "https://huggingface.co/me/x/discussions/3", "url": None}
    other = Outcome(make_item(2, base="org/newer"), "done").entry("2026-11-28T07:00:00Z")
    lock = Lock().after({}, [{**entry, "output": evil}, {**other, "output": good}])
    runs.lock.write_text(lock.dumps())
    text = report(write_plan(tmp_path), tmp_path / "r", lock=runs.lock, dry_run=True).text
    assert "evil" not in text
    assert "javascript" not in text
    assert "[pull request](https://huggingface.co/me/x/discussions/3)" in text


def test_what_it_says_of_a_run(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("SERVER_URL", "https://github.com"),
        ("REPOSITORY", REPO),
        ("RUN_ID", "7"),
    ):
        monkeypatch.setenv(f"GITHUB_{name}", value)
    good, bad = make_item(1), make_item(2, base="org/base-1.10")
    leave(tmp_path / "results", bad, result=ran(bad, value=0.45))
    text = runs.run(good, bad, adopt=(make_item(3, base="org/base-1.9"),), dry_run=True).text
    head = "[This run](https://github.com/me/models/actions/runs/7): 1 done, 1 rejected, "
    assert f"{head}1 seen for the first time and left alone." in text
    assert "| recycle | `go` | 0.8 | 0.4 ± 0.02 | 0.7 ± 0.02 | passed | [branch](https" in text
    assert "| 0.45 ± 0.02 | refused | – |" in text
    assert "sums is 0.45, and must be 0.5 at least ([run](https://github.com/me/models" in text
    rows = [line.partition(" | ")[0] for line in text.splitlines() if line.startswith("| `org/")]
    assert rows == ["| `org/base`", "| `org/base-1.9`", "| `org/base-1.10`"]


def test_a_summary_is_appended_and_leaves_room(runs: Runs, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    runs.run(make_item(1), summary=summary)
    assert summary.read_text().startswith(f"before\n\n{MARK}")
    summary.write_text("x" * ((1 << 20) - 3000))
    runs.run(*(make_item(n, base=f"org/base-{n}") for n in range(2, 40)), summary=summary)
    assert summary.stat().st_size <= 1 << 20
    summary.write_text("x" * (1 << 20))
    runs.run(make_item(50), summary=summary)
    assert summary.stat().st_size <= (1 << 20) + 1


def test_a_large_run_fits_an_issue_and_says_what_is_left_out(
    hub: GitHubFake, runs: Runs, tmp_path: Path
) -> None:
    items = []
    for family in range(20):
        for delta in range(5):
            for base in range(6):
                number = family * 100 + delta * 10 + base
                name = {"family": f"family-{family}", "delta": f"delta-{delta}"}
                items.append(make_item(number, base=f"org/{'base' * 10}-{base}", **name))
    for item in items[::7]:
        leave(tmp_path / "results", item, result=ran(item, status="failed", why="*" * 500))
    summary = tmp_path / "summary.md"
    made = runs.run(*items, issue=REPO, summary=summary)
    assert made.action == "created"
    (issue,) = hub.issues[REPO]
    assert 1000 < len(issue["body"]) <= 65_536
    assert "more" in issue["body"]
    assert issue["body"].count("```") % 2 == 0
    assert len(issue["body"]) < summary.stat().st_size <= 1 << 20
    assert summary.read_text().count("| `org/base") > 600


def test_a_dry_run_writes_nothing_and_asks_nobody(runs: Runs, tmp_path: Path) -> None:
    made = runs.run(make_item(1), issue=REPO, summary=tmp_path / "s.md", dry_run=True)
    assert made.text.startswith(MARK)
    assert not (tmp_path / "s.md").exists()


# --- pictures ---


def test_a_curve_with_the_base_beside_it() -> None:
    item = make_item(1)
    assert picture(Outcome(item, "done", result=ran(item))) == "\n".join(
        [
            LOOK,
            "xychart-beta",
            '    title "sums: toy/math on org/base"',
            '    x-axis "scale" ["0.6", "0.8", "1"]',
            "    y-axis 0.37 --> 0.73",
            "    line [0.6, 0.7, 0.65]",
            "    line [0.4, 0.4, 0.4]",
        ]
    )


def test_one_scale_is_drawn_as_bars_and_no_numbers_not_at_all() -> None:
    item = make_item(1)
    bars = picture(Outcome(item, "done", result=ran(item, curve=[{"scale": 1.0, "value": 0.7}])))
    assert bars is not None
    assert bars.endswith(
        'x-axis ["base alone", "with the delta"]\n    y-axis 0 --> 0.77\n    bar [0.4, 0.7]'
    )
    assert picture(Outcome(item, "failed")) is None
    assert picture(Outcome(item, "done", result=ran(item, curve=None, scores=None))) is None


NUMBERS = st.floats() | st.integers() | st.none() | st.text() | st.booleans()


@settings(deadline=None)
@given(
    st.text(),
    st.lists(st.fixed_dictionaries({"scale": NUMBERS, "value": NUMBERS}) | NUMBERS),
    st.lists(NUMBERS, min_size=3, max_size=3),
)
def test_a_picture_is_always_one(name: str, curve: list[Any], values: list[Any]) -> None:
    item = make_item(1, family=name, task=name)
    sides = zip(("base", "result", "tuned"), values, strict=True)
    scores = {side: {name: {"value": value}} for side, value in sides}
    drawn = picture(Outcome(item, "done", result=ran(item, curve=curve, scores=scores)))
    if drawn is None:
        return
    look, head, title, x_axis, y_axis, *series = drawn.splitlines()
    assert (look, head) == (LOOK, "xychart-beta")
    for line in (title, x_axis, y_axis):
        assert line.count('"') % 2 == 0
        assert set(line) <= set(map(chr, range(32, 127)))
    count = x_axis.count(",") + 1
    low, high = (float(part) for part in y_axis.strip().removeprefix("y-axis ").split(" --> "))
    for line in series:
        numbers = json.loads(line.partition(" [")[2].join("[]").replace("]]", "]"))
        assert len(numbers) == count
        assert all(low - 1e-6 <= number <= high + 1e-6 for number in numbers)


# --- the command line ---


def test_the_commands(tmp_path: Path, runs: Runs) -> None:
    item = make_item(1)
    leave_done(tmp_path / "results", item)
    plan = write_plan(tmp_path, item)

    def hubdiff(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hubdiff", "backport", *words, str(plan)]
        command += [str(tmp_path / "results"), "--lock", str(runs.lock)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = hubdiff("report")
    assert shown.returncode == 0, shown.stderr
    assert "```mermaid" in shown.stdout
    planned = hubdiff("record", "--dry-run", "--push")
    assert planned.stdout.startswith("hubdiff: record 1 item\n")
    assert "dry run" in planned.stdout
    refused = hubdiff("record", "--json")
    assert refused.returncode == 1
    assert "git repository" in json.loads(refused.stdout)["error"]["message"]
