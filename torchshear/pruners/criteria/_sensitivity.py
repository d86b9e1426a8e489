"""Gradient sensitivity of attention heads and of rows of layers."""

from collections.abc import Mapping

from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.dependency.groups._purposes import HEADS, MAKING_PURPOSES
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._statistic_sums import row_sums, with_needs


@criterion("sensitivity", needs=("rows", "heads"))
def sensitivity_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by how much the loss depends on a factor on what it gives; shape (C,).

    Of attention heads (groups with role "heads", "q_heads" or "kv_heads"):

        s_h = I_h / ||I||_2,    I_h = sum over batches b of |dL_b/dxi_h|

    where xi_h = 1 multiplies what the output projection reads of head h. Its derivative is that projection's weights
    times their gradients, summed over the head's columns. ||I||_2 runs over the heads of the group.

    Of all other groups, with W and b the weight and the bias of each layer that makes its units:

        s_c = sum over batches b, over layers of the group, of |sum over inputs i of W_ci dL_b/dW_ci + b_c dL_b/db_c|

    Where groups are ranked together, scores are divided by their mean over the group, which makes heads and rows
    comparable; with `normalize="none"` heads stay divided by their norm, and rows are compared as they are.

    Low scores go first: heads and rows whose factor the loss depends on least. Needs gradients: statistics of
    `torchshear.collect(graph, loader, loss_fn)`.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.
        UnscorableError: no layer reads what the heads of the group give, or none makes its units.

    Reference: Michel et al., NeurIPS 2019, arXiv:1905.10650, for heads; Kim and Awadalla, 2020, arXiv:2010.13382
    (FastFormers), for both.
    """
    seen = with_needs(statistics, "sensitivity")
    if group.role in HEADS:
        if group.name not in seen.heads:
            raise UnscorableError("sensitivity: no layer reads what its heads give")
        gates = seen.heads[group.name]
        norm = gates.norm()
        return gates / norm if norm else gates
    if not any(
        member.purposes & MAKING_PURPOSES and (member.name, member.dim) in seen.rows for member in group.members
    ):
        raise UnscorableError("sensitivity: its units are made by no row of a layer")
    return row_sums(group, {key: sums.magnitude for key, sums in seen.rows.items()}, MAKING_PURPOSES)
