"""Connection sensitivity."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._data import sums_of_weights, with_statistics
from torchshear.pruners.criteria._registry import criterion
from torchshear.pruners.statistics import Statistics


@criterion("snip", comparable=True)
def snip_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by connection sensitivity.

    s_c = sum over batches b, over all weights w that the unit's removal deletes, of |w dL_b/dw|

    Args:
        group: the coupled dimensions; C = group.width units.
        weights: not used.
        statistics: collected with a loss.

    Returns:
        Scores of shape (C,), float64; the lowest are pruned first.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.

    Reference: Lee et al., ICLR 2019, arXiv:1810.02340, without its normalisation, which does not change the order.
    """
    known = with_statistics(statistics, "snip", needs_loss=True)
    return sums_of_weights(group, known, "snip", lambda sums: sums.saliency)
