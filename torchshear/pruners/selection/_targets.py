"""Targets and limits of groups: ratios by group, pattern and role; roles that may shrink; exclusions; bounds."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from torchshear._arguments import close_names, matches, parse_names
from torchshear.dependency import ROLES, ChannelGroup, ChannelGroups
from torchshear.dependency.groups._groups import Member
from torchshear.errors import ArgumentError
from torchshear.pruners.selection._request import (
    PerGroupRatio,
    Ratio,
    Request,
    check_ratio,
    known_names,
    names_of,
    narrower,
    roles_here,
)
from torchshear.pruners.selection._widths import Limits

_MOST_OF_A_POOL: Final = 0.98  # of a group, where others may lose less for it; so that no layer vanishes
_CHANNEL_ROLES: Final = frozenset({"residual", "channels", "ffn"})  # heads and their width are no channels


@dataclass(frozen=True, slots=True)
class Target:
    """Target of a group.

    Attributes:
        ratio: fraction of the units to remove, in [0, 1); None if the group is to stay whole.
        reason: why it stays whole, else "".
        key: what it was asked under, of a mapping; else "".
    """

    ratio: float | None
    reason: str = ""
    key: str = ""


FOR_ITS_CLASS: Final = Target(None, "so that the model keeps its own class")


def choose_targets(
    groups: ChannelGroups, ratio: Ratio, roles: str | Collection[str] | None, exclude: str | Collection[str]
) -> dict[str, Target]:
    """Return the target of each group.

    Args:
        groups: the analysed network.
        ratio: a fraction for every group, or a mapping; of the keys that fit a group counts, in this order, its name, a
            pattern of names, its role, a role that stands for narrower ones, and "*". What no key fits stays whole, and
            so does a factor of channels of which another shrinks, unless a key is its name.
        roles: roles that may shrink, of which some group must have one; None for all.
        exclude: patterns of names; a group with a member that one of them fits stays whole. Names of groups, too.

    Returns:
        Group name -> its target.

    Raises:
        ArgumentError: a ratio is outside [0, 1); a role, key or pattern is unknown, fits nothing, or decides nothing;
            two patterns ask different ratios of one group; nothing that can shrink is left.
    """
    stays_whole = _reasons_to_stay_whole(groups, roles, parse_names("exclude", exclude))
    per_group = PerGroupRatio(groups, "ratio", ratio) if isinstance(ratio, Mapping) else None
    if per_group is None:
        check_ratio("ratio", ratio)
    targets: dict[str, Target] = {}
    for group in groups:
        if group.name in stays_whole:
            targets[group.name] = Target(None, stays_whole[group.name])
        elif per_group is None:
            targets[group.name] = Target(float(ratio))  # type: ignore[arg-type]
        else:
            key, share = per_group.key_of(group), per_group.of(group)
            targets[group.name] = Target(share, "" if key is not None else "no key of ratio fits it", key or "")
    shrinking = {group.name for group in groups.prunable if targets[group.name].ratio}
    for name, greater in lesser_factors(groups, shrinking).items():
        if per_group is None or not per_group.names(name):
            targets[name] = Target(None, f"a factor of channels that shrink with {greater!r}")
    if per_group is not None:
        per_group.check_all_used({name: target.reason for name, target in targets.items() if target.reason})
    if groups.prunable and all(targets[group.name].ratio is None for group in groups.prunable):
        given = ", ".join(f"{name}={value!r}" for name, value in (("roles", roles), ("exclude", exclude)) if value)
        stuck = next((group for group in groups if targets[group.name].ratio is not None), None)
        why = f" Group {stuck.name!r} cannot: {stuck.reason}." if stuck is not None else ""
        raise ArgumentError(f"{given} leaves nothing that can shrink.{why} {roles_here(groups)}")
    return targets


def _reasons_to_stay_whole(
    groups: ChannelGroups, roles: str | Collection[str] | None, exclude: Sequence[str]
) -> dict[str, str]:
    """Return the groups that stay whole whatever the ratio, each with the reason: excluded, or of another role.

    Raises:
        ArgumentError: there are no roles, one is unknown, or no group has any; a pattern fits nothing.
    """
    given = tuple(ROLES) if roles is None else parse_names("roles", roles)
    if not given:
        raise ArgumentError(f"roles={roles!r} names no role, so nothing could shrink; leave it away to prune all.")
    for role in given:
        if role not in ROLES:
            raise ArgumentError(f"roles: {role!r} is no role; {roles_here(groups)}{close_names(role, ROLES)}")
    allowed = frozenset(role for name in given for role in narrower(name))
    if roles is not None and not any(group.role in allowed for group in groups):
        raise ArgumentError(f"roles: no group has the role {' or '.join(map(repr, given))}; {roles_here(groups)}")
    excluded = _excluded_parameters(groups, exclude)
    reasons: dict[str, str] = {}
    for group in groups:
        by_member = next((excluded[member.name] for member in group.members if member.name in excluded), None)
        if group.name in exclude:
            reasons[group.name] = "excluded by its name"
        elif by_member is not None:
            reasons[group.name] = by_member
        elif group.role not in allowed:
            reasons[group.name] = f"its role {group.role!r} is not among roles={', '.join(given)}"
    return reasons


def _excluded_parameters(groups: ChannelGroups, patterns: Sequence[str]) -> dict[str, str]:
    """Return the parameters that a pattern fits, by canonical name, with the reason; names of groups are no patterns.

    Raises:
        ArgumentError: a pattern fits nothing.
    """
    group_names = {group.name for group in groups}
    excluded: dict[str, str] = {}
    for pattern in patterns:
        if pattern in group_names:
            continue
        aliases = [(name, alias) for name, found in names_of(groups).items() for alias in found]
        fitting = {name: alias for name, alias in aliases if matches(pattern, alias)}
        if not fitting:
            raise ArgumentError(
                f"exclude: {pattern!r} fits no parameter, module or channel group of {groups.graph.model_type}. "
                f"Expected names as in named_parameters(), where * stands for anything."
                f"{close_names(pattern, [*known_names(groups), *group_names])}"
            )
        for name, alias in fitting.items():
            excluded.setdefault(name, f"excluded by {pattern!r}: {alias}")
    return excluded


def limits_of(groups: ChannelGroups, request: Request, targets: Mapping[str, Target]) -> dict[str, Limits]:
    """Return the limits of each group by name.

    Raises:
        ArgumentError: a share is outside [0, 1), a key decides nothing, or limits contradict each other.
    """
    default = default_max_ratio(request)
    min_ratios = _shares_by_group(groups, "min_ratio", request.min_ratio, targets)
    max_ratios: dict[str, float] = {}
    if request.max_ratio is not None:
        max_ratios = _shares_by_group(groups, "max_ratio", request.max_ratio, targets)
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


def default_max_ratio(request: Request) -> float | None:
    """Return the largest share that a group may lose where `max_ratio` is not given; None for no limit."""
    return None if request.pooling == "local" and request.target_latency is None else _MOST_OF_A_POOL


def _shares_by_group(
    groups: ChannelGroups, what: str, shares: Ratio, targets: Mapping[str, Target]
) -> dict[str, float]:
    """Return the share that `min_ratio` or `max_ratio` gives each group that may shrink."""
    chosen = [group for group in groups if targets[group.name].ratio]
    if not isinstance(shares, Mapping):
        check_ratio(what, shares)
        return {group.name: float(shares) for group in chosen}
    keyed = PerGroupRatio(groups, what, shares)
    found = {group.name: keyed.of(group) for group in chosen}
    keyed.check_all_used({name: target.reason for name, target in targets.items() if target.reason})
    return {name: share for name, share in found.items() if share is not None}


def lesser_factors(groups: ChannelGroups, shrinking: Collection[str]) -> dict[str, str]:
    """Return groups that only multiply the channels of another group, each with the name of that group.

    The outputs of a depthwise convolution with a multiplier are such: each of its inputs, times each of the multiplier.
    If both lost half, a quarter of the channels would be left, and half of that behind the next one. The lesser factor
    is the one that stands nowhere without the other, which does stand alone, as in the layer that makes the inputs.

    Args:
        groups: the analysed network.
        shrinking: names of the groups that are to lose units.
    """
    widths = [group for group in groups if group.role in _CHANNEL_ROLES and group.name in shrinking]
    beside = _always_beside(widths)
    lesser: dict[str, str] = {}
    for i, group in enumerate(widths):
        greater = [j for j in beside[i] if i not in beside[j]]
        if greater:
            lesser[group.name] = max((widths[j] for j in greater), key=lambda other: other.width).name
    return lesser


def _always_beside(groups: list[ChannelGroup]) -> list[set[int]]:
    """Return for each group the numbers of the others on which all of its positions depend as well."""
    dimensions: dict[tuple[str, int], list[tuple[int, Member]]] = defaultdict(list)
    for number, group in enumerate(groups):
        for member in group.members:
            dimensions[member.name, member.dim].append((number, member))
    beside: list[set[int]] = [set(range(len(groups))) - {number} for number in range(len(groups))]
    for members in dimensions.values():
        overlap = sum(len(member.positions) for _, member in members) > members[0][1].size
        for number, member in members:
            others = members if overlap and beside[number] else []
            beside[number] &= {i for i, other in others if np.isin(member.positions, other.positions).all()}
    return beside
