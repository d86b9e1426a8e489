"""Widths that a group may have on a device, and units that stand for any of these widths."""

import numpy as np

from torchshear.dependency._alignment import Alignment
from torchshear.dependency.algebra._units import Ids
from torchshear.dependency.groups._groups import ChannelGroup


def aligned_widths(group: ChannelGroup, alignment: Alignment) -> Ids:
    """Return the widths that a group may have: aligned, with equally many units gone from each balanced block.

    Each group of a grouped convolution has channels of its own: where a layout of maps is aligned to, and they fill
    whole granules now, they do after, or half of one if they fill one: outside of the layout 6 of 8 channels, or 12 of
    16, take longer than before, while 4 of 8 take 0.7 to 0.95 of the time.

    Args:
        group: the group.
        alignment: which widths the target runs well.

    Returns:
        Ascending, shape (n,); the group's own width is the last.
    """
    if not group.is_prunable:
        return np.array([group.width])
    peer = group.width // group.n_peers
    n_convolved = group.convolution_groups
    allowed = alignment.allowed_widths(peer, group.multiplicity, n_convolved > 0) * group.n_peers
    cut = group.width - allowed
    is_allowed = (cut % group.n_blocks == 0) & (cut <= group.max_cut)
    in_each = n_convolved * alignment.granule
    if n_convolved > 1 and alignment.linear is not None and group.width % in_each == 0:
        is_allowed &= allowed % (in_each if group.width > in_each else in_each // 2) == 0
    return np.asarray(allowed[is_allowed], np.int64)


def first_units(group: ChannelGroup, width: int) -> Ids:
    """Return the first units of each balanced block, as many as a width asks for, where it does not matter which."""
    n_gone = (group.width - width) // group.n_blocks
    blocks = np.zeros(group.width, np.int64) if group.balance is None else group.balance
    kept = [np.flatnonzero(blocks == block) for block in range(group.n_blocks)]
    return np.sort(np.concatenate([units[: len(units) - n_gone] for units in kept]))
