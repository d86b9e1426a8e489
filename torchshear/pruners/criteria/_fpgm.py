"""Distance from the geometric median."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup, Member
from torchshear.dependency.groups._purposes import MAKING_PURPOSES
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._weight_sums import not_finite, readable

_ROWS = 256  # units whose distances are in memory at a time
_NEAR = 0.1  # pairs whose squared distance is below this share of their squared lengths are subtracted
_PIECE = 1 << 18  # numbers that are subtracted at a time


@criterion("fpgm", needs=())
def fpgm_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by how far its filters are from all others, which can stand in for what is near; shape (C,).

    s_c = sum over layers l of the group, over units j, of ||F_l[c] - F_l[j]||_2

    F_l[c] being all weights of layer l that make unit c, in one vector, of all gates of a recurrent layer; j runs over
    the units that layer l makes. Distances come from products of vectors where that keeps five digits, and from
    differences where it would not. Filters of a grouped convolution are compared number by number, those of different
    groups as well, though these read different inputs.

    Low scores go first: units whose filters are nearest to all others. Needs no data.

    Raises:
        UnscorableError: no layer makes the units, units have different numbers of weights in a layer, or some are
            made by more layers than others.
        WeightError: a weight is missing, without values, or not finite.

    Reference: He et al., CVPR 2019, arXiv:1811.00250, there repeated while the model is trained.
    """
    makers = [member for member in group.members if member.purposes & MAKING_PURPOSES and member.name in weights]
    if not makers:
        raise UnscorableError("fpgm: its units are made by no layer, so that there are no filters to compare")
    total = torch.zeros(group.width, dtype=torch.float64)
    others = np.zeros(group.width, np.int64)  # filters that each unit is compared with
    for layer in _layers(makers):
        units = np.unique(layer[0].units)
        filters = [_filters(member, weights) for member in layer]
        found = _distances(filters[0] if len(filters) == 1 else torch.cat(filters, 1))
        if not bool(torch.isfinite(found).all()):
            bad = next((m for m in layer if not bool(torch.isfinite(weights[m.name]).all())), layer[0])
            raise not_finite(bad, weights[bad.name])
        total[torch.from_numpy(units)] += found
        others[units] += len(units)
    if others.min() < others.max():
        raise UnscorableError(f"fpgm: some units are made by more layers than others, as by {makers[-1].name!r}")
    return total


def _layers(makers: list[Member]) -> list[list[Member]]:
    """Dimensions of weights that make the same units together, as all gates of a recurrent layer."""
    found: dict[tuple[str, int, bytes], list[Member]] = {}
    for member in makers:
        units = np.unique(member.units).tobytes()
        found.setdefault((member.layer or member.name, member.dim, units), []).append(member)
    return list(found.values())


def _filters(member: Member, weights: Mapping[str, Tensor]) -> Tensor:
    """Weights of one layer by unit, those that it makes, shape (units, number of weights of a unit)."""
    units, counts = np.unique(member.units, return_counts=True)
    if counts.min() < counts.max():
        raise UnscorableError(f"fpgm: units have filters of different sizes in {member.name!r}")
    weight = readable(member, weights[member.name])
    if member.n_blocks:  # of each unit the rows of its own block
        blocks = weight.reshape(member.n_blocks, -1, *weight.shape[1:])
        rows = blocks.movedim(member.dim + 1, 1).flatten(0, 1).flatten(1)
    else:
        rows = weight.movedim(member.dim, 0).flatten(1)
    order = member.positions[member.units.argsort(kind="stable")]
    if not np.array_equal(order, np.arange(len(rows))):
        rows = rows[torch.from_numpy(order).to(rows.device)]
    return rows.reshape(len(units), -1).to(torch.float32)


def _distances(filters: Tensor) -> Tensor:
    """Sum of the distances of each row from all others, shape (C,), float64, on the CPU."""
    total = torch.zeros(len(filters), dtype=torch.float64)
    centred = filters - filters.mean(0)  # distances stay the same, and lengths become as small as they can be
    lengths = torch.linalg.vector_norm(centred, dim=1, dtype=torch.float64).square_().float()
    is_rounded = torch.get_float32_matmul_precision() != "highest"  # products of shortened numbers say too little
    for first in range(0, len(filters), _ROWS):
        if is_rounded:
            found = _from_differences(filters, first).double()
        else:
            found = _from_products(filters, centred, lengths, first).double()
        total[first : first + _ROWS] += found.sum(1).cpu()
        total[first + _ROWS :] += found[:, _ROWS:].sum(0).cpu()
    return total


def _from_products(filters: Tensor, centred: Tensor, lengths: Tensor, first: int) -> Tensor:
    """Distances of some rows from themselves and all behind them, shape (rows, C - first)."""
    rows = slice(first, first + _ROWS)
    both = lengths[rows, None] + lengths[first:]
    squares = torch.addmm(both, centred[rows], centred[first:].T, alpha=-2)
    room = torch.add(squares, both, alpha=-_NEAR).fill_diagonal_(torch.inf)
    near = (room < 0).nonzero() if bool(room.amin() < 0) else room.new_zeros((0, 2), dtype=torch.int64)
    if 4 * len(near) > room.numel():
        return _from_differences(filters, first)
    found = squares.clamp_(min=0).sqrt_()
    found.fill_diagonal_(0)
    for pairs in torch.split(near, max(1, _PIECE // max(1, filters.shape[1]))):
        one, other = (pairs + first).T
        found[pairs[:, 0], pairs[:, 1]] = (filters[one] - filters[other]).norm(dim=1)
    return found


def _from_differences(filters: Tensor, first: int) -> Tensor:
    """The same without products."""
    return torch.cdist(filters[first : first + _ROWS], filters[first:], compute_mode="donot_use_mm_for_euclid_dist")
