"""Cost by widths alone equals the cost of units that are really cut."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchshear
from tests.networks import NETWORKS, Network
from tests.strategies import RandomNetwork, example_input, kept_sets, random_description
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.plans._cut import Cut, dense_cost
from torchshear.pruners import plan_from_kept


def assert_equal_costs(groups: ChannelGroups, seed: int) -> None:
    cost_at = WidthCost(groups)
    assert cost_at(np.array([group.width for group in groups], np.int64)) == dense_cost(groups.graph)
    plan = plan_from_kept(groups, kept_sets(groups, seed))
    assert cost_at(np.array([len(group.kept) for group in plan.groups], np.int64)) == Cut(groups, plan.kept).cost()


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed: int) -> None:
    description = random_description(seed)
    assert_equal_costs(
        torchshear.analyze(torchshear.trace(RandomNetwork(description), (example_input(description),))), seed
    )


@pytest.mark.parametrize("network", NETWORKS[::5], ids=lambda one: one.name)
def test_small_networks(network: Network) -> None:
    model, args, kwargs = network.build()
    groups = torchshear.analyze(torchshear.trace(model, args=args, kwargs=kwargs))
    for seed in range(3):
        assert_equal_costs(groups, seed)


def test_work_that_is_no_multiple_of_the_batch_is_counted_alike() -> None:
    model = parametrizations.spectral_norm(nn.Linear(10, 16))
    model = nn.Sequential(model, nn.ReLU(), nn.Linear(16, 5)).eval()
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(4, 10),)))
    for seed in range(5):
        assert_equal_costs(groups, seed)
