"""Limits of every group: the share that goes in any case, and the most that may go."""

from collections.abc import Mapping
from typing import Final

from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.pruners.selection._exact import Limits
from torchshear.pruners.selection._per_group import PerGroupRatio, Ratio, check_ratio
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._targets import Target

_MOST_OF_A_POOL: Final = 0.98  # of a group, where others may lose less for it; so that no layer vanishes


def limits_of(groups: ChannelGroups, request: Request, targets: Mapping[str, Target]) -> dict[str, Limits]:
    """Name of a group -> its limits.

    Raises:
        ArgumentError: a share is outside [0, 1), a key decides nothing, or limits contradict each other.
    """
    default = default_most(request)
    min_ratios = _shares_by_group(groups, "min_ratio", request.min_ratio, targets)
    max_ratios = (
        _shares_by_group(groups, "max_ratio", request.max_ratio, targets) if request.max_ratio is not None else {}
    )
    limits = {}
    for group in groups:
        low, high = min_ratios.get(group.name, 0.0), max_ratios.get(group.name, default)
        if high is not None and low > high:
            raise ArgumentError(
                f"min_ratio={low} and max_ratio={high} of group {group.name!r} contradict each other; expected "
                f"min_ratio <= max_ratio."
            )
        limits[group.name] = Limits(request.min_width, low, high)
    return limits


def default_most(request: Request) -> float | None:
    """The largest share of a group that may go where nothing is said; None for no limit."""
    return None if request.scope == "local" else _MOST_OF_A_POOL


def _shares_by_group(
    groups: ChannelGroups, what: str, shares: Ratio, targets: Mapping[str, Target]
) -> dict[str, float]:
    """Name of a group -> what a limit says of it, for groups that may shrink."""
    chosen = [group for group in groups if targets[group.name].ratio]
    if not isinstance(shares, Mapping):
        check_ratio(what, shares)
        return {group.name: float(shares) for group in chosen}
    keyed = PerGroupRatio(groups, what, shares)
    found = {group.name: keyed.of(group) for group in chosen}
    keyed.check_all_used({name: target.reason for name, target in targets.items() if target.reason})
    return {name: share for name, share in found.items() if share is not None}
