"""Widths that a group may have, and the one that is nearest to a ratio."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchshear.dependency import ChannelGroup
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.groups._aligned_widths import aligned_widths
from torchshear.errors import ArgumentError, PlanError

Indices = npt.NDArray[np.int64]


class NothingToRemoveError(ArgumentError):
    """A request removes no unit; within a schedule that is no error, since later requests will."""


@dataclass(frozen=True, slots=True)
class Width:
    """Number of units of a group that stay.

    Attributes:
        kept: number of units.
        note: why it differs from the ratio asked for, or "".
    """

    kept: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Between which widths a group may be chosen.

    Attributes:
        min_width: the fewest units to keep, at least 1; in each dimension, where units are shared out among several.
        min_ratio: fraction of the units that goes in any case.
        max_ratio: fraction of the units that may go; None for no limit.
    """

    min_width: int = 1
    min_ratio: float = 0.0
    max_ratio: float | None = None


def allowed_widths(group: ChannelGroup, alignment: Alignment, limits: Limits) -> Indices:
    """Widths that a group may have: within limits, aligned, equally many units gone from each balanced block.

    Args:
        group: the group.
        alignment: which widths the target runs well.
        limits: the limits.

    Returns:
        Ascending, shape (n,). The group's own width is the last, unless a minimum ratio forbids it.

    Raises:
        PlanError: no width keeps both the minimum ratio and the other rules.
    """
    if not group.is_prunable:
        return np.array([group.width])
    allowed = aligned_widths(group, alignment)
    most = group.width if limits.max_ratio is None else n_removed(group.width, limits.max_ratio)
    least = min(limits.min_width, group.width // group.n_peers) * group.n_peers
    found = allowed[(group.width - allowed <= most) & (allowed >= least)]
    enough = found[found <= group.width - n_removed(group.width, limits.min_ratio)]
    if not len(enough):
        raise PlanError(
            f"min_ratio={limits.min_ratio} of group {group.name!r} (width {group.width}) cannot be met: at most "
            f"{group.width - found[0]} units can go under {_rules(group, alignment, limits)}. Lower it, or loosen "
            f"these."
        )
    return np.asarray(enough, np.int64)


def n_removed(width: int, ratio: float) -> int:
    """floor(width * ratio), undoing the rounding of products such as 100 * 0.29 = 28.999999999999996."""
    return int(np.floor(width * ratio + 1e-9))


def choose_width(group: ChannelGroup, ratio: float, alignment: Alignment, limits: Limits | None = None) -> Width:
    """Return the number of units that stay when a share `ratio` is to go.

    floor(width * ratio) units go, which is rounded to the nearest width that is aligned, keeps the limits, and takes
    equally many from each balanced block; of two equally near the wider one.

    Args:
        group: the group.
        ratio: fraction of units to remove, in [0, 1).
        alignment: which widths the target runs well.
        limits: the limits; None for none.

    Raises:
        PlanError: the limits contradict the other rules.
    """
    if not group.is_prunable:
        return Width(group.width, group.reason or "")
    limits = limits or Limits()
    target = group.width - n_removed(group.width, ratio)
    allowed = allowed_widths(group, alignment, limits)
    kept = int(allowed[np.lexsort((-allowed, np.abs(allowed - target)))[0]])
    if kept == target:
        return Width(kept)
    rules = _rules(group, alignment, limits)
    if kept == group.width:
        return Width(kept, f"stays whole: no narrower width is nearer to {target} under {rules}")
    return Width(kept, f"{target} rounded to {kept} by {rules}")


def _rules(group: ChannelGroup, alignment: Alignment, limits: Limits) -> str:
    """The rules that may forbid a width."""
    rules = [] if alignment.block == 1 else [f"alignment {alignment.name}"]
    rules += [f"{group.n_blocks} balanced blocks"] if group.n_blocks > 1 else []
    rules += [f"min_ratio={limits.min_ratio}"] if limits.min_ratio else []
    rules += [f"max_ratio={limits.max_ratio}"] if limits.max_ratio is not None else []
    return " and ".join(rules) or "min_width"
