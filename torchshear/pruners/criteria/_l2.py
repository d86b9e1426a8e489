"""L2 norm of what is deleted."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import criterion
from torchshear.pruners.criteria._weight_sums import unit_sums


@criterion("l2", needs=())
def l2_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit of a group by the L2 norm of its own weights over the group; shape (C,).

    s_c = sqrt(sum over members m of ||W_m[c]||_2^2)

    Members are the same as for the L1 criterion: what the unit owns, not what reads it.

    Low scores go first: units with the smallest weights. Needs no data.

    Raises:
        WeightError: a weight is missing, without values, or not finite.

    Reference: He et al., IJCAI 2018, arXiv:1808.06866, for one convolution; here over the group.
    """
    return unit_sums(group, weights, lambda weight: weight * weight).sqrt()
