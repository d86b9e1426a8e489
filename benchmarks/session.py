"""Overhead of a pruning session: a training step with masks, renewed statistics and regularizers beside a plain one."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear import regularizers, schedules

RESULTS = Path(__file__).parent / "results" / "session.md"


class Block(nn.Module):
    """A residual block of ResNet-18."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.two, self.norm_two = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        is_same = stride == 1 and n_in == n_out
        self.side = (
            nn.Identity() if is_same
            else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions beside the shortcut."""
        y = self.norm_two(self.two(functional.relu(self.norm_one(self.one(x)))))
        return functional.relu(y + self.side(x))


def resnet18(n_classes: int = 1000) -> nn.Module:
    """ResNet-18 (He et al., CVPR 2016), 11.7 M parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    width = 64
    for number, n_out in enumerate((64, 128, 256, 512)):
        layers += [Block(width, n_out, 1 if number == 0 else 2), Block(n_out, n_out, 1)]
        width = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_classes))


KINDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "masks, l1": {},
    "masks, taylor renewed every 4 steps": {"criterion": "taylor", "every": 4},
    "group lasso, taylor renewed every 4 steps": {
        "criterion": "taylor", "every": 4, "regularizer": regularizers.GroupLasso(1e-5),
    },
}  # fmt: skip


def stepper(options: dict[str, Any] | None, size: int, batch: int) -> tuple[Callable[[], float], Any]:
    """Make a function that trains a step and give its seconds."""
    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, target = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    session = None
    if options is not None:
        given = {name: value for name, value in options.items() if name != "every"}
        every = options.get("every", 10_000)
        session = torchshear.PruningSession(
            model, x[:1], optimizer=optimizer, ratio=0.5,
            schedule=schedules.Linear(start=0, end=64 * every, frequency=every, initial=0.0), **given,
        )  # fmt: skip
        session.on_train_begin()
        session.on_epoch_begin(0)

    def plain() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        return time.process_time() - start

    def watched() -> float:
        assert session is not None
        start = time.process_time()
        session.on_step_begin()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), target)
        (loss + session.penalty()).backward()
        session.on_before_optimizer_step()
        optimizer.step()
        session.on_after_optimizer_step()
        session.on_step_end(loss)
        return time.process_time() - start

    return (plain if session is None else watched), session


def measure(size: int, batch: int, rounds: int) -> list[str]:
    """Time all kinds in turn, and give the rows of a table: medians, and the ratio to the plain step round by round."""
    steppers = {name: stepper(options, size, batch)[0] for name, options in KINDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for number in range(rounds + 1):
        for name, one in steppers.items():
            spent = [one() for _ in range(4)]
            if number:
                seconds[name].append(statistics.fmean(spent))
    rows = []
    for name, spent in seconds.items():
        ratios = [one / plain for one, plain in zip(spent, seconds["plain"], strict=True)]
        rows.append(f"| {name} | {1e3 * statistics.median(spent):.0f} | {statistics.median(ratios):.3f} |")
    return rows


def main() -> None:
    """Print the table, or write it beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.size, given.batch, given.rounds)
    text = "\n".join(
        [
            "# Overhead of a pruning session",
            "",
            f"`python benchmarks/session.py --rounds {given.rounds} --batch {given.batch} --size {given.size}`, one "
            f"thread of {platform.processor() or platform.machine()}, torch {torch.__version__}; ResNet-18, batch "
            f"{given.batch}, images of {given.size} x {given.size}. Processor time, medians of "
            f"{given.rounds} rounds; all kinds make four steps in turn in each.",
            "",
            "| training step | ms | times the plain one |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    if given.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
