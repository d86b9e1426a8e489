"""First-order Taylor expansion of the loss, on a gate behind each norm."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._data import row_sums, with_statistics
from torchshear.pruners.criteria._registry import UnscorableError, criterion
from torchshear.pruners.statistics import Statistics

_NORM = frozenset({"norm"})


@criterion("taylor_bn", comparable=True)
def taylor_bn_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by what the loss would change if the outputs of its norms were zeroed.

    s_c = sum over batches b, over norms of the group, of (gamma_c dL_b/dgamma_c + beta_c dL_b/dbeta_c)^2

    which is the squared gradient by a gate on the norm's output. A group without norms stays whole.

    Args:
        group: the coupled dimensions; C = group.width units.
        weights: not used.
        statistics: collected with a loss.

    Returns:
        Scores of shape (C,), float64; the lowest are pruned first.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.
        UnscorableError: the group has no norm with a scale.

    Reference: Molchanov et al., CVPR 2019, arXiv:1906.10771, where it is called Taylor-FO-BN.
    """
    known = with_statistics(statistics, "taylor_bn", needs_loss=True)
    if not any(member.roles & _NORM and member.name in known.rows for member in group.members):
        raise UnscorableError("taylor_bn: no norm with a scale among its layers")
    return row_sums(group, known, {name: sums.squares for name, sums in known.rows.items()}, _NORM)
