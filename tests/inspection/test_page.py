"""The page in a real browser: what it shows, that names are text, that it asks for nothing, and how fast it answers."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.browser import EXECUTABLE, Browser
from tests.inspection.hostile import NAMES, hostile_groups
from tests.networks import Attention, Net, Residual, analyzed, image
from torchshear.errors import OutputError
from torchshear.inspection import _page, write_page
from torchshear.inspection._page import render_page

ASSETS = Path(_page.__file__).parent / "assets"

needs_browser = pytest.mark.skipif(EXECUTABLE is None, reason="Chromium is not installed: run `make browser-setup`")


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.norm(self.up(x))))


def deep(depth: int = 55) -> Net:
    """Many blocks in two stages: well over 1,000 nodes."""
    return Net(
        lambda m, x: m.head(m.stages(torch.cat([x, x], 1))),
        stages=nn.Sequential(*(nn.Sequential(*(Block() for _ in range(depth))) for _ in range(2))),
        head=nn.Linear(8, 2),
    )


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a page of each network."""
    folder = tmp_path_factory.mktemp("pages")
    write_page(analyzed(Residual(), image()), folder / "residual.html")
    write_page(analyzed(Attention(), torch.randn(2, 5, 24)), folder / "attention.html")
    write_page(analyzed(nn.Linear(4, 3), torch.randn(2, 4)), folder / "linear.html")
    write_page(analyzed(deep(), torch.randn(2, 4)), folder / "deep.html")
    write_page(hostile_groups(folder), folder / "hostile.html")
    return folder


@pytest.fixture(scope="module", params=["residual", "attention", "linear", "hostile"])
def page(request: pytest.FixtureRequest, pages: Path) -> str:
    return (pages / f"{request.param}.html").read_text(encoding="ascii")


def point_at(browser: Browser, name: str) -> tuple[float, float]:
    """Where a node is on the screen."""
    place = browser.evaluate(f"inspection.place({json.dumps(name)})")
    return place["x"], place["y"]


def is_lit(browser: Browser, name: str) -> bool:
    """Whether the upper canvas, which holds what is pointed at or selected, has the card of a node on it."""
    return browser.evaluate(
        f"(() => {{ const canvas = document.getElementById('overlay'), box = canvas.getBoundingClientRect();"
        f"const place = inspection.place({json.dumps(name)});"
        "return canvas.getContext('2d').getImageData(place.x - box.left, place.y - box.top, 1, 1).data[3] > 0; })()"
    )


def shown(browser: Browser) -> str:
    return browser.text("#panel")


def state(browser: Browser, name: str) -> Any:
    return browser.evaluate(f"inspection.state.{name}")


def test_page_holds_its_parts_and_nothing_from_elsewhere(page: str) -> None:
    assert not re.search(r"(?:src|href|url)\s*[=(]", page.partition('<script id="data"')[0])
    assert len(re.findall(r"<script", page)) == 2
    assert "http" not in page.partition('<script id="data"')[0].replace("http-equiv", "")
    policy = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)[0]
    assert policy.startswith("default-src 'none'; ")
    for kind, pattern in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        (text,) = re.findall(pattern, page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_data_cannot_end_its_element(page: str) -> None:
    text = page.partition('application/json">')[2].partition("</script>")[0]
    assert not set("<>&") & set(text)
    assert data_of(page)["nodes"]


def test_hostile_names_arrive_as_they_are(pages: Path) -> None:
    modules = {node["module"] for node in data_of((pages / "hostile.html").read_text())["nodes"]}
    assert set(NAMES) <= modules


def test_assets_are_short_and_ascii() -> None:
    for file in ASSETS.iterdir():
        assert file.read_text(encoding="ascii").count("\n") <= 400, file.name


def test_page_is_the_same_each_time() -> None:
    groups = analyzed(Residual(), image())
    assert render_page(groups) == render_page(groups)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*missing/page.html.*: No such file"):
        write_page(analyzed(Residual(), image()), tmp_path / "missing" / "page.html")


@needs_browser
@pytest.mark.parametrize("name", ["residual", "attention", "linear", "hostile", "deep"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_without_errors_or_requests(browser: Browser, pages: Path, name: str, scheme: str) -> None:
    browser.prefer(scheme)
    browser.open(pages / f"{name}.html")
    assert browser.failures() == []
    assert browser.requests() == []
    assert browser.evaluate("document.documentElement.dataset.theme") == scheme
    drawn = "new Set(document.getElementById('network').getContext('2d').getImageData(0, 0, 800, 800).data).size"
    assert browser.evaluate(drawn) > 3
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    browser.prefer("light")


@needs_browser
def test_names_are_text_wherever_they_are_shown(browser: Browser, pages: Path) -> None:
    browser.open(pages / "hostile.html")
    for key in ("n",) * 8:
        browser.key(key)
    browser.hover(*point_at(browser, "linear_1"))
    assert "onerror" in browser.text("#tip")
    browser.click(*point_at(browser, "linear"))
    for text in (NAMES[0], "<b>&lt;file.py:"):
        assert text in shown(browser)
    browser.click_on("#search")
    browser.type("<script>")
    assert NAMES[0] in browser.text("#list")
    browser.key("Escape")
    browser.click_on("#tab-fixed")
    assert browser.text("#model") == "</title><script>window['broken']=1</script>"
    assert browser.evaluate("window.broken === undefined && document.querySelectorAll('img, script').length") == 2
    assert browser.failures() == []
    browser.click_on("#tab-groups")


@needs_browser
def test_pointing_shows_a_group_along_the_network(browser: Browser, pages: Path) -> None:
    browser.open(pages / "residual.html")
    assert not browser.evaluate("document.getElementById('network').classList.contains('faded')")
    before = browser.evaluate("document.getElementById('overlay').toDataURL()")
    browser.hover(*point_at(browser, "conv2d_1"))
    assert "one.weight[0] (16)" in browser.text("#tip")
    assert "plain.py:" in browser.text("#tip")
    assert browser.evaluate("document.getElementById('network').classList.contains('faded')")
    assert [is_lit(browser, name) for name in ("conv2d_1", "relu_1", "two_weight", "one_bias")] == [True] * 4
    assert [is_lit(browser, name) for name in ("x", "conv2d", "batch_norm", "linear", "add")] == [False] * 5
    browser.hover(400, 880)
    assert browser.evaluate("document.getElementById('tip').hidden")
    assert browser.evaluate("document.getElementById('overlay').toDataURL()") == before


@needs_browser
def test_click_selects_operator_tensor_and_group(browser: Browser, pages: Path) -> None:
    browser.open(pages / "attention.html")
    browser.click(*point_at(browser, "qkv_weight"))
    text = shown(browser)
    assert "qkv.weight[0]#2" in text
    assert "fixed: model input 'x', dimension 2" in text
    assert state(browser, "group") == 0
    browser.click_on("#panel td .link:nth-of-type(1)")
    browser.click_on("#list [data-key=group-1]")
    assert state(browser, "node") is None
    text = shown(browser)
    for part in (
        "Group 1: 8 units, of which 7 can go",
        "cross-channel:",
        "scaled_dot_product_attention",
        "proj.weight[1]",
        "24, 3 a unit",
    ):
        assert part in text
    assert browser.evaluate("location.hash") == "#level=1&group=1"
    browser.click(400, 880)
    assert state(browser, "group") is None
    assert "Overview" in shown(browser)


@needs_browser
def test_fixed_dimensions_are_listed_with_their_reason(browser: Browser, pages: Path) -> None:
    browser.open(pages / "linear.html")
    assert "No dimension of this network can shrink" in browser.text("#list")
    browser.click_on("#tab-fixed")
    assert "model output 0" in browser.text("#list")
    assert "weight[0]" in browser.text("#list")
    browser.click_on("#list .row")
    assert "fixed:" in shown(browser)


@needs_browser
@pytest.mark.parametrize(
    ("query", "found"),
    [("two.bias", "two.bias"), ("BATCH_norm", "batch_norm"), ("plain.py", "conv2d"), ("one relu", "")],
)
def test_search_finds_names_operators_and_lines(browser: Browser, pages: Path, query: str, found: str) -> None:
    browser.open(pages / "residual.html")
    browser.key("/")
    browser.type(query)
    assert (found or "Nothing has this") in browser.text("#list")
    browser.key("Enter")
    assert (state(browser, "group") is not None) == bool(found)
    browser.key("Escape")
    assert state(browser, "query") == ""


@needs_browser
def test_keys_do_what_the_pointer_does(browser: Browser, pages: Path) -> None:
    browser.open(pages / "deep.html")
    levels = browser.evaluate("inspection.data.levels.length")
    assert levels > 2
    browser.key(str(levels))
    assert state(browser, "level") == levels - 1
    browser.key("1")
    assert state(browser, "level") == 0
    browser.key("n")
    browser.key("n")
    assert state(browser, "group") == 1
    browser.key("p")
    assert state(browser, "group") == 0
    assert "Group 0" in browser.text("#announce")
    browser.key("Escape")
    browser.evaluate("document.getElementById('overlay').focus()")
    browser.key("ArrowDown")
    first = state(browser, "card")
    browser.key("ArrowDown")
    assert state(browser, "card") != first
    while browser.evaluate("inspection.data.levels[0].cards[inspection.state.card].nodes.length") == 1:
        browser.key("ArrowDown")
    browser.key("Enter")
    assert state(browser, "level") == levels - 1
    scale = state(browser, "view.scale")
    browser.key("+")
    assert state(browser, "view.scale") > scale
    browser.key("d")
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    browser.key("/")
    browser.key("ArrowDown")
    browser.key("ArrowDown")
    browser.key("Enter")
    assert browser.evaluate("document.activeElement.className") == "row"
    assert state(browser, "group") == 1
    browser.key("?")
    assert browser.evaluate("document.getElementById('help').open")


@needs_browser
def test_dragging_and_wheel_move_the_view(browser: Browser, pages: Path) -> None:
    browser.open(pages / "deep.html")
    x = state(browser, "view.x")
    browser.mouse("mousePressed", 700, 450, button="left", clickCount=1)
    browser.mouse("mouseMoved", 760, 480, button="left", buttons=1)
    browser.mouse("mouseReleased", 760, 480, button="left", clickCount=1)
    assert state(browser, "view.x") == pytest.approx(x + 60, abs=1)
    assert state(browser, "group") is None
    scale = state(browser, "view.scale")
    browser.mouse("mouseWheel", 700, 450, deltaX=0, deltaY=-120)
    browser.settle()
    assert state(browser, "view.scale") > 1.2 * scale


@needs_browser
def test_address_names_level_group_and_theme(browser: Browser, pages: Path) -> None:
    browser.open(pages / "deep.html", "#level=1&group=2&theme=dark")
    assert (state(browser, "level"), state(browser, "group")) == (0, 2)
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    browser.open(pages / "deep.html", "#level=99&group=-3&theme=pink&x")
    assert state(browser, "group") is None
    assert browser.failures() == []


@needs_browser
def test_narrow_window_keeps_all_parts(browser: Browser, pages: Path) -> None:
    browser.resize(600, 800)
    try:
        browser.open(pages / "residual.html")
        sizes = "['nav', 'main', 'aside'].map((s) => document.querySelector(s).clientHeight)"
        assert min(browser.evaluate(sizes)) > 150
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.resize(1440, 900)


@needs_browser
def test_a_thousand_nodes_answer_at_once(browser: Browser, pages: Path) -> None:
    levels = len(data_of((pages / "deep.html").read_text())["levels"])
    seconds = browser.open(pages / "deep.html", f"#level={levels}")
    assert browser.evaluate("inspection.data.nodes.length") > 1000
    assert seconds < 5
    browser.evaluate(
        "window.took = []; document.addEventListener('pointermove', (e) => requestAnimationFrame("
        "() => setTimeout(() => took.push(performance.now() - e.timeStamp)))); 0"
    )
    for i in range(0, 90, 3):
        browser.hover(*point_at(browser, "linear" if i == 0 else f"linear_{i}"))
    took = sorted(browser.evaluate("took"))
    assert len(took) >= 25
    assert took[len(took) // 2] < 100, "milliseconds from the pointer's move to the picture, median"
