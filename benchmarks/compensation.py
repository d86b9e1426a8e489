"""Accuracy without training: the demo's network on real digits, cut and then compensated, over several seeds.

    python benchmarks/compensation.py [--seeds 5] [--write]

Each seed trains a network, cuts it at three ratios by L1 and at random, and scores it after the cut, with new
statistics of its batch norms, and refitted from 256 and from 1,024 unlabelled images. Nothing is trained after the cut.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch

import torchshear

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from digits import DigitsNet, accuracy, fit, load_data

RATIOS = {0.5: 16, 0.75: 16, 0.875: 8}  # share of the channels removed -> multiple of which widths are
RESULTS = Path(__file__).with_name("results") / "compensation.md"


def measure(seed: int, found: dict[tuple[str, str], list[float]]) -> None:
    """Train a network, and score it after each cut and compensation."""
    torch.manual_seed(seed)
    data = load_data(seed)
    model = DigitsNet()
    fit(model, data, n_epochs=7, learning_rate=3e-3)
    model.eval()
    images = [(data.train_images[start : start + 64],) for start in range(0, 1024, 64)]

    def score(one: torch.nn.Module) -> float:
        return 100 * accuracy(one, data.test_images, data.test_labels)

    found["dense", ""].append(score(model))
    for ratio, align in RATIOS.items():
        for criterion in ("l1", "random"):
            result = torchshear.prune(model, data.test_images[:2], criterion=criterion, ratio=ratio, align=align)
            row = f"{ratio:.1%} of the channels, {criterion}"
            found[row, "after the cut"].append(score(result.model))
            new = torchshear.recalibrate(result.model, images[:4], 4, progress=False)
            found[row, "new statistics"].append(score(new))
            for name, given in (("refit, 256 images", images[:4]), ("refit, 1,024 images", images)):
                small = torchshear.compensate(
                    model, result.model, result.plan, given, batches=len(given), progress=False
                )
                found[row, name].append(score(small))


def table(found: dict[tuple[str, str], list[float]], n_seeds: int) -> str:
    """Return means and ranges as a table in Markdown."""
    columns = list(dict.fromkeys(column for row, column in found if column))
    (dense,) = [scores for (row, _), scores in found.items() if row == "dense"]
    lines = [
        "# Accuracy without training",
        "",
        f"`python benchmarks/compensation.py --seeds {n_seeds} --write`: the demo's residual CNN on real digits, per "
        f"cent of the test images that are right; means over {n_seeds} seeds, ranges in brackets. Nothing is trained "
        f"after the cut, and no labels are used.",
        "",
        f"Dense: {_cell(dense)}.",
        "",
        "| cut | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in dict.fromkeys(row for row, column in found if column):
        lines.append(f"| {row} | " + " | ".join(_cell(found[row, column]) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def _cell(scores: list[float]) -> str:
    return f"{statistics.fmean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(options.seeds):
        measure(seed, found)
        print(table(found, seed + 1), flush=True)
    if options.write:
        RESULTS.write_text(table(found, options.seeds))


if __name__ == "__main__":
    main()
