"""Which batch norm belongs to which layer."""

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import image
from torchshear.compat.unipruning import plan_unipruning


class Net(nn.Module):
    """A convolution, what a case puts behind it, and another convolution."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv = way, nn.Conv2d(3, 8, 1)
        self.norm, self.other = nn.BatchNorm2d(8, affine=way != "no scale"), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.way == "read twice":
            return self.last(self.norm(y) + y)
        if self.way == "activation between":
            return self.last(self.norm(torch.relu(y)))
        if self.way == "applied twice":
            return self.last(self.norm(y) + self.other(self.conv(x * x)))
        return self.last(torch.relu(self.norm(y)))


SCALES = {"plain": "norm.weight", "no scale": "", "read twice": "", "activation between": "", "applied twice": ""}


@pytest.mark.parametrize("way", SCALES)
def test_a_scale_is_that_of_the_only_norm_that_reads_a_layer(way: str) -> None:
    groups = torchshear.analyze(torchshear.trace(Net(way).eval(), (image(),)))
    (member,) = [m for m in groups["conv.weight[0]"].members if m.name == "conv.weight"]
    assert member.norm_scale == SCALES[way]
    assert all(not m.norm_scale for group in groups for m in group.members if m is not member)
    assert plan_unipruning(groups, 0.8, 2, 2).n_cut


@pytest.mark.parametrize("width", [7, 8])
def test_a_norm_along_another_dimension_is_not_that_of_the_layer(width: int) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(width), nn.Linear(8, 2)).eval()
    groups = torchshear.analyze(torchshear.trace(model, (torch.zeros(2, width, 5),)))
    assert all(not member.norm_scale for group in groups for member in group.members)
