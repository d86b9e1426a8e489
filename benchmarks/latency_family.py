"""Families for several latencies against Torch-Pruning, on digits: accuracy at measured speed, nothing trained.

    make bench-setup
    OMP_NUM_THREADS=1 python benchmarks/latency_family.py [--seeds 5] [--write]

Each seed trains the network of the demo, and `prune_family` makes one member for each target from 256 images without
labels. Torch-Pruning cuts the same network at several ratios by each of four settings (L1, L2 over all layers, Taylor
with labels, Taylor over all layers; widths in multiples of 16), with new statistics of batch norms from the same
images. All networks of a seed are measured in the same rounds. A member is worth as many times the rival's speed as it
is faster than the fastest network of any of the four settings that tells no fewer digits; the dense network counts.
"""

import argparse
import copy
import platform
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import onnxruntime
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchshear
from examples.digits import Digits, DigitsNet, accuracy, fit, load_data
from torchshear.speedup.latency._device import cpu_name

TARGETS: Final = (0.7, 0.5, 0.35, 0.25)
RATIOS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SETTINGS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "L1": ("magnitude", {}),
    "L2, global": ("magnitude", {"global_pruning": True}),
    "Taylor": ("taylor", {}),
    "Taylor, global": ("taylor", {"global_pruning": True}),
}
RESULTS = Path(__file__).with_name("results") / "latency_family.md"


def cut_by_rival(model: nn.Module, data: Digits, ratio: float, kind: str, scope: dict[str, Any]) -> nn.Module:
    """Cut a copy by Torch-Pruning; gradients are those of 256 labelled images."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    importance = tp.importance.GroupTaylorImportance()
    if kind == "magnitude":
        importance = tp.importance.GroupMagnitudeImportance(p=2 if scope else 1)
    else:
        functional.cross_entropy(small(data.train_images[:256]), data.train_labels[:256]).backward()
    pruner = tp.pruner.BasePruner(
        small,
        data.test_images[:2],
        importance=importance,
        pruning_ratio=ratio,
        round_to=16,
        ignored_layers=[small.classifier],
        **scope,
    )
    pruner.step()
    small.zero_grad(set_to_none=True)
    images = [(data.train_images[start : start + 64],) for start in range(0, 256, 64)]
    return torchshear.recalibrate(small.eval(), images, 4, progress=False)


def measure(seed: int) -> dict[str, tuple[float, float]]:
    """Return speed-up and accuracy of every network of a seed, by name."""
    torch.manual_seed(seed)
    data = load_data(seed)
    model, example = DigitsNet(), data.test_images[:1]
    fit(model, data, 7, 3e-3, seed)
    model.eval()
    images = [(data.train_images[start : start + 64],) for start in range(0, 256, 64)]
    family = torchshear.prune_family(
        model, example, targets=TARGETS, data=images, batches=4, compensate="refit", progress=False
    )
    networks = {"dense": model} | {f"ours {t}": family[t].model for t in TARGETS}
    for name, (kind, scope) in SETTINGS.items():
        for ratio in RATIOS:
            networks[f"{name} {ratio}"] = cut_by_rival(model, data, ratio, kind, scope)
    with TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(networks)}
        for name, one in networks.items():
            torchshear.export_onnx(one, paths[name], (example,))
        times = torchshear.compare_latency(paths, rounds=60, progress=False)
    speed = {name: 1.0 if name == "dense" else times.speedup(name) for name in networks}
    right = {name: 100 * accuracy(one, data.test_images, data.test_labels) for name, one in networks.items()}
    return {name: (speed[name], right[name]) for name in networks}


def main() -> None:
    """Measure all seeds, and print or write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(seed) for seed in range(options.seeds)]
    lines = [
        "# A family of latencies against Torch-Pruning",
        "",
        f"`python benchmarks/latency_family.py --seeds {options.seeds} --write`, {cpu_name()}, {platform.machine()}, "
        f"onnxruntime {onnxruntime.__version__}, one thread, a batch of 1. The demo's network on digits, refitted from "
        f"256 images without labels; Torch-Pruning's with new statistics from the same images, the best of four "
        f"settings. Means over {options.seeds} seeds, ranges in brackets. The last column is the speed of a member by "
        f"that of the fastest network of Torch-Pruning that tells no fewer digits.",
        "",
        f"Dense: {_cell([one['dense'][1] for one in found])} per cent of the test digits.",
        "",
        "| target | times faster | per cent right | Torch-Pruning, no slower: per cent right | speed at its accuracy |",
        "|---|---|---|---|---|",
    ]
    for target in TARGETS:
        columns: dict[str, list[float]] = {"speed": [], "right": [], "as fast": [], "worth": []}
        for one in found:
            own_speed, own_right = one[f"ours {target}"]
            rivals = [pair for name, pair in one.items() if not name.startswith("ours")]
            enough = min(own_right, one["dense"][1])
            columns["speed"].append(own_speed)
            columns["right"].append(own_right)
            columns["as fast"].append(max((right for speed, right in rivals if speed >= own_speed), default=0.0))
            columns["worth"].append(own_speed / max(speed for speed, right in rivals if right >= enough))
        cells = [_cell(values, 2 if name in ("speed", "worth") else 1) for name, values in columns.items()]
        lines.append(f"| {target} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        RESULTS.write_text(text)


def _cell(values: list[float], digits: int = 1) -> str:
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
