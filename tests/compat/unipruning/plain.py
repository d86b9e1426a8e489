"""A network of two stages, and UniPruning's definition for it with plain lists."""

from statistics import median

import torch
from torch import Tensor, nn

STEP = 4


class Stages(nn.Module):
    """Two stages with batch norms, the second residual, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 20, 3, bias=False)
        self.norm_one = nn.BatchNorm2d(20)
        self.two = nn.Conv2d(20, 24, 3, padding=1)
        self.norm_two = nn.BatchNorm2d(24)
        self.three = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_one(self.one(x)))
        x = torch.relu(self.norm_two(self.two(x)))
        x = x + self.three(x)
        return self.head(x.mean((2, 3)))


def n_params(one: int, two: int) -> int:
    return 27 * one + 2 * one + 9 * one * two + 3 * two + 9 * two * two + two + 5 * two + 5


def reference(model: nn.Module, share: float, use_gamma: bool, floor: int) -> dict[str, list[int]]:
    """The definition with plain lists: layers "one"; and "two" and "three", which are coupled."""

    def norms(layer: nn.Module, norm: nn.Module | None) -> list[float]:
        rows = layer.weight.detach().double().flatten(1).norm(dim=1)
        return (rows * norm.weight.detach().double().abs() if norm is not None and use_gamma else rows).tolist()

    importance = {
        "one": [norms(model.one, model.norm_one)],
        "two": [norms(model.two, model.norm_two), norms(model.three, None)],
    }
    left = {"one": set(range(20)), "two": set(range(24))}
    while n_params(len(left["one"]), len(left["two"])) > share * n_params(20, 24):
        best, where, gone = -1.0, "", []
        for name, layers in importance.items():
            if len(left[name]) - STEP < max(floor, STEP):
                continue
            for layer in layers:
                order = sorted(left[name], key=lambda c, m=layer: m[c])
                ratio = median(layer[c] for c in order[-STEP:]) / (median(layer[c] for c in order[:STEP]) + 1e-5)
                if ratio > best:
                    best, where, gone = ratio, name, order[:STEP]
        left[where] -= set(gone)
    return {f"{name}.weight[0]": sorted(units) for name, units in left.items()}
