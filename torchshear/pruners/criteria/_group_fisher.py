"""Fisher information of a gate on the whole group."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._statistic_sums import with_needs


@criterion("group_fisher", needs=("gates",), comparable=True)
def group_fisher_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by the squared gradient of the loss by a gate that all layers of the group share; shape (C,).

    s_c = sum over samples n of (sum over coupled layers l of dL/dm_lc(n))^2

    where m_lc multiplies what layer l gives of unit c for sample n; coupled layers are added inside the square. Where
    no dimension of what a layer gives is the batch, what it adds for a whole batch counts as one sample. Of a
    recurrent layer its results at every step are multiplied, not what its own next step reads.

    Low scores go first: units whose gate the loss depends on least. Needs gradients: statistics of
    `torchshear.collect(graph, loader, loss_fn)`.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.
        UnscorableError: the units of the group are made by no layer.

    Reference: Liu et al., ICML 2021, arXiv:2108.00708, eq. 6, without its division by memory.
    """
    seen = with_needs(statistics, "group_fisher")
    if group.name not in seen.gates:
        raise UnscorableError("group_fisher: its units are made by no layer that a gate could stand behind")
    return seen.gates[group.name].squares
