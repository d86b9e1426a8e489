"""Access of criteria to statistics: checked, and summed for each unit."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import SUMS_OF_GRADIENTS, ValueSums, WeightSums
from torchshear.dependency import ChannelGroup
from torchshear.dependency.groups._purposes import OWN_PURPOSES
from torchshear.errors import ArgumentError
from torchshear.pruners.criteria._criterion import UnscorableError, needs_of
from torchshear.pruners.criteria._weight_sums import unit_sums


def with_needs(statistics: Statistics | None, criterion: str) -> Statistics:
    """The statistics, if they hold every sum that a criterion declared at its registration.

    Raises:
        ArgumentError: there are none, or they were collected without a loss, or for other criteria.
    """
    needs = needs_of(criterion)
    loss = bool(needs & SUMS_OF_GRADIENTS)
    if statistics is not None and needs <= statistics.sums:
        return statistics
    if statistics is None:
        what = "no statistics were given"
    elif loss and not statistics.sums & SUMS_OF_GRADIENTS:
        what = "they were collected without a loss, or for criteria that need none"
    else:
        what = f"they were collected for other criteria, without {', '.join(sorted(needs - statistics.sums))}"
    raise ArgumentError(
        f"criterion={criterion!r} looks at {'gradients' if loss else 'activations'}, and {what}. Give "
        f"statistics=torchshear.collect(graph, loader{', loss_fn' if loss else ''}, criteria={criterion!r})."
    )


def sums_of_weights(
    group: ChannelGroup, statistics: Statistics | None, criterion: str, pick: Callable[[WeightSums], Tensor]
) -> Tensor:
    """Sum something known of every number of a parameter over a unit's own weights; shape (C,)."""
    seen = with_needs(statistics, criterion)
    known = {m.name: pick(seen.weights[m.name]) for m in group.members if m.name in seen.weights}
    if not known:
        raise UnscorableError(f"{criterion}: no weight of the group is read in eval mode, where gradients were taken")
    return unit_sums(group, known, lambda sums: sums)


def means_of_values(
    group: ChannelGroup, statistics: Statistics | None, criterion: str, pick: Callable[[ValueSums], Tensor]
) -> Tensor:
    """Mean over all numbers seen of each unit, behind the activations or else the layers; shape (C,), float64."""
    seen = with_needs(statistics, criterion)
    total = torch.zeros(group.width, dtype=torch.float64)
    count = torch.zeros(group.width, dtype=torch.float64)
    for tap in seen.taps.get(group.name, ()):
        sums = seen.values[tap.key]
        units, positions = torch.from_numpy(tap.units), torch.from_numpy(tap.positions)
        total.index_add_(0, units, pick(sums)[positions])
        count.index_add_(0, units, torch.full((len(units),), float(sums.count), dtype=torch.float64))
    if not bool((count > 0).all()):
        raise UnscorableError(f"{criterion}: no value of the network shows the units of the group")
    return total / count


def row_sums(group: ChannelGroup, values: Mapping[tuple[str, int], Tensor], purposes: frozenset[str]) -> Tensor:
    """Sum something known of the rows of layers over the members with a purpose; shape (C,), float64."""
    total = torch.zeros(group.width, dtype=torch.float64)
    for member in group.members:
        key = (member.name, member.dim)
        if key in values and member.purposes & purposes & OWN_PURPOSES:
            total.index_add_(0, torch.from_numpy(member.units), values[key][torch.from_numpy(member.positions)])
    return total
