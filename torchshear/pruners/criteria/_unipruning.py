"""Norms of the channels of a layer, times the scales of the batch norm behind it."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup, Member
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._weight_sums import position_sums


@criterion("unipruning", needs=())
def unipruning_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by what it weighs in the layer where it weighs most, with its batch norm; shape (C,).

    s_c = max over layers l that make the units of the group of ||W_l[c]||_2 |gamma_lc|

    gamma_l being the scale of the only batch norm that reads the layer's result, 1 if there is none. This scores single
    units; the whole method, which removes runs of them and compares layers by ratios, is `plan_unipruning`.

    Low scores go first: units that weigh little in all of their layers. Needs no data.

    Raises:
        UnscorableError: no convolution or linear layer makes the units of the group.
        WeightError: a weight is missing, without values, or not finite.

    Reference: UniPruning of MindSpore Golden Stick, as its documentation defines it.
    """
    layers = makers(group)
    if not layers:
        raise UnscorableError("unipruning: no convolution or linear layer makes its units")
    return torch.stack([importance(member, group.width, weights) for member in layers]).amax(0)


def makers(group: ChannelGroup) -> list[Member]:
    """Output dimensions of the layers that make the units of a group; those of depthwise ones where no other does."""
    return [m for m in group.members if "out" in m.purposes] or [m for m in group.members if "depthwise" in m.purposes]


def importance(member: Member, width: int, weights: Mapping[str, Tensor], use_gamma: bool = True) -> Tensor:
    """||W[c]||_2 |gamma_c| of the rows W of a layer that go with unit c; shape (width,), float64.

    Args:
        member: the layer's output dimension.
        width: number of units of its group.
        weights: parameter name -> tensor.
        use_gamma: whether rows are multiplied by the scales of the batch norm behind the layer.

    Raises:
        WeightError: a weight is missing, without values, or not finite.
    """
    squares = position_sums(member, weights, torch.square)
    if use_gamma and member.norm_scale:
        scale = replace(member, name=member.norm_scale, dim=0, n_blocks=0)
        squares = squares * position_sums(scale, weights, torch.square)
    total = torch.zeros(width, dtype=torch.float64)
    total.index_add_(0, torch.from_numpy(member.units), squares[torch.from_numpy(member.positions)])
    return total.sqrt()
