"""Scale of norms."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.dependency.groups._purposes import NORM_PURPOSES
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._weight_sums import unit_sums


@criterion("bn_scale", needs=(), comparable=True)
def bn_scale_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by the scales of its norms; shape (C,).

    s_c = sum over norms of the group of |gamma_c|

    which says something if the scales were pressed towards zero while the model was trained. A group without norms
    stays whole.

    Low scores go first: units whose norms scale them down most. Needs no data.

    Raises:
        UnscorableError: the group has no norm with a scale.
        WeightError: a weight is missing, without values, or not finite.

    Reference: Liu et al., ICCV 2017, arXiv:1708.06519 (network slimming).
    """
    if not any(member.purposes & NORM_PURPOSES for member in group.members):
        raise UnscorableError("bn_scale: no norm with a scale among its layers")
    return unit_sums(group, weights, lambda weight: weight.abs(), NORM_PURPOSES)
