"""Variance of activations."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import criterion
from torchshear.pruners.criteria._statistic_sums import means_of_values


@criterion("activation_variance", needs=("total", "squares"))
def activation_variance_scores(
    group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None
) -> Tensor:
    """Score each unit by the variance of its activation; shape (C,).

    s_c = mean of a_c^2 - (mean of a_c)^2, over all samples and places

    where a is the result of the first activation behind each layer of the group, or of the layer where there is none.
    A unit that always gives the same number is best replaced by a bias.

    Low scores go first: units that give nearly the same number everywhere. Needs activations: statistics of
    `torchshear.collect(graph, loader)`.

    Raises:
        ArgumentError: there are no statistics.
        UnscorableError: no value of the network shows the units of the group.

    Reference: Polyak and Wolf, IEEE Access 2015, doi:10.1109/ACCESS.2015.2494536.
    """
    mean = means_of_values(group, statistics, "activation_variance", lambda sums: sums.total)
    squares = means_of_values(group, statistics, "activation_variance", lambda sums: sums.squares)
    return (squares - mean.square()).clamp_min(0)
