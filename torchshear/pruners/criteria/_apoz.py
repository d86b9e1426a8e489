"""Average percentage of zeros."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._statistic_sums import means_of_values, with_needs


@criterion("apoz", needs=("zeros",), comparable=True)
def apoz_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by how often it is not zero behind its activation; shape (C,).

    s_c = 1 - (zeros of unit c) / (numbers of unit c), over all samples and places

    counted where the first activation behind each layer of the group gives its result, wherever norms and sums lie in
    between; all such places of a group together.

    Low scores go first: units that are zero most often. Needs activations: statistics of
    `torchshear.collect(graph, loader)`.

    Raises:
        ArgumentError: there are no statistics.
        UnscorableError: the activation of the group is never exactly zero, or it has none.

    Reference: Hu et al., 2016, arXiv:1607.03250.
    """
    seen = with_needs(statistics, "apoz")
    taps = seen.taps.get(group.name, ())
    if not taps:
        raise UnscorableError("apoz: no layer that it knows makes its units, so that no value shows them")
    if not any(tap.has_zeros for tap in taps):
        raise UnscorableError(
            "apoz: no activation behind its layers gives exact zeros, as a ReLU does; use 'mean_activation' or "
            "'activation_variance' there"
        )
    return 1 - means_of_values(group, seen, "apoz", lambda sums: sums.zeros)
