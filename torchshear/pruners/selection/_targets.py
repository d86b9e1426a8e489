"""Targets of groups: a ratio for all or by group, pattern and role; roles that may shrink; exclusions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torchshear.dependency import ROLES, ChannelGroup, ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.graph import close_names, matches, parse_names
from torchshear.pruners.selection._factors import lesser_factors
from torchshear.pruners.selection._per_group import (
    PerGroupRatio,
    Ratio,
    check_ratio,
    known_names,
    names_of,
    narrower,
    roles_here,
)


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
        Group name -> what is asked of it.

    Raises:
        ArgumentError: a ratio is outside [0, 1); a role, key or pattern is unknown, fits nothing, or decides nothing;
            two patterns ask different ratios of one group; nothing that can shrink is left.
    """
    kept = _Exclusions(groups, _parse_roles(groups, roles), parse_names("exclude", exclude))
    asked = PerGroupRatio(groups, "ratio", ratio) if isinstance(ratio, Mapping) else None
    if asked is None:
        check_ratio("ratio", ratio)
    targets: dict[str, Target] = {}
    for group in groups:
        reason = kept.reason(group)
        targets[group.name] = Target(None, reason) if reason else _target_of(group, ratio, asked)
    shrinking = {group.name for group in groups.prunable if targets[group.name].ratio}
    for name, greater in lesser_factors(groups, shrinking).items():
        if asked is None or not asked.names(name):
            targets[name] = Target(None, f"a factor of channels that shrink with {greater!r}")
    if asked is not None:
        asked.check_all_used({name: target.reason for name, target in targets.items() if target.reason})
    _check_something_left(groups, targets, roles, exclude)
    return targets


def _target_of(group: ChannelGroup, ratio: Ratio, asked: PerGroupRatio | None) -> Target:
    if asked is None:
        return Target(float(ratio))  # type: ignore[arg-type]
    key, share = asked.key_of(group), asked.of(group)
    return Target(share, key=key) if key is not None else Target(None, "no key of ratio fits it")


def _parse_roles(groups: ChannelGroups, roles: str | Collection[str] | None) -> tuple[frozenset[str], tuple[str, ...]]:
    """The roles that may shrink, narrower ones included, and as they were given."""
    if roles is None:
        return frozenset(ROLES), ()
    names = parse_names("roles", roles)
    if not names:
        raise ArgumentError(f"roles={roles!r} names no role, so nothing could shrink; leave it away to prune all.")
    for name in names:
        if name not in ROLES:
            raise ArgumentError(f"roles: {name!r} is no role; {roles_here(groups)}{close_names(name, ROLES)}")
    allowed = frozenset(role for name in names for role in narrower(name))
    if not any(group.role in allowed for group in groups):
        raise ArgumentError(f"roles: no group has the role {' or '.join(map(repr, names))}; {roles_here(groups)}")
    return allowed, names


class _Exclusions:
    """Groups that are to stay whole whatever the ratio."""

    def __init__(self, groups: ChannelGroups, roles: tuple[frozenset[str], tuple[str, ...]], exclude: Sequence[str]):
        self._allowed, self._given = roles
        self._excluded: dict[str, str] = {}
        group_names = {group.name for group in groups}
        for pattern in exclude:
            if pattern in group_names:
                continue
            found = {
                name: alias
                for name, aliases in names_of(groups).items()
                for alias in aliases
                if matches(pattern, alias)
            }
            if not found:
                raise ArgumentError(
                    f"exclude: {pattern!r} fits no parameter, module or channel group of {groups.graph.model_type}. "
                    f"Expected names as in named_parameters(), where * stands for anything."
                    f"{_close_names(groups, pattern)}"
                )
            for name, alias in found.items():
                self._excluded.setdefault(name, f"excluded by {pattern!r}: {alias}")
        self._named = frozenset(exclude) & group_names

    def reason(self, group: ChannelGroup) -> str:
        """Return the reason for which a group stays whole, or ""."""
        if group.name in self._named:
            return "excluded by its name"
        for member in group.members:
            if member.name in self._excluded:
                return self._excluded[member.name]
        if group.role not in self._allowed:
            return f"its role {group.role!r} is not among roles={', '.join(self._given)}"
        return ""


def _close_names(groups: ChannelGroups, word: str) -> str:
    return close_names(word, [*known_names(groups), *(group.name for group in groups)])


def _check_something_left(groups: ChannelGroups, targets: Mapping[str, Target], roles: object, exclude: object) -> None:
    """Raise ArgumentError if what was asked leaves nothing of all that could shrink."""
    if not groups.prunable or any(targets[group.name].ratio is not None for group in groups.prunable):
        return
    asked = ", ".join(f"{name}={given!r}" for name, given in (("roles", roles), ("exclude", exclude)) if given)
    stuck = next((group for group in groups if targets[group.name].ratio is not None), None)
    why = f" Group {stuck.name!r} cannot: {stuck.reason}." if stuck is not None else ""
    raise ArgumentError(f"{asked} leaves nothing that can shrink.{why} {roles_here(groups)}")
