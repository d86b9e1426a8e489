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


class Stream(nn.Module):
    """Two layers add to what a first one makes, and a depthwise convolution acts on each of its channels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.inner, self.outer, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.first(x))
        x = x + self.outer(self.inner(x).relu())
        return self.head(x + self.last(x).relu())


def test_what_many_layers_make_loses_its_share_in_each_of_them() -> None:
    groups = torchshear.analyze(torchshear.trace(Stream().eval(), torch.randn(2, 3, 4, 4)))
    for name, n_layers in (("first.weight[0]", 3), ("inner.weight[0]", 1)):
        group = groups[name]
        widths = np.arange(group.width, 0, -1)
        scores = np.ones(group.width)
        steps = WidthSteps(group, widths, order=scores.argsort(), scores=scores)
        expected = -n_layers * np.log(widths / group.width)
        assert levels_of(steps, find_criterion("l1")).losses == pytest.approx(expected.tolist())
        assert levels_of(steps, find_criterion("taylor")).losses == pytest.approx(
            (-group.width * np.log(widths / group.width)).tolist()
        )


def test_a_recurrent_layer_is_one_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0])

    (group,) = torchshear.analyze(torchshear.trace(Net().eval(), torch.randn(2, 5, 3))).prunable
    steps = WidthSteps(group, np.array([4, 2]), order=SCORES.argsort(), scores=np.ones(4))
    assert levels_of(steps, find_criterion("l1")).losses == pytest.approx([0, np.log(2)])
