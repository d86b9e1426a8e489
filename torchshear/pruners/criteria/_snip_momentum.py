"""Connection sensitivity with momentum."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._data import sums_of_weights, with_statistics
from torchshear.pruners.criteria._registry import criterion
from torchshear.pruners.statistics import Statistics


@criterion("snip_momentum", comparable=True)
def snip_momentum_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by connection sensitivity with momentum.

    s_c = S_c of the last batch, where S_c <- 0.9 S_c + 1.0 sum over all weights w that the unit's removal
        deletes of |w dL_b/dw|

    Args:
        group: the coupled dimensions; C = group.width units.
        weights: not used.
        statistics: collected with a loss.

    Returns:
        Scores of shape (C,), float64; the lowest are pruned first.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.

    Reference: Intel Neural Compressor 2.6, whose pages print the two coefficients the other way round.
    """
    known = with_statistics(statistics, "snip_momentum", needs_loss=True)
    return sums_of_weights(group, known, "snip_momentum", lambda sums: sums.momentum)
