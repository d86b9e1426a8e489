"""Prune a network trained on real digits, and see what each compensation is worth without training.

python examples/after_the_cut.py [--model cnn] [--penalty 0.003] [--criterion l1] [--ratio 0.5] [--seeds 3]
"""

import argparse
import statistics
from collections import defaultdict
from typing import Any

import torch
from criteria_digits import KINDS
from digits import BATCH, Digits, accuracy, fit, load_data
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional

import torchshear

console = Console(highlight=False)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cnn", choices=list(KINDS), help="residual CNN, or vision transformer")
    parser.add_argument("--penalty", type=float, default=3e-3, help="L1 on the scales of norms while training; 0: none")
    parser.add_argument("--criterion", default="l1")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same figures whatever the number of cores
    data = load_data()
    kind = KINDS[options.model]
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in track(range(options.seeds), "training and pruning", console=console, transient=True):
        torch.manual_seed(seed)
        model = kind.build()
        fit(model, data, kind.n_epochs, kind.learning_rate, seed, scale_penalty=options.penalty)
        for name, one in variants(model, data, options.criterion, options.ratio).items():
            found[name].append(score(one, data))
    console.print(table(found, f"{options.criterion}, {options.ratio:.0%} of the channels of each group removed"))


def variants(model: nn.Module, data: Digits, criterion: str, ratio: float) -> dict[str, nn.Module]:
    """The dense model, and the pruned one with and without each compensation."""
    batches = data.train_images.split(BATCH)
    count = len(data.train_images) // BATCH

    def pruned(**words: Any) -> nn.Module:
        return torchshear.prune(model, data.test_images[:2], criterion=criterion, ratio=ratio, **words).model

    def renewed(small: nn.Module) -> nn.Module:
        return torchshear.recalibrate(small, batches, count, progress=False)

    found = {
        "dense": model,
        "pruned": pruned(),
        "+ constants": pruned(compensate="constants"),
        "+ means": pruned(compensate="means", data=batches, batches=count),
        "+ refit": pruned(compensate="refit", data=batches, batches=count),
    }
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return found
    return found | {
        "+ statistics": renewed(found["pruned"]),
        "+ both (constants)": renewed(found["+ constants"]),
        "+ both (means)": renewed(found["+ means"]),
    }


def score(model: nn.Module, data: Digits) -> tuple[float, float]:
    """Accuracy and cross-entropy on the test digits."""
    with torch.no_grad():
        loss = functional.cross_entropy(model.eval()(data.test_images), data.test_labels).item()
    return accuracy(model, data.test_images, data.test_labels), loss


def table(found: dict[str, list[tuple[float, float]]], caption: str) -> Table:
    """Means over the seeds, and the lowest and highest."""
    shown = Table("", title=f"\nTest digits before any fine-tuning: {caption}", title_justify="left")
    for heading in ("accuracy", "range", "loss", "range"):
        shown.add_column(heading, justify="right")
    for name, scores in found.items():
        right, loss = ([score[column] for score in scores] for column in (0, 1))
        shown.add_row(
            name,
            f"{statistics.mean(right):.1%}",
            f"{min(right):.1%} to {max(right):.1%}",
            f"{statistics.mean(loss):.3f}",
            f"{min(loss):.3f} to {max(loss):.3f}",
        )
    return shown


if __name__ == "__main__":
    main()
