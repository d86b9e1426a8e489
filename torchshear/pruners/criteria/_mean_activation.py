"""Mean size of activations."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import criterion
from torchshear.pruners.criteria._statistic_sums import means_of_values


@criterion("mean_activation", needs=("magnitude",))
def mean_activation_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by the mean size of its activation; shape (C,).

    s_c = mean over all samples and places of |a_c|

    where a is the result of the first activation behind each layer of the group, or of the layer where there is none;
    all such places of a group together.

    Low scores go first: units with the smallest activations. Needs activations: statistics of
    `torchshear.collect(graph, loader)`.

    Raises:
        ArgumentError: there are no statistics.
        UnscorableError: no value of the network shows the units of the group.

    Reference: Molchanov et al., ICLR 2017, arXiv:1611.06440, section 2.2.
    """
    return means_of_values(group, statistics, "mean_activation", lambda sums: sums.magnitude)
