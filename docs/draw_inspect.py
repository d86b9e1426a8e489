"""Draw the picture of docs/inspect.md: `python docs/draw_inspect.py`; needs Chromium and torchvision."""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchshear
from tests.browser import Browser
from tests.zoo.torchvision_models import load_torchvision
from torchshear.inspection import write_page


def main() -> None:
    """Write docs/images/inspect.png."""
    model = load_torchvision().models.resnet50(weights=None).eval()
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(2, 3, 224, 224),)))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "resnet50.html"
        write_page(groups, page)
        browser = Browser(Path(folder) / "profile", width=1280, height=800)
        try:
            browser.open(page, "#level=3&group=3&theme=light")
            browser.settle()
            browser.picture(Path(__file__).parent / "images" / "inspect.png")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
