"""Widths that groups may have, by what reads and makes their units."""

import numpy as np
import pytest
import torch
from torch import nn

import torchshear
from torchshear.dependency import Alignment, ChannelGroups
from torchshear.dependency.groups._aligned_widths import aligned_widths

AVX2 = Alignment(16, 8, "cpu-avx2", 4)


@pytest.fixture(scope="module")
def groups() -> ChannelGroups:
    """A plain, a grouped, a depthwise convolution, a convolution of sequences, and linear layers."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Conv2d(3, 64, 3)
            self.grouped = nn.Conv2d(64, 96, 3, groups=4)
            self.depthwise = nn.Conv2d(96, 96, 3, groups=96)
            self.narrow = nn.Conv2d(96, 16, 1)
            self.few = nn.Conv2d(16, 32, 3, groups=4, padding=1)
            self.one = nn.Conv2d(32, 32, 3, groups=4, padding=1)
            self.last = nn.Conv2d(32, 8, 1)
            self.sequence = nn.Conv1d(8, 16, 1)
            self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (self.plain, self.grouped, self.depthwise, self.narrow, self.few, self.one, self.last):
                x = torch.relu(layer(x))
            x = torch.relu(self.sequence(x.flatten(2))).mean(-1)
            return self.head(torch.relu(self.hidden(x)))

    return torchshear.analyze(torchshear.trace(Network().eval(), (torch.randn(2, 3, 9, 9),)))


@pytest.mark.parametrize(
    ("name", "convolution_groups", "expected"),
    [
        ("plain.weight[0]", 4, [32, 64]),  # 8 or 16 in each group of the grouped convolution
        ("grouped.weight[0]", 4, [32, 64, 96]),
        ("narrow.weight[0]", 4, [8, 16]),  # 4 in each of four groups fill no granule anyway
        ("few.weight[0]", 4, [16, 32]),  # 8 in each group; half of them are faster outside of the layout, too
        ("one.weight[0]", 4, [16, 32]),
        ("last.weight[0]", 1, [8]),
        ("sequence.weight[0]", 0, [4, 8, 12, 16]),
        ("hidden.weight[0]", 0, [4, 8, 12, 16]),
    ],
)
def test_widths_follow_the_layout_of_maps(
    groups: ChannelGroups, name: str, convolution_groups: int, expected: list[int]
) -> None:
    assert groups[name].convolution_groups == convolution_groups
    assert aligned_widths(groups[name], AVX2).tolist() == expected


def test_a_number_is_a_multiple_and_no_layout(groups: ChannelGroups) -> None:
    assert aligned_widths(groups["plain.weight[0]"], Alignment(8, 8, "multiple of 8")).tolist() == list(
        np.arange(8, 65, 8)
    )
