"""Read what a config asks of coupled layers, for the dependency-aware mode of pruner classes."""

from torchshear.calibration import Statistics
from torchshear.compat.nni._dependency_aware import DependencyAwarePlan, plan_dependency_aware
from torchshear.configs import ResolvedConfig
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.pruners.selection._request import owner_of

_MAKING = frozenset({"out", "depthwise"})


def plan_coupled(groups: ChannelGroups, resolved: ResolvedConfig, statistics: Statistics | None) -> DependencyAwarePlan:
    """Plan the common part of coupled layers, and mask what each was asked beyond it.

    Args:
        groups: the analysed network.
        resolved: the config.
        statistics: what criteria that look at data need.

    Raises:
        ArgumentError: the config asks for pools, several criteria, other units than output channels, or for channels
            that are products of several groups.
    """
    claimed = [row for row in resolved.rows if row.groups]
    entries = {entry.label: entry for entry in resolved.entries if any(row.entry == entry.label for row in claimed)}
    criteria = {entry.criterion for entry in entries.values()}
    for entry in entries.values():
        if entry.pool is not None or entry.pattern != "out_channel" or len(criteria) > 1:
            what = "a pool" if entry.pool else f"units {entry.pattern!r} and criterion {entry.criterion!r}"
            raise ArgumentError(
                f"{entry.label}: dependency_aware=True goes with one criterion and a ratio of output channels for each "
                f"layer; it has {what}. Leave dependency_aware away: coupled layers lose the same channels in any case."
            )
    ratios: dict[str, float] = {}
    for row in claimed:
        for weight in _weights(groups, row.layer):
            _check_no_product(groups, resolved, weight)
            ratios[weight] = row.ratio or 0.0
    for name, ratio in resolved.ratios.items():  # depthwise layers that no entry names follow
        for member in groups[name].members:
            if "depthwise" in member.purposes:
                ratios.setdefault(member.name, ratio)
    return plan_dependency_aware(groups, ratios, criteria.pop() or "l1", statistics=statistics)


def _weights(groups: ChannelGroups, layer: str) -> list[str]:
    """Weights of a layer that make units of a group which can shrink."""
    made = {member.name for group in groups.prunable for member in group.members if member.purposes & _MAKING}
    names = {canonical for alias, canonical in groups.graph.aliases.items() if owner_of(alias)[0] == layer}
    return sorted(made & names)


def _check_no_product(groups: ChannelGroups, resolved: ResolvedConfig, weight: str) -> None:
    for group in groups.prunable:
        is_made = any(member.name == weight and member.purposes & _MAKING for member in group.members)
        if is_made and group.name not in resolved.targets:
            raise ArgumentError(
                f"dependency_aware=True: the rows of {weight!r} are products of groups, as of heads and their width, "
                f"of which the config takes one and not {group.name!r}. Leave dependency_aware away."
            )
