"""Fisher information of a gate on the whole group, batch by batch, and the exchange of units that follows it."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._statistic_sums import with_needs

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def retrain_free_units(group: ChannelGroup, kept: Indices, statistics: Statistics | None) -> Indices:
    """Exchange units that stay for units that go, so that those that go have the least effect together.

    With G_cb = dL_b/dm_c the gradients that `retrain_free_scores` squares, and P the p units that go, each unit c that
    stays is looked at once, in order of its score:

        P <- P + {c} - {j},    j = argmin over units j of P + {c} of sum over batches b of (sum over i in P + {c} - {j}
            of G_ib)^2

    p stays the same. In a balanced group j is of the block of c, and what goes of all blocks is summed. O(C p B) for C
    units and B batches.

    Args:
        group: the group; C = group.width units.
        kept: units that stay, ascending, shape (C - p,).
        statistics: what was collected for `retrain_free`.

    Returns:
        Units that stay, ascending, shape (C - p,).

    Reference: Kwon et al., NeurIPS 2022, arXiv:2204.09656, section 4.2, in one pass.
    """
    gates = with_needs(statistics, "retrain_free").gates[group.name].batches.double().numpy()
    return exchange_units(gates, kept, np.zeros(group.width, np.int64) if group.balance is None else group.balance)


def exchange_units(gates: Floats, kept: Indices, blocks: Indices) -> Indices:
    """Return the units that stay after one pass of exchanges; see `retrain_free_units`.

    Args:
        gates: gradient of each unit and batch, shape (C, B).
        kept: units that stay, shape (C - p,).
        blocks: the block of each unit, shape (C,).
    """
    scores = np.square(gates).sum(1)
    stays = np.zeros(len(gates), bool)
    stays[kept] = True
    gone = {int(block): np.flatnonzero(~stays & (blocks == block)) for block in np.unique(blocks[kept])}
    rows = {block: gates[units] for block, units in gone.items()}
    costs = {block: scores[units] for block, units in gone.items()}
    effect = gates[~stays].sum(0)
    for unit in kept[np.lexsort((-kept, scores[kept]))]:
        block = int(blocks[unit])
        together = effect + gates[unit]
        # |together - G_j|^2, less |together|^2, which is the same for all
        changes = costs[block] - 2 * rows[block] @ together
        if not len(changes) or changes.min() >= scores[unit] - 2 * gates[unit] @ together:
            continue
        place = int(changes.argmin())
        effect = together - rows[block][place]
        stays[gone[block][place]], stays[unit] = True, False
        gone[block][place], rows[block][place], costs[block][place] = unit, gates[unit], scores[unit]
    return np.flatnonzero(stays)


@criterion("retrain_free", needs=("gates",), comparable=True, rearrange=retrain_free_units)
def retrain_free_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by the squared gradient of a batch's loss by a gate on all layers of the group; shape (C,).

    s_c = sum over batches b of (dL_b/dm_c)^2

    where m_c multiplies what every layer that makes unit c gives of it, before its activation; of a head, its queries,
    keys and values; of a recurrent layer, its results, not what its own next step reads. When it is known how many
    units of a group go, units are exchanged so that they matter least together, not one by one: see
    `retrain_free_units`. `torchshear.plan` does that in every scope; where layers lose units of their own
    (`plan_dependency_aware`) the order of scores decides.

    The paper masks what layers read, behind the activation, which is the same for ReLU. Its search under a limit of
    operations or latency is here that of `torchshear.plan`; the last of its three steps, a rescaling of what is left by
    least squares, is not done.

    Low scores go first: units whose gate the loss depends on least. Needs gradients: statistics of
    `torchshear.collect(graph, loader, loss_fn)`.

    Raises:
        ArgumentError: there are no statistics, or they were collected without a loss.
        UnscorableError: the units of the group are made by no layer.

    Reference: Kwon et al., NeurIPS 2022, arXiv:2204.09656, section 4.1.
    """
    seen = with_needs(statistics, "retrain_free")
    if group.name not in seen.gates:
        raise UnscorableError("retrain_free: its units are made by no layer that a gate could stand behind")
    return seen.gates[group.name].batches.double().square().sum(1)
