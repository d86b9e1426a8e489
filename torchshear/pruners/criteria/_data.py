"""What criteria that look at data share: statistics that are there, and units' shares of them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchshear.dependency import ChannelGroup
from torchshear.errors import ArgumentError
from torchshear.pruners.criteria._registry import UnscorableError
from torchshear.pruners.criteria._weights import OWN_ROLES, unit_sums
from torchshear.pruners.statistics import Statistics, ValueSums, WeightSums


def with_statistics(statistics: Statistics | None, criterion: str, needs_loss: bool) -> Statistics:
    """The statistics, if they are there and hold what a criterion needs.

    Raises:
        ArgumentError: there are none, or they were collected without a loss that the criterion needs.
    """
    loss = ", loss_fn" if needs_loss else ""
    if statistics is None or (needs_loss and not statistics.weights):
        what = "no statistics were given" if statistics is None else "they were collected without a loss"
        raise ArgumentError(
            f"criterion={criterion!r} looks at {'gradients' if needs_loss else 'activations'}, and {what}. Give "
            f"statistics=torchshear.collect(graph, loader{loss})."
        )
    return statistics


def sums_of_weights(
    group: ChannelGroup, statistics: Statistics, criterion: str, pick: Callable[[WeightSums], Tensor]
) -> Tensor:
    """Sum something known of every number of a parameter over all that a unit's removal deletes; shape (C,)."""
    known = {m.name: pick(statistics.weights[m.name]) for m in group.members if m.name in statistics.weights}
    if not known:
        raise UnscorableError(f"{criterion}: no weight of the group is read in eval mode, where gradients were taken")
    return unit_sums(group, known, lambda sums: sums)


def means_of_values(
    group: ChannelGroup, statistics: Statistics, criterion: str, pick: Callable[[ValueSums], Tensor]
) -> Tensor:
    """Mean over all numbers seen of each unit, behind the activations or else the layers; shape (C,), float64."""
    total = torch.zeros(group.width, dtype=torch.float64)
    count = torch.zeros(group.width, dtype=torch.float64)
    for tap in statistics.taps.get(group.name, ()):
        sums = statistics.values[tap.node, tap.dim]
        units, positions = torch.from_numpy(tap.units), torch.from_numpy(tap.positions)
        total.index_add_(0, units, pick(sums)[positions])
        count.index_add_(0, units, torch.full((len(units),), float(sums.count), dtype=torch.float64))
    if not bool((count > 0).all()):
        raise UnscorableError(f"{criterion}: no value of the network shows the units of the group")
    return total / count


def row_sums(
    group: ChannelGroup, statistics: Statistics, values: Mapping[str, Tensor], roles: frozenset[str]
) -> Tensor:
    """Sum something known of the rows of layers over the members with a role; shape (C,), float64."""
    total = torch.zeros(group.width, dtype=torch.float64)
    for member in group.members:
        if member.name in values and member.roles & roles & OWN_ROLES:
            total.index_add_(0, torch.from_numpy(member.units), values[member.name][torch.from_numpy(member.positions)])
    return total
