"""Time to open the page of `torchshear inspect --html` and to answer the pointer: `python benchmarks/page.py`.

Headless Chromium without a GPU, real pointer events; milliseconds from the event to the end of the frame that it
changes.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchshear
from tests.browser import Browser
from tests.zoo.torchvision_models import load_torchvision
from torchshear.inspection import write_page

MOVES = 80
RECORD = (
    "window.took = []; document.addEventListener('pointermove', (e) => requestAnimationFrame("
    "() => setTimeout(() => took.push(performance.now() - e.timeStamp)))); 0"
)
PLACES = (
    "inspection.data.nodes.map((node) => inspection.place(node.name))"
    ".filter((p) => p && p.x > 320 && p.x < 1060 && p.y > 60)"
)


def vision(name: str) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    """A factory of a torchvision model with its input."""
    return lambda: (load_torchvision().models.get_model(name, weights=None).eval(), torch.randn(2, 3, 224, 224))


def measure(browser: Browser, page: Path, n_levels: int) -> tuple[float, float, float]:
    """Seconds to open at the level of operators, median of 5; median and 95th percentile of hovering in ms."""
    seconds = statistics.median(browser.open(page, f"#level={n_levels}") for _ in range(5))
    browser.evaluate(RECORD)
    places = browser.evaluate(PLACES)
    for place in places[:: max(1, len(places) // MOVES)][:MOVES]:
        browser.hover(place["x"], place["y"])
    took = sorted(browser.evaluate("took"))
    return seconds, statistics.median(took), took[int(0.95 * (len(took) - 1))]


def main() -> None:
    """Print one line a model."""
    print(f"{'model':<14}{'nodes':>7}{'page MB':>9}{'write s':>9}{'open s':>8}{'hover ms':>10}{'95 %':>7}")
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(Path(folder) / "profile")
        try:
            for name in ("resnet50", "swin_t", "densenet201"):
                model, x = vision(name)()
                groups = torchshear.analyze(torchshear.trace(model, (x,)))
                page = Path(folder) / f"{name}.html"
                start = time.perf_counter()
                write_page(groups, page)
                wrote = time.perf_counter() - start
                seconds, median, high = measure(browser, page, 9)
                size = page.stat().st_size / 1e6
                print(
                    f"{name:<14}{len(groups.graph):>7}{size:>9.2f}{wrote:>9.2f}{seconds:>8.2f}{median:>10.1f}{high:>7.1f}"
                )
        finally:
            browser.close()


if __name__ == "__main__":
    main()
