"""Scores of the units of a group by name of a criterion, and a network with statistics of all criteria."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import randomise
from tests.networks.plain import ManyLayers
from torchshear.calibration._statistics import Statistics
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.pruners import UnscorableError, registered_criteria
from torchshear.pruners.criteria._criterion import find_criterion
from torchshear.pruners.selection._scoring import group_scores


def weights_of(groups: ChannelGroups) -> dict[str, Tensor]:
    return {name: entry.tensor.detach() for name, entry in groups.graph.state.items() if entry.kind == "parameter"}


def score(name: str, groups: ChannelGroups, group: ChannelGroup, statistics: Statistics) -> np.ndarray:
    return group_scores(group, find_criterion(name), weights_of(groups), statistics)


def is_scored(name: str, groups: ChannelGroups, group: ChannelGroup, statistics: Statistics) -> bool:
    try:
        score(name, groups, group, statistics)
    except UnscorableError:
        return False
    return True


def images(count: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(3, 3, 5, 5, generator=generator).to(dtype), torch.randint(0, 5, (3,), generator=generator))
        for _ in range(count)
    ]


def collected(
    model: nn.Module, data: list[Any], loss_fn: Any = functional.cross_entropy
) -> tuple[ChannelGroups, Statistics]:
    groups = torchshear.analyze(torchshear.trace(model, (data[0][0],)))
    return groups, torchshear.collect(groups, data, loss_fn, len(data), criteria=registered_criteria())


@cache
def mixed() -> tuple[nn.Module, ChannelGroups, Statistics]:
    model = randomise(ManyLayers()).double().eval()
    return (model, *collected(model, images()))
