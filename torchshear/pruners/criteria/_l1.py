"""L1 norm of what is deleted."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import criterion
from torchshear.pruners.criteria._weight_sums import unit_sums


@criterion("l1", needs=())
def l1_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit of a group by the L1 norm of its own weights, summed over the group; shape (C,).

    s_c = sum over members m of ||W_m[c]||_1

    Members are output rows of convolutions and linear layers, depthwise kernels, norm scales, embedding columns and
    raw parameters; input columns of the layers that read the unit, biases and running statistics are not counted.

    Low scores go first: units with the smallest weights. Needs no data.

    Raises:
        WeightError: a weight is missing, without values, or not finite.

    Reference: Li et al., ICLR 2017, arXiv:1608.08710, for one convolution; here summed over the group.
    """
    return unit_sums(group, weights, lambda weight: weight.abs())
