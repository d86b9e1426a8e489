"""First-order Taylor expansion of the loss, on weights."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import criterion
from torchshear.pruners.criteria._statistic_sums import sums_of_weights


@criterion("taylor", needs=("taylor",), comparable=True)
def taylor_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by what the loss would change if each of its weights were zeroed alone; shape (C,).

    s_c = sum over batches b, over the unit's own weights w, of (w dL_b/dw)^2

    the form that adds the squared contributions of single weights, not the square of their sum. L_b is the loss of a
    batch as `loss_fn` gives it, the model in eval mode.

    Low scores go first: units whose weights change the loss least. Needs gradients: statistics of
    `torchshear.collect(graph, loader, loss_fn)`.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.

    Reference: Molchanov et al., CVPR 2019, arXiv:1906.10771, eq. 8; here summed over the group.
    """
    return sums_of_weights(group, statistics, "taylor", lambda sums: sums.taylor)
