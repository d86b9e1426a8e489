"""Distance from the geometric median."""

from collections.abc import Mapping

import torch
from torch import Tensor

from torchshear.dependency import ChannelGroup, Member
from torchshear.pruners.criteria._registry import UnscorableError, criterion
from torchshear.pruners.criteria._weights import not_finite, readable
from torchshear.pruners.statistics import Statistics

_FILTERS = frozenset({"out", "depthwise", "embedding"})
_ROWS = 1024  # units whose distances to all others are in memory at a time


@criterion("fpgm")
def fpgm_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by how far its filters are from all others: what is close to the others can be spared.

    s_c = sum over layers l of the group, over units j, of ||F_l[c] - F_l[j]||_2

    F_l[c] being all weights of layer l that make unit c, in one vector. True distances of pairs, computed directly:
    products of vectors would lose small ones.

    Args:
        group: the coupled dimensions; C = group.width units.
        weights: parameter name -> tensor.
        statistics: not used.

    Returns:
        Scores of shape (C,), float64; the lowest are pruned first.

    Raises:
        UnscorableError: no layer makes the units, or units have different numbers of weights in a layer.
        WeightError: a weight is missing, without values, or not finite.

    Reference: He et al., CVPR 2019, arXiv:1811.00250, there repeated while the model is trained.
    """
    makers = [member for member in group.members if member.roles & _FILTERS and member.name in weights]
    if not makers:
        raise UnscorableError("fpgm: its units are made by no layer, so that there are no filters to compare")
    total = torch.zeros(group.width, dtype=torch.float64)
    for member in makers:
        found = _distances(_filters(group, member, weights))
        if not bool(torch.isfinite(found).all()):
            raise not_finite(member, weights[member.name])
        total += found
    return total


def _filters(group: ChannelGroup, member: Member, weights: Mapping[str, Tensor]) -> Tensor:
    """Weights of one layer by unit, shape (C, number of weights of a unit)."""
    counts = set(torch.bincount(torch.from_numpy(member.units), minlength=group.width).tolist())
    if len(counts) > 1 or member.n_blocks:
        raise UnscorableError(f"fpgm: units have filters of different sizes in {member.name!r}")
    rows = readable(member, weights[member.name]).movedim(member.dim, 0).flatten(1)
    order = torch.from_numpy(member.positions[member.units.argsort(kind="stable")]).to(rows.device)
    return rows[order].reshape(group.width, -1).to(torch.float32)


def _distances(filters: Tensor) -> Tensor:
    pieces = [
        torch.cdist(piece, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1, dtype=torch.float64)
        for piece in torch.split(filters, _ROWS)
    ]
    return torch.cat(pieces).cpu()
