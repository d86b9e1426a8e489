"""Connection sensitivity."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import criterion
from torchshear.pruners.criteria._statistic_sums import sums_of_weights


@criterion("snip", needs=("saliency",), comparable=True)
def snip_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by connection sensitivity; shape (C,).

    s_c = sum over batches b, over the unit's own weights w, of |w dL_b/dw|

    Low scores go first: units whose weights change the loss least. Needs gradients: statistics of
    `torchshear.collect(graph, loader, loss_fn)`.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.

    Reference: Lee et al., ICLR 2019, arXiv:1810.02340, without its normalisation, which does not change the order.
    """
    return sums_of_weights(group, statistics, "snip", lambda sums: sums.saliency)
