"""First-order Taylor expansion of the loss, on a gate behind each norm."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.dependency.groups._purposes import NORM_PURPOSES
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._statistic_sums import row_sums, with_needs


@criterion("taylor_bn", needs=("rows",), comparable=True)
def taylor_bn_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by what the loss would change if the outputs of its norms were zeroed; shape (C,).

    s_c = sum over batches b, over norms of the group, of (gamma_c dL_b/dgamma_c + beta_c dL_b/dbeta_c)^2

    which is the squared gradient by a gate on the norm's output. A group without norms stays whole.

    Low scores go first: units whose norms' outputs change the loss least. Needs gradients: statistics of
    `torchshear.collect(graph, loader, loss_fn)`.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.
        UnscorableError: the group has no norm with a scale.

    Reference: Molchanov et al., CVPR 2019, arXiv:1906.10771, where it is called Taylor-FO-BN.
    """
    seen = with_needs(statistics, "taylor_bn")
    if not any(member.purposes & NORM_PURPOSES and (member.name, member.dim) in seen.rows for member in group.members):
        raise UnscorableError("taylor_bn: no norm with a scale among its layers")
    return row_sums(group, {key: sums.squares for key, sums in seen.rows.items()}, NORM_PURPOSES)
