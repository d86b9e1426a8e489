"""Size of gradients."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import criterion
from torchshear.pruners.criteria._statistic_sums import sums_of_weights


@criterion("gradient", needs=("gradient",))
def gradient_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by the size of the gradients of its weights; shape (C,).

    s_c = sum over batches b, over the unit's own weights w, of |dL_b/dw|

    Low scores go first: units whose weights the loss depends on least. Needs gradients: statistics of
    `torchshear.collect(graph, loader, loss_fn)`.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.

    Reference: Intel Neural Compressor 2.6, criterion "gradient", there of the last batch alone.
    """
    return sums_of_weights(group, statistics, "gradient", lambda sums: sums.gradient)
