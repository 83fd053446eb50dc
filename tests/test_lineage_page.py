"""The lineage page in a real browser: it renders, a click works, nothing is complained of.

Needs Chromium and its driver (Debian: ``chromium chromium-driver``); without them these tests are
skipped, in CI they are there. The picture of the page is kept in build/screenshots/.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hubdiff.graph import BASE_OF, DELTA_IN, NEW_VERSION, TARGET_OF, TUNED_OF, Edge, Graph, Node
from hubdiff.lineage_page import lineage_page

PICTURES = Path(__file__).parents[1] / "build" / "screenshots"
COMMIT = "7fd1a60b01f91b314f59955a4e4d4e80d8edf11d"
EVIL = 'org/<img src=x onerror="document.title=1">'


def layers() -> tuple[dict[str, Any], ...]:
    return tuple(
        {"stack": "model", "layer": i, "kind": kind, "relative_norm": (i + 1) / 1000}
        for i in range(24)
        for kind in ("attention", "mlp")
    )


@pytest.fixture(scope="module")
def graph() -> Graph:
    nodes = [
        Node("org/base-v1", "model", commit=COMMIT, licence="llama3", gated=True),
        Node("org/base-v2", "model", commit=COMMIT, licence="llama3.1", gated=True),
        Node("me/tuned", "model", commit=COMMIT, licence="apache-2.0"),
        Node("me/tuned-delta", "delta", numbers={"size": "22 MB"}, layers=layers()),
        Node("me/tuned-v2", "result", numbers={"case": "transfer"}),
        Node(EVIL, "model", problem="there is no repo <b>of that name</b>"),
    ]
    edges = (
        Edge("org/base-v1", "me/tuned", "finetune"),
        Edge("org/base-v1", "me/tuned-delta", BASE_OF, COMMIT),
        Edge("me/tuned", "me/tuned-delta", TUNED_OF, COMMIT),
        Edge("org/base-v1", "org/base-v2", NEW_VERSION),
        Edge("org/base-v2", "me/tuned-v2", TARGET_OF, COMMIT),
        Edge("me/tuned-delta", "me/tuned-v2", DELTA_IN, COMMIT),
        Edge(EVIL, "org/base-v1", "finetune"),
    )
    return Graph("me/tuned-delta", {node.key: node for node in nodes}, edges)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--window-size=1500,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


@pytest.fixture
def page(browser: Any, graph: Graph, tmp_path: Path) -> Any:
    file = tmp_path / "lineage.html"
    file.write_text(lineage_page(graph), encoding="utf-8")
    browser.get_log("browser")
    browser.get(file.as_uri())
    return browser


def node(page: Any, key: str) -> Any:
    found = page.find_elements("css selector", "g.node")
    return next(one for one in found if one.get_attribute("data-key") == key)


def details(page: Any) -> str:
    return str(page.find_element("id", "details").text)


def test_it_renders_a_click_works_and_nothing_is_complained_of(page: Any, graph: Graph) -> None:
    assert len(page.find_elements("css selector", "g.node")) == len(graph.nodes)
    assert len(page.find_elements("css selector", "g.edge")) == len(graph.edges)
    assert details(page).startswith("me/tuned-delta")  # the one that was asked for
    assert "22 MB" in details(page)
    assert len(page.find_elements("css selector", "svg.bars rect")) == 24
    PICTURES.mkdir(parents=True, exist_ok=True)
    assert page.save_screenshot(str(PICTURES / "lineage.png"))

    node(page, "me/tuned-v2").click()
    assert details(page).startswith("me/tuned-v2")
    for text in ("transfer", "target of the result @7fd1a60", "llama3.1", "org/base-v1 (gated)"):
        assert text in details(page)
    chosen = page.find_elements("css selector", "g.node.chosen")
    assert [one.get_attribute("data-key") for one in chosen] == ["me/tuned-v2"]
    page.find_element("xpath", "//aside//button[text()='me/tuned-delta']").click()
    assert details(page).startswith("me/tuned-delta")
    node(page, "org/base-v2").send_keys("\n")
    assert details(page).startswith("org/base-v2")
    assert page.get_log("browser") == []


def test_names_of_strangers_stay_text(page: Any) -> None:
    assert page.title == "Lineage of me/tuned-delta"
    node(page, EVIL).click()
    assert details(page).startswith(EVIL)
    assert "<b>of that name</b>" in details(page)
    assert page.title == "Lineage of me/tuned-delta"
    assert page.find_elements("css selector", "img, b") == []


def test_nothing_is_asked_of_a_network(page: Any) -> None:
    import json

    sent = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in sent), sent
    assert sent


def test_nodes_do_not_lie_on_each_other(page: Any) -> None:
    boxes = [one.rect for one in page.find_elements("css selector", "g.node rect")]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = (
                a["x"] + a["width"] <= b["x"]
                or b["x"] + b["width"] <= a["x"]
                or a["y"] + a["height"] <= b["y"]
                or b["y"] + b["height"] <= a["y"]
            )
            assert apart, (a, b)
