"""Connection sensitivity with momentum."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import criterion
from torchshear.pruners.criteria._statistic_sums import sums_of_weights


@criterion("snip_momentum", needs=("momentum",), comparable=True)
def snip_momentum_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by connection sensitivity with momentum; shape (C,).

    s_c = S_c of the last batch, where S_c <- 0.9 S_c + 1.0 sum over the unit's own weights w of
        |w dL_b/dw|

    Of several processes the first batch of each comes first, in order of their ranks, then the second of each.

    Low scores go first: units whose weights change the loss least, in late batches above all. Needs gradients:
    statistics of `torchshear.collect(graph, loader, loss_fn)`.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.

    Reference: Intel Neural Compressor 2.6, whose pages print the two coefficients the other way round.
    """
    return sums_of_weights(group, statistics, "snip_momentum", lambda sums: sums.momentum)
