"""Cost by widths alone equals the cost of units that are really cut."""

import numpy as np
import pytest
import torch

import torchshear
from tests.networks import Attention, Grouped, Residual, Tied, image
from tests.strategies import RandomNetwork, example_input, kept_sets, random_description
from torchshear.dependency import ChannelGroups, Cut, WidthCost, dense_cost
from torchshear.pruners import plan_from_kept


def assert_equal_costs(groups: ChannelGroups, seed: int) -> None:
    kept = kept_sets(groups, seed)
    plan = plan_from_kept(groups, kept)
    widths = np.array([len(group.kept) for group in plan.groups])
    assert WidthCost(groups)(widths) == Cut(groups, plan.kept).cost()


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed: int) -> None:
    description = random_description(seed)
    groups = torchshear.analyze(torchshear.trace(RandomNetwork(description), (example_input(description),)))
    whole = np.array([group.width for group in groups], np.int64)
    assert WidthCost(groups)(whole) == dense_cost(groups.graph)
    assert_equal_costs(groups, seed)


@pytest.mark.parametrize("seed", range(3))
def test_named_networks(seed: int) -> None:
    cases = [
        (Residual(), image()),
        (Grouped(), image()),
        (Attention(), torch.randn(2, 5, 24)),
        (Tied(), torch.arange(6).reshape(2, 3)),
        (torch.nn.LSTM(6, 8, 2, bidirectional=True), torch.randn(5, 2, 6)),
    ]
    for model, x in cases:
        assert_equal_costs(torchshear.analyze(torchshear.trace(model, (x,))), seed)
