"""Average percentage of zeros."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._data import means_of_values, with_statistics
from torchshear.pruners.criteria._registry import UnscorableError, criterion
from torchshear.pruners.statistics import Statistics


@criterion("apoz", comparable=True)
def apoz_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by how often it is not zero behind its activation.

    s_c = 1 - (zeros of unit c) / (numbers of unit c), over all samples and places

    counted where the first activation behind each layer of the group gives its result, wherever norms and sums lie in
    between; all such places of a group together.

    Args:
        group: the coupled dimensions; C = group.width units.
        weights: not used.
        statistics: collected with or without a loss.

    Returns:
        Scores of shape (C,), float64; the lowest are pruned first.

    Raises:
        ArgumentError: there are no statistics.
        UnscorableError: the activation of the group is never exactly zero, or it has none.

    Reference: Hu et al., 2016, arXiv:1607.03250.
    """
    known = with_statistics(statistics, "apoz", needs_loss=False)
    if not any(tap.has_zeros for tap in known.taps.get(group.name, ())):
        raise UnscorableError(
            "apoz: no activation behind its layers gives exact zeros, as a ReLU does; use 'mean_activation' or "
            "'activation_variance' there"
        )
    return 1 - means_of_values(group, known, "apoz", lambda sums: sums.zeros)
