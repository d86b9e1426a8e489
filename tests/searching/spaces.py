"""Small networks, spaces of their widths, and methods driven by hand."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import torchshear
from torchshear.pruners._planning import RankedGroups
from torchshear.pruners.selection._request import Request
from torchshear.searching import Outcome, Proposal, SearchMethod, SearchSpace
from torchshear.searching._budget import Resource, ResourceLimit, SearchBudget


def layers(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with activations between them."""
    torch.manual_seed(0)
    pairs = list(pairwise(widths))
    made = [[nn.Linear(n_in, n_out, bias=bias), nn.ReLU()] for n_in, n_out in pairs]
    return nn.Sequential(*[module for pair in made for module in pair][:-1]).eval()


class Blocks(nn.Module):
    """A stem, a residual block with a grouped and a depthwise convolution, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.back = nn.Conv2d(24, 16, 1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        inner = torch.relu(self.depthwise(torch.relu(self.grouped(x))))
        return self.fc(torch.relu(x + self.back(inner)).mean((2, 3)))


def space_of(model: nn.Module, x: Tensor, resource: Resource = "channels", share: float = 0.5, **asked: Any) -> Any:
    """Return the space of a model's widths, with one bound."""
    groups = torchshear.analyze(torchshear.trace(model, x))
    ranked = RankedGroups.of(groups, Request(ratio=0.5, max_ratio=0.98, **asked), None)
    names = [group.name for group in groups]
    free = np.array([names.index(one.group.name) for one in ranked.steps], np.int64)
    return SearchSpace.of(ranked, SearchBudget.of(groups, free, [ResourceLimit(resource, share)]))


def drive(
    method: SearchMethod, space: SearchSpace, score: Callable[[Proposal], float], most: int = 1000, seed: int = 0
) -> list[list[tuple[Proposal, Outcome]]]:
    """Run a method with scores from a function; return its batches with their outcomes."""
    proposals = method.propose(space, np.random.default_rng(seed))
    found: list[list[tuple[Proposal, Outcome]]] = []
    try:
        batch = next(proposals)
        while sum(map(len, found)) < most:
            outcomes = [Outcome(one.widths, score(one), space.budget.load(one.widths)) for one in batch]
            found.append(list(zip(batch, outcomes, strict=True)))
            batch = proposals.send(outcomes)
    except StopIteration:
        pass
    return found
