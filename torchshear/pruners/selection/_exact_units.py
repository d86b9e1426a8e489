"""Exact choice of the units that stay: the one selector that every criterion goes through."""

import numpy as np
import numpy.typing as npt

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.errors import ArgumentError
from torchshear.pruners.criteria._criterion import Rearrangement

Indices = npt.NDArray[np.int64]


def choose_units(group: ChannelGroup, scores: npt.NDArray[np.float64], kept: int) -> Indices:
    """The units that stay: exactly `kept` of them, those with the highest scores.

    Among equal scores the later unit goes first. In a balanced group each block loses equally many.

    Args:
        group: the group; C = group.width units.
        scores: shape (C,), bigger = keep.
        kept: number of units to keep; C - kept is a multiple of the number of blocks.

    Returns:
        Indices of the units that stay, ascending, shape (kept,).
    """
    return np.sort(removal_order(group, scores)[group.width - kept :])


def rearranged_units(
    group: ChannelGroup, kept: Indices, rearrange: Rearrangement | None, statistics: Statistics | None
) -> Indices:
    """The units that stay after a criterion has exchanged some of those that its scores chose.

    Args:
        group: the group.
        kept: units chosen by scores, ascending.
        rearrange: what exchanges them; None: they stay as they are.
        statistics: what was seen on data.

    Raises:
        ArgumentError: it gave other than as many units of each block.
    """
    if rearrange is None:
        return kept
    given = np.sort(np.asarray(rearrange(group, kept.copy(), statistics)).reshape(-1))
    is_choice = given.dtype.kind in "iu" and len(np.unique(given)) == len(given) == len(kept)
    if (
        not is_choice
        or not np.isin(given, np.arange(group.width)).all()
        or _shares(group, given) != _shares(group, kept)
    ):
        raise ArgumentError(
            f"the criterion rearranged the units of group {group.name!r} to {given.tolist()[:8]}; expected "
            f"{len(kept)} different ones below {group.width}, of each block as many as it was given."
        )
    return given.astype(np.int64)


def _shares(group: ChannelGroup, units: Indices) -> list[int]:
    """Count units by balanced block."""
    blocks = np.zeros(group.width, np.int64) if group.balance is None else group.balance
    return [int(count) for count in np.bincount(blocks[units], minlength=group.n_blocks)]


def removal_order(group: ChannelGroup, scores: npt.NDArray[np.float64], left: Indices | None = None) -> Indices:
    """Units in the order in which they go: by score, of balanced blocks one of each in turn.

    Args:
        group: the group; C = group.width units.
        scores: shape (C,), bigger = keep.
        left: units that are left, ascending; None for all.

    Returns:
        All units that are left, in order.
    """
    units = np.arange(group.width) if left is None else left
    blocks = np.zeros(len(units), np.int64) if group.balance is None else group.balance[units]
    order = np.lexsort((-units, scores[units], blocks))
    starts = np.concatenate([[0], np.cumsum(np.bincount(blocks))[:-1]])
    rank = np.arange(len(units)) - starts[blocks[order]]
    return units[order[np.argsort(rank, kind="stable")]]
