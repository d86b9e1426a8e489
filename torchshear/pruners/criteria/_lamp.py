"""Layer-adaptive magnitude: what a unit weighs beside all that would outlive it."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import criterion
from torchshear.pruners.criteria._weight_sums import unit_sums


@criterion("lamp", needs=(), comparable=True)
def lamp_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by its share of the squared weights that are left when all smaller units are gone; shape (C,).

    s_c = n_c / sum over units j that go not before c of n_j,    n_c = sum over members m of ||W_m[c]||_2^2

    Units go in order of n, among equals the later one first. So the last one to go has score 1, and scores of
    different groups can be compared: made for budgets over all groups at once. Within a group the order is that of
    the L2 norm. A unit whose weights are all zero has score 0.

    Low scores go first: units with the smallest weights beside those that are left. Needs no data.

    Raises:
        WeightError: a weight is missing, without values, or not finite.

    Reference: Lee et al., ICLR 2021, arXiv:2010.07611, for single weights of a layer; here for units of a group.
    """
    sizes = unit_sums(group, weights, lambda weight: weight * weight).numpy()
    order = np.lexsort((-np.arange(group.width), sizes))
    left = np.cumsum(sizes[order[::-1]])[::-1]
    scores = np.zeros(group.width)
    scores[order] = np.divide(sizes[order], left, out=np.zeros(group.width), where=left > 0)
    return torch.from_numpy(scores)
