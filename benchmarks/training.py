"""Methods that prune during training, beside one cut with a refit and the same epochs of fine-tuning, on real digits.

python benchmarks/training.py [--network cnn] [--ratio 0.875] [--epochs 8] [--seeds 5] [--methods ...] [--write]

A residual CNN is trained for 8 epochs, or a vision transformer for 60. Each method then has 8 epochs more, or 20, with
one cycle of the learning rate, and ends with the same share of each group's channels, so at the same parameters and
MACs: an eighth of the CNN's channels, half of the transformer's. Controls: one cut by L1, at random, and with the
reconstruction criterion and a refit, each followed by all these epochs; and a network of these widths that is trained
from scratch for both trainings' epochs. Lottery tickets need rounds: each has its share of both trainings' epochs.
Reported is the accuracy on images that nothing was trained on, in the mean over seeds with standard deviations, and the
seconds of the second training.
"""

import argparse
import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

from digits import BATCH, Digits, DigitsNet, accuracy, fit, load_data  # noqa: E402
from digits_vit import DigitsViT  # noqa: E402
from training_digits import train_pruned  # noqa: E402

import torchshear  # noqa: E402
from torchshear.compat.unipruning import UniPruner  # noqa: E402
from torchshear.pruners.regularizers import ADMM, GroupLasso, GrowingL2, ScaleL1  # noqa: E402
from torchshear.pruners.schedules import AGP, Linear, OneShot  # noqa: E402
from torchshear.training import LotteryTicket, prune_in_rounds  # noqa: E402

RESULTS = ROOT / "results"
ROUNDS = 4


@dataclass(frozen=True)
class Network:
    """A network, and how it is trained where nothing else is asked for.

    Attributes:
        build: makes the untrained network.
        n_dense: epochs of the first training.
        dense_rate: highest learning rate of it.
        n_epochs: epochs of the second training.
        rate: highest learning rate of that.
        ratio: share of each group's channels that goes.
    """

    build: Callable[[], nn.Module]
    n_dense: int
    dense_rate: float
    n_epochs: int
    rate: float
    ratio: float


NETWORKS = {
    "cnn": Network(lambda: DigitsNet((32, 64, 128)), 8, 3e-3, 8, 3e-3, 0.875),
    "vit": Network(DigitsViT, 60, 2e-3, 20, 1e-3, 0.5),
}


@dataclass(frozen=True)
class Setting:
    """What every method of one seed begins with.

    Attributes:
        dense: the trained network, which no method changes.
        data: the digits.
        ratio: share of each group's channels that goes.
        n_epochs: epochs of the second training.
        seed: of everything random.
        network: how the network is made and trained.
    """

    dense: nn.Module
    data: Digits
    ratio: float
    n_epochs: int
    seed: int
    network: Network

    @property
    def example(self) -> torch.Tensor:
        """Two images."""
        return self.data.test_images[:2]

    @property
    def rate(self) -> float:
        """Highest learning rate of the second training."""
        return self.network.rate

    def tuned(self, model: nn.Module, n_epochs: int | None = None, rate: float | None = None) -> nn.Module:
        """Train a model on."""
        fit(model, self.data, n_epochs or self.n_epochs, rate or self.rate, self.seed + 1)
        return model


@dataclass(frozen=True)
class Row:
    """One method on one network."""

    method: str
    seed: int
    accuracy: float
    n_params: int
    seconds: float


def one_shot(setting: Setting, **words: Any) -> nn.Module:
    """Cut at once, and train on."""
    images = setting.data.train_images[: 16 * BATCH].split(BATCH)
    if words.get("compensate") == "refit":
        words |= {"data": images, "batches": len(images)}
    small = torchshear.prune(setting.dense, setting.example, ratio=setting.ratio, progress=False, **words).model
    return setting.tuned(small)


def narrow(setting: Setting) -> nn.Module:
    """Train the small network from scratch."""
    torch.manual_seed(setting.seed + 100)
    dense = setting.network.build().eval()
    small = torchshear.prune(dense, setting.example, ratio=setting.ratio, progress=False).model
    return setting.tuned(small, setting.network.n_dense + setting.n_epochs, setting.network.dense_rate)


def by_session(setting: Setting, schedule: Callable[[int], Any], **words: Any) -> nn.Module:
    """Prune while training."""
    model = copy.deepcopy(setting.dense)

    def make(optimizer: torch.optim.Optimizer, n_steps: int) -> torchshear.PruningSession:
        return torchshear.PruningSession(
            model, setting.example, ratio=setting.ratio, schedule=schedule(n_steps), optimizer=optimizer, **words
        )

    result = train_pruned(setting.data, model, setting.n_epochs, setting.rate, setting.seed + 1, make)
    assert result.verification.max_error < 1e-9
    return result.model


def lottery(setting: Setting) -> nn.Module:
    """Train in rounds, and go back to the start with ever fewer channels."""
    torch.manual_seed(setting.seed)
    model, n_all = setting.network.build(), setting.network.n_dense + setting.n_epochs
    ticket = LotteryTicket(model, setting.example, ratio=setting.ratio, rounds=ROUNDS)
    for _ in ticket.rounds():
        setting.tuned(model.train(), max(1, n_all // (ROUNDS + 1)), setting.network.dense_rate)
    return ticket.finish().model


def in_rounds(setting: Setting) -> nn.Module:
    """Cut for real in rounds, and train on between them."""
    share = max(1, setting.n_epochs // ROUNDS)
    found = prune_in_rounds(
        setting.dense,
        setting.example,
        tasks=AGP(end=ROUNDS, by="event"),
        ratio=setting.ratio,
        fine_tune=lambda model: setting.tuned(model.train(), share),
    )
    return found.result.model


def unipruning(setting: Setting) -> nn.Module:
    """Zero the channels that weigh least after every epoch of the first half, network-wide."""
    model = copy.deepcopy(setting.dense)
    dense = sum(one.numel() for one in model.parameters())
    small = torchshear.prune(model, setting.example, ratio=setting.ratio, progress=False).model
    kept = sum(one.numel() for one in small.parameters()) / dense
    pruner = UniPruner({"target_sparsity": kept, "frequency": 2, "pruning_step": 1, "filter_lower_threshold": 4,
                        "input_size": [2, 1, 8, 8], "output_path": "out/unipruning", "exp_name": "digits"})  # fmt: skip
    pruner.apply(model)
    (callback,) = pruner.callbacks()
    callback.on_train_begin()
    for epoch in range(setting.n_epochs):
        callback.on_epoch_begin(epoch)
        fit(model, setting.data, 1, setting.rate / 3, setting.seed + 1 + epoch)
        model.train()
        callback.on_epoch_end()
    callback.on_train_end()
    return pruner.convert().model


METHODS: dict[str, Callable[[Setting], nn.Module]] = {
    "one cut by L1": lambda s: one_shot(s, criterion="l1"),
    "one cut at random": lambda s: one_shot(s, criterion="random"),
    "one cut, refit": lambda s: one_shot(s, compensate="refit"),
    "narrow from scratch": narrow,
    "AGP, L1": lambda s: by_session(s, lambda n: AGP(end=n // 2, frequency=n // 12)),
    "AGP, taylor": lambda s: by_session(
        s, lambda n: AGP(start=1, end=1 + n // 2, frequency=n // 12), criterion="taylor"
    ),
    "AGP, taylor, shrinking": lambda s: by_session(
        s, lambda n: AGP(start=1, end=1 + n // 2, frequency=n // 12), criterion="taylor", shrink_every=1
    ),
    "AGP, L1, soft": lambda s: by_session(s, lambda n: AGP(end=n // 2, frequency=n // 12), soft=True),
    "linear, L1": lambda s: by_session(s, lambda n: Linear(end=n // 2, frequency=n // 12)),
    "group lasso": lambda s: by_session(s, lambda n: OneShot(at=n // 2), criterion="l2", regularizer=GroupLasso(1e-3)),
    "scales of norms": lambda s: by_session(
        s, lambda n: OneShot(at=n // 2), criterion="bn_scale", regularizer=ScaleL1(3e-3)
    ),
    "growing L2": lambda s: by_session(
        s, lambda n: OneShot(at=n // 2), criterion="l1", regularizer=GrowingL2(1e-3, every=5)
    ),
    "ADMM": lambda s: by_session(
        s, lambda n: OneShot(at=n // 2), criterion="l2", regularizer=ADMM(0.002, every=10, growth=1.3)
    ),
    "UniPruning": unipruning,
    "rounds": in_rounds,
    "lottery": lottery,
}
OF_CNN = ("scales of norms", "UniPruning")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Measure every method on the network of every seed."""
    data, network = load_data(), NETWORKS[options.network]
    names = options.methods or [name for name in METHODS if options.network == "cnn" or name not in OF_CNN]
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        dense = network.build()
        fit(dense, data, network.n_dense, network.dense_rate, seed)
        setting = Setting(dense, data, options.ratio, options.epochs, seed, network)
        yield _row("dense", dense, setting, 0.0)
        for name in names:
            torch.manual_seed(seed)
            start = time.perf_counter()
            small = METHODS[name](setting)
            yield _row(name, small, setting, time.perf_counter() - start)


def _row(method: str, model: nn.Module, setting: Setting, seconds: float) -> Row:
    right = accuracy(model.eval(), setting.data.test_images, setting.data.test_labels)
    return Row(method, setting.seed, right, sum(one.numel() for one in model.parameters()), seconds)


def table(rows: list[Row], options: argparse.Namespace) -> str:
    """Return the means over seeds as a table in Markdown."""
    lines = [
        f"`python benchmarks/training.py --network {options.network} --ratio {options.ratio} --epochs {options.epochs} "
        f"--seeds {options.seeds}`: {options.ratio:.1%} of each group's channels go; means over {options.seeds} seeds, "
        f"with standard deviations.",
        "",
        "| method | accuracy | parameters | seconds |",
        "|---|---|---|---|",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        here = [row for row in rows if row.method == method]
        spread = f" ±{100 * stdev(row.accuracy for row in here):.1f}" if len(here) > 1 else ""
        lines.append(
            f"| {method} | {100 * fmean(row.accuracy for row in here):.1f}{spread} | "
            f"{fmean(row.n_params for row in here):,.0f} | {fmean(row.seconds for row in here):.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="cnn")
    parser.add_argument("--ratio", type=float, help="default: 0.875 of the CNN, 0.5 of the transformer")
    parser.add_argument(
        "--epochs", type=int, help="of the second training; default: 8 of the CNN, 20 of the transformer"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/training-NETWORK.md and .json")
    options = parser.parse_args()
    options.ratio = NETWORKS[options.network].ratio if options.ratio is None else options.ratio
    options.epochs = options.epochs or NETWORKS[options.network].n_epochs
    torch.set_num_threads(1)
    logging.getLogger("torchshear").setLevel(logging.ERROR)  # no word on speed: widths are what matters here
    rows: list[Row] = []
    for row in measure(options):
        rows.append(row)
        print(f"seed {row.seed}: {row.method:24} {row.accuracy:.1%}, {row.n_params:,} parameters, {row.seconds:.0f} s",
              flush=True)  # fmt: skip
    text = table(rows, options)
    print(text)
    if options.write:
        stem = RESULTS / f"training-{options.network}"
        stem.with_suffix(".md").write_text(f"# Pruning while training\n\n{text}", encoding="utf-8")
        stem.with_suffix(".json").write_text(
            json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
