"""Factors of one width: channels that are a product of units of several groups, as of inputs and a multiplier."""

from collections import defaultdict
from collections.abc import Collection

import numpy as np

from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.groups._groups import Member

_WIDTHS = frozenset({"residual", "channels", "ffn"})  # roles of units that are channels; heads and their width are not


def lesser_factors(groups: ChannelGroups, shrinking: Collection[str]) -> dict[str, str]:
    """Groups that only multiply the channels of another group, with the name of that group.

    The outputs of a depthwise convolution with a multiplier are such: each of its inputs, times each of the multiplier.
    If both lost half, a quarter of the channels would be left, and half of that behind the next one. The lesser factor
    is the one that stands nowhere without the other, which does stand alone, as in the layer that makes the inputs.

    Args:
        groups: the analysed network.
        shrinking: names of the groups that are to lose units.
    """
    widths = [group for group in groups if group.role in _WIDTHS and group.name in shrinking]
    beside = _always_beside(widths)
    lesser: dict[str, str] = {}
    for i, group in enumerate(widths):
        greater = [j for j in beside[i] if i not in beside[j]]
        if greater:
            lesser[group.name] = max((widths[j] for j in greater), key=lambda other: other.width).name
    return lesser


def _always_beside(groups: list[ChannelGroup]) -> list[set[int]]:
    """For each group the others on which all of its positions depend as well, by number."""
    dimensions: dict[tuple[str, int], list[tuple[int, Member]]] = defaultdict(list)
    for number, group in enumerate(groups):
        for member in group.members:
            dimensions[member.name, member.dim].append((number, member))
    beside: list[set[int]] = [set(range(len(groups))) - {number} for number in range(len(groups))]
    for members in dimensions.values():
        overlap = sum(len(member.positions) for _, member in members) > members[0][1].size
        for number, member in members:
            others = members if overlap and beside[number] else []
            beside[number] &= {i for i, other in others if np.isin(member.positions, other.positions).all()}
    return beside
