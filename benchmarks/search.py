"""Widths found by searching, beside those of scores alone: best score over evaluations and seconds, on real digits.

python benchmarks/search.py [--network cnn] [--trials 40] [--seeds 0 1 2 3 4] [--budgets 0.5 0.25]
                            [--compensate none refit] [--methods ...] [--write]

A small residual CNN, or a vision transformer, is trained once for each seed. Every method may evaluate as many
candidates as every other, but for "sensitivity", which needs more to end. They are scored by the negative cross-entropy
of half of the test images; the table has the loss and the accuracy of the other half, which no method has seen. Uniform
and milp, the exact allocation by scores, evaluate one candidate; "global" is `torchshear.prune` by the same criterion
with all units ranked together. With --compensate refit each candidate is refitted on training images, without labels.
With --write rows are put among those of benchmarks/results/search-NETWORK.json, in the place of those of the same
method, budget, compensation and seed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear.searching import AMC, NetAdapt, Sensitivity

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

from digits import BATCH, Digits, DigitsNet, fit, load_data  # noqa: E402
from digits_vit import DigitsViT  # noqa: E402

METHODS: dict[str, Any] = {
    "uniform": "uniform",
    "milp": "milp",
    "random": "random",
    "evolution": "evolution",
    "annealing": "annealing",
    "amc": AMC(),
    "netadapt": NetAdapt(step=0.16),
    "sensitivity": Sensitivity(threshold=0.2, step=0.25),
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {  # with epochs of training and learning rate
    "cnn": (lambda: DigitsNet((16, 32, 64), n_blocks=1), 8, 3e-3),
    "vit": (DigitsViT, 60, 2e-3),
}
RESULTS = ROOT / "results"


@dataclass(frozen=True)
class Row:
    """One method on one network at one budget."""

    method: str
    budget: float
    compensate: str
    seed: int
    searched: float
    loss: float
    accuracy: float
    n_trials: int
    seconds: float
    best_after: tuple[tuple[int, float], ...]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="cnn")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(5)])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--compensate", nargs="+", default=["none", "refit"])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "global"])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/search-NETWORK.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / f"search-{options.network}.json"
    known = [Row(**one) for one in json.loads(file.read_text())] if options.write and file.exists() else []
    rows = {(row.budget, row.compensate, row.method, row.seed): row for row in known}
    for row in measure(options):
        rows[row.budget, row.compensate, row.method, row.seed] = row
        print(f"{row.method:12} {row.budget:.0%} {row.compensate:6} seed {row.seed}: loss {row.loss:.4f}, "
              f"accuracy {row.accuracy:.1%}, {row.n_trials} trials, {row.seconds:.0f} s", flush=True)  # fmt: skip
        if options.write:
            file.write_text(json.dumps([asdict(one) for one in rows.values()], indent=1) + "\n", encoding="utf-8")
            file.with_suffix(".md").write_text(table(list(rows.values()), options.network), encoding="utf-8")
    print(table(list(rows.values()), options.network))


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Measure every method on the network of every seed."""
    data = load_data()
    half = len(data.test_labels) // 2
    for seed in options.seeds:
        torch.manual_seed(seed)
        build, n_epochs, rate = NETWORKS[options.network]
        model = build()
        fit(model, data, n_epochs, rate, seed=seed)
        model.eval()
        for compensate in options.compensate:
            for budget in options.budgets:
                for method in options.methods:
                    yield one_row(model, data, half, (method, budget, compensate, seed), options.trials)


def one_row(model: nn.Module, data: Digits, half: int, what: tuple[str, float, str, int], trials: int) -> Row:
    """Search by one method, or prune by ranking all units together, and score on images that were not searched on."""
    method, budget, compensate, seed = what
    example = data.test_images[:2]
    asked: dict[str, Any] = {"target_macs": budget, "progress": False, "compensate": compensate}
    if compensate == "refit":
        images = data.train_images[: 8 * BATCH].split(BATCH)
        asked |= {"data": images, "batches": len(images)}

    def evaluate(small: nn.Module) -> float:
        return -loss_of(small, data.test_images[:half], data.test_labels[:half])

    start = time.perf_counter()
    if method == "global":
        small = torchshear.prune(model, example, scope="global", **asked).model.eval()
        searched, scores = evaluate(small), [(0, True, 0.0)]
    else:
        most = None if method == "sensitivity" else trials
        found = torchshear.search(
            model, example, evaluate=evaluate, method=METHODS[method], trials=most, seed=seed, **asked
        )
        small, searched = found.result.model.eval(), found.best.score or 0.0
        scores = [(one.number, one.is_within, one.score or 0.0) for one in found.trials]
    seconds = time.perf_counter() - start
    images, labels = data.test_images[half:], data.test_labels[half:]
    with torch.no_grad():
        accuracy = float((small(images).argmax(1) == labels).float().mean())
    return Row(
        method, budget, compensate, seed, searched, loss_of(small, images, labels), accuracy, len(scores), seconds,
        tuple(_best_so_far(scores)),
    )  # fmt: skip


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the cross-entropy of a model."""
    with torch.no_grad():
        return float(functional.cross_entropy(model(images), labels))


def _best_so_far(scores: list[tuple[int, bool, float]]) -> Iterator[tuple[int, float]]:
    best: float | None = None
    for number, is_within, score in scores:
        if is_within and (best is None or score > best):
            best = score
            yield number, score


def table(rows: list[Row], network: str) -> str:
    """Return the means over seeds as a table in Markdown, from the best method at the top of each part."""
    lines = [
        f"`python benchmarks/search.py --network {network} --write`: means over {len({row.seed for row in rows})} "
        f"seeds, with standard deviations; the best method first in each part.",
        "",
        "| MACs | compensation | method | loss searched on | loss, other images | accuracy | evaluations | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    parts: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault((-row.budget, row.compensate, row.method), []).append(row)
    for key, here in sorted(parts.items(), key=lambda part: (part[0][:2], fmean(row.loss for row in part[1]))):
        lines.append(
            f"| {-key[0]:.0%} | {key[1]} | {key[2]} | {_mean([-row.searched for row in here])} | "
            f"{_mean([row.loss for row in here])} | {_mean([row.accuracy * 100 for row in here], 1)} % | "
            f"{fmean(row.n_trials for row in here):.0f} | {fmean(row.seconds for row in here):.0f} |"
        )
    return "\n".join([*lines, ""])


def _mean(values: list[float], digits: int = 3) -> str:
    spread = f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
