"""Accuracy without training: networks of digits and of text, cut and then compensated, over several seeds.

    python benchmarks/compensation.py [--networks cnn vit text] [--seeds 5] [--write]

Each seed trains a network, cuts it by L1, at random and by what remains after a refit, and scores it after the cut,
with new statistics of its batch norms, and refitted from 256 and from 1,024 unlabelled images. Nothing is trained after
the cut. Beside it, where it is installed (`make bench-setup`), Torch-Pruning by L1 with widths in the same multiples:
after the cut, with new statistics, and trained for two epochs with labels.

The third network writes text and is scored by its perplexity (`compensation_of_text.py`). `--write` changes the
sections of the networks that were measured, and no other.
"""

import argparse
import copy
import importlib.util
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import torchshear

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from compensation_of_text import measure_text
from criteria_digits import KINDS
from digits import Digits, accuracy, fit, load_data

# Cut, in words -> what `plan` is asked.
CUTS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "cnn": {
        "50% of the channels": {"ratio": 0.5, "align": 16},
        "75% of the channels": {"ratio": 0.75, "align": 16},
        "87.5% of the channels": {"ratio": 0.875, "align": 8},
        "87.5% of the channels, ranked globally": {"ratio": 0.875, "align": 8, "scope": "global"},
    },
    "vit": {
        "50% of the MACs left": {"target_macs": 0.5},
        "25% of the MACs left": {"target_macs": 0.25},
        "50% left, ranked globally": {"target_macs": 0.5, "scope": "global"},
        "25% left, ranked globally": {"target_macs": 0.25, "scope": "global"},
    },
}
TITLES: Final = {
    "cnn": "The demo's residual CNN",
    "vit": "The vision transformer of `examples/digits_vit.py`",
    "text": "The language model of `examples/language_model.py`: perplexity of a character, less is better",
}
CRITERIA: Final = ("l1", "random", "reconstruction")
RESULTS = Path(__file__).with_name("results") / "compensation.md"
Scores = dict[tuple[str, str], list[float]]


def measure(network: str, seed: int, found: Scores) -> None:
    """Train a network, and score it after each cut and compensation."""
    if network == "text":
        measure_text(seed, lambda row, column, score: found[row, column].append(score))
        return
    torch.manual_seed(seed)
    data, kind = load_data(seed), KINDS[network]
    model = kind.build()
    fit(model, data, kind.n_epochs, kind.learning_rate, seed)
    model.eval()
    images = [(data.train_images[start : start + 64],) for start in range(0, 1024, 64)]

    def score(row: str, column: str, one: nn.Module) -> None:
        found[row, column].append(100 * accuracy(one.eval(), data.test_images, data.test_labels))

    score("dense", "", model)
    graph = torchshear.trace(model, data.test_images[:2])
    groups = torchshear.analyze(graph)
    grams = torchshear.collect(graph, images[:4], batches=4, criteria="reconstruction", progress=False)
    for cut, asked in CUTS[network].items():
        for criterion in CRITERIA:
            plan = torchshear.plan(groups, criterion, statistics=grams, **asked)
            small, row = torchshear.shrink(model, plan), f"{cut}, {criterion}"
            score(row, "after the cut", small)
            if network == "cnn":
                new = torchshear.recalibrate(small, images[:4], 4, progress=False)
                score(row, "new statistics", new)
            for given, column in ((images[:4], "refit, 256 images"), (images, "refit, 1,024 images")):
                score(row, column, torchshear.compensate(model, small, plan, given, batches=len(given), progress=False))
        if network == "cnn" and importlib.util.find_spec("torch_pruning") is not None:
            measure_rival(model, data, cut, asked, images[:4], score)


def measure_rival(
    model: nn.Module, data: Digits, cut: str, asked: dict[str, Any], images: list[Any], score: Any
) -> None:
    """Score what Torch-Pruning makes of a network, before and after two epochs of training with labels."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    pruner = tp.pruner.MagnitudePruner(
        small,
        data.test_images[:2],
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=asked["ratio"],
        round_to=asked["align"],
        ignored_layers=[small.classifier],
    )
    pruner.step()
    row = f"{cut}, Torch-Pruning by L1"
    score(row, "after the cut", small)
    score(row, "new statistics", torchshear.recalibrate(small, images, 4, progress=False))
    fit(small, data, 2, KINDS["cnn"].learning_rate)
    score(row, "two epochs with labels", small)


def section(network: str, seeds: int, found: Scores) -> str:
    """Return means and ranges as a section in Markdown."""
    columns = list(dict.fromkeys(column for _, column in found if column))
    rows = list(dict.fromkeys(row for row, column in found if column))
    digits = 2 if network == "text" else 1
    cells = [[_cell(found.get((row, one), []), digits) for one in columns] for row in rows]
    lines = [
        f"## {TITLES[network]}",
        "",
        f"Dense: {_cell(found['dense', ''], digits)}. `--networks {network} --seeds {seeds}`",
        "",
        "| cut | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [f"| {row} | " + " | ".join(own) + " |" for row, own in zip(rows, cells, strict=True)]
    return "\n".join(lines) + "\n"


def _cell(scores: list[float], digits: int) -> str:
    if not scores:
        return "-"
    return f"{statistics.fmean(scores):.{digits}f} ({min(scores):.{digits}f} to {max(scores):.{digits}f})"


def write(sections: dict[str, str]) -> None:
    """Put sections in the place of those of the same titles, or behind the others."""
    parts = RESULTS.read_text().split("\n## ")
    for network, text in sections.items():
        known = [number for number, part in enumerate(parts) if part.startswith(f"{TITLES[network]}\n")]
        at = slice(known[0], known[0] + 1) if known else slice(len(parts), None)
        parts[at] = [text.removeprefix("## ")]
    RESULTS.write_text("\n## ".join(parts))


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sections = {}
    for network in options.networks:
        found: Scores = defaultdict(list)
        for seed in range(options.seeds):
            measure(network, seed, found)
            sections[network] = section(network, seed + 1, found)
            print(sections[network], flush=True)
    if options.write:
        write(sections)


if __name__ == "__main__":
    main()
