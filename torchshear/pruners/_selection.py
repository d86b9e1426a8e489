"""Exact choice of the units that stay: the one selector that every criterion goes through."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchshear.dependency import ChannelGroup
from torchshear.dependency.alignment import Alignment

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Width:
    """How many units of a group stay.

    Attributes:
        kept: number of units.
        note: why it is not what was asked, or "".
    """

    kept: int
    note: str = ""


def choose_width(group: ChannelGroup, ratio: float, alignment: Alignment, min_width: int = 1) -> Width:
    """How many units stay when a share `ratio` is to go.

    floor(width * ratio) units go, which is rounded to the nearest width that is aligned, leaves `min_width` units, and
    takes equally many from each balanced block; of two equally near the wider one.

    Args:
        group: the group.
        ratio: fraction of units to remove, in [0, 1).
        alignment: which widths the target runs well.
        min_width: the fewest units to keep, at least 1.
    """
    if not group.is_prunable:
        return Width(group.width, group.reason or "")
    # The small number undoes the rounding of products such as 100 * 0.29 = 28.999999999999996.
    target = group.width - int(np.floor(group.width * ratio + 1e-9))
    peer = group.width // group.n_peers
    allowed = alignment.allowed_widths(peer, group.multiplicity) * group.n_peers
    cut = group.width - allowed
    fits = (cut % group.n_blocks == 0) & (cut <= group.max_cut) & (allowed >= min(min_width, peer) * group.n_peers)
    allowed = allowed[fits]
    kept = int(allowed[np.lexsort((-allowed, np.abs(allowed - target)))[0]])
    if kept == target:
        return Width(kept)
    if kept == group.width:
        return Width(kept, f"stays whole: no narrower width is nearer to {target} under {_rules(group, alignment)}")
    return Width(kept, f"{target} rounded to {kept} by {_rules(group, alignment)}")


def _rules(group: ChannelGroup, alignment: Alignment) -> str:
    rules = [] if alignment.block == 1 else [f"alignment {alignment.name}"]
    return " and ".join(rules + ([f"{group.n_blocks} balanced blocks"] if group.n_blocks > 1 else [])) or "min_width"


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
    blocks = np.zeros(group.width, np.int64) if group.balance is None else group.balance
    n_cut = (group.width - kept) // group.n_blocks
    order = np.lexsort((-np.arange(group.width), scores, blocks))
    starts = np.concatenate([[0], np.cumsum(np.bincount(blocks))[:-1]])
    rank = np.arange(group.width) - starts[blocks[order]]
    return np.sort(order[rank >= n_cut])
