"""Widths that a group may have on a device, and units that stand for any of these widths."""

import numpy as np

from torchshear.dependency._alignment import Alignment
from torchshear.dependency.algebra._units import Ids
from torchshear.dependency.groups._groups import ChannelGroup


def aligned_widths(group: ChannelGroup, alignment: Alignment) -> Ids:
    """Return the widths that a group may have: aligned, with equally many units gone from each balanced block.

    Args:
        group: the group.
        alignment: which widths the target runs well.

    Returns:
        Ascending, shape (n,); the group's own width is the last.
    """
    if not group.is_prunable:
        return np.array([group.width])
    peer = group.width // group.n_peers
    allowed = alignment.allowed_widths(peer, group.multiplicity) * group.n_peers
    cut = group.width - allowed
    return np.asarray(allowed[(cut % group.n_blocks == 0) & (cut <= group.max_cut)], np.int64)


def first_units(group: ChannelGroup, width: int) -> Ids:
    """Return the first units of each balanced block, as many as a width asks for, where it does not matter which."""
    n_gone = (group.width - width) // group.n_blocks
    blocks = np.zeros(group.width, np.int64) if group.balance is None else group.balance
    kept = [np.flatnonzero(blocks == block) for block in range(group.n_blocks)]
    return np.sort(np.concatenate([units[: len(units) - n_gone] for units in kept]))
