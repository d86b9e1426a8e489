"""What a group loses at each of its widths, from scores of each kind."""

import numpy as np
import pytest
import torch
from torch import nn

import torchshear
from torchshear.pruners.criteria._criterion import find_criterion
from torchshear.pruners.selection._losses import levels_of
from torchshear.pruners.selection._pools import WidthSteps

SCORES = np.array([4.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("reconstruction", [0, 1, 3, 6]),  # losses, added up
        ("taylor", [-10 * np.log(share) for share in (1, 0.9, 0.7, 0.4)]),  # of a scale that groups share
        ("l1", [-np.log(share) for share in (1, 0.9, 0.7, 0.4)]),  # of a scale of the group's own
    ],
)
def test_losses_of_widths(criterion: str, expected: list[float]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    (group,) = torchshear.analyze(torchshear.trace(model, torch.randn(2, 3))).prunable
    steps = WidthSteps(group, np.array([4, 3, 2, 1]), order=SCORES.argsort(), scores=SCORES)
    levels = levels_of(steps, find_criterion(criterion))
    assert levels.widths == (4, 3, 2, 1)
    assert levels.losses == pytest.approx(expected)
