"""Which groups may shrink, and by how much: a ratio for all or by group, pattern and role; chosen roles; exclusions."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torchshear.dependency import FAMILIES, ROLES, ChannelGroup, ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.graph import as_names, close_to, matches
from torchshear.pruners._factors import lesser_factors

Ratio = float | Mapping[str, float]

_MAKERS = frozenset({"out", "embedding"})


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of a group.

    Attributes:
        ratio: fraction of the units to remove, in [0, 1); None if the group is to stay whole.
        reason: why it stays whole, else "".
    """

    ratio: float | None
    reason: str = ""


def choose_targets(
    groups: ChannelGroups, ratio: Ratio, axes: str | Collection[str] | None, exclude: str | Collection[str]
) -> dict[str, Target]:
    """What is asked of each group.

    Args:
        groups: the analysed network.
        ratio: a fraction for every group, or a mapping; of the keys that fit a group counts, in this order, its name, a
            pattern of names, its role, a role that stands for narrower ones, and "*". What no key fits stays whole, and
            so does a factor of channels of which another shrinks, unless a key is its name.
        axes: roles that may shrink; None for all.
        exclude: patterns of names; a group with a member that one of them fits stays whole. Names of groups, too.

    Returns:
        Group name -> what is asked of it.

    Raises:
        ArgumentError: a ratio is outside [0, 1); a role, key or pattern is unknown, fits nothing, or decides nothing;
            two patterns ask different ratios of one group; nothing that can shrink is left.
    """
    kept = _Kept(groups, _as_roles(groups, axes), as_names("exclude", exclude))
    asked = _Asked(groups, ratio) if isinstance(ratio, Mapping) else None
    if asked is None:
        check_ratio("ratio", ratio)
    targets: dict[str, Target] = {}
    for group in groups:
        reason = kept.reason(group)
        if reason:
            targets[group.name] = Target(None, reason)
        else:
            targets[group.name] = Target(float(ratio)) if asked is None else asked.of(group)  # type: ignore[arg-type]
    shrinking = {group.name for group in groups.prunable if targets[group.name].ratio}
    for name, greater in lesser_factors(groups, shrinking).items():
        if asked is None or not asked.names(name):
            targets[name] = Target(None, f"a factor of channels that shrink with {greater!r}")
    if asked is not None:
        asked.check_all_used(targets)
    _check_something_left(groups, targets, axes, exclude)
    return targets


def check_ratio(what: str, ratio: object) -> None:
    """Raise ArgumentError unless a ratio is a number in [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise ArgumentError(
            f"{what}={ratio!r}; expected a number in [0, 1), the fraction of channels to remove, or a mapping to such "
            f"numbers from roles, name patterns or groups."
        )


def _as_roles(groups: ChannelGroups, axes: str | Collection[str] | None) -> tuple[frozenset[str], tuple[str, ...]]:
    """The roles that may shrink, narrower ones included, and as they were given."""
    if axes is None:
        return frozenset(ROLES), ()
    names = as_names("axes", axes)
    if not names:
        raise ArgumentError(f"axes={axes!r} names no role, so nothing could shrink; leave it away to prune all.")
    for name in names:
        if name not in ROLES:
            raise ArgumentError(f"axes: {name!r} is no role; {_roles_here(groups)}{close_to(name, ROLES)}")
        if not any(group.role in _narrower(name) for group in groups):
            raise ArgumentError(f"axes: no group has the role {name!r}; {_roles_here(groups)}")
    return frozenset(role for name in names for role in _narrower(name)), names


def _narrower(role: str) -> tuple[str, ...]:
    return FAMILIES.get(role, (role,))


def _roles_here(groups: ChannelGroups) -> str:
    """The roles in this model with the number of their groups, and the others that there are."""
    counts = Counter(group.role for group in groups)
    here = ", ".join(f"{role} ({counts[role]})" for role in ROLES if counts[role]) or "none"
    return f"roles of this model's groups are {here}; other roles are {', '.join(r for r in ROLES if not counts[r])}."


def _names_of(groups: ChannelGroups) -> dict[str, tuple[str, ...]]:
    """Canonical name of each parameter, buffer and constant -> all of its names."""
    names = {name: [name] for name in groups.graph.state}
    for alias, name in groups.graph.aliases.items():
        if alias != name and name in names:
            names[name].append(alias)
    return {name: tuple(found) for name, found in names.items()}


def _known_names(groups: ChannelGroups) -> list[str]:
    """Names of parameters and of the modules that hold them."""
    names = [name for found in _names_of(groups).values() for name in found]
    return [".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2)]


class _Kept:
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
                for name, aliases in _names_of(groups).items()
                for alias in aliases
                if matches(pattern, alias)
            }
            if not found:
                raise ArgumentError(
                    f"exclude: {pattern!r} fits no parameter, module or channel group of {groups.graph.model_type}. "
                    f"Expected names as in named_parameters(), where * stands for anything.{_close(groups, pattern)}"
                )
            for name, alias in found.items():
                self._excluded.setdefault(name, f"excluded by {pattern!r}: {alias}")
        self._named = frozenset(exclude) & group_names

    def reason(self, group: ChannelGroup) -> str:
        """Why a group stays whole, or ""."""
        if group.name in self._named:
            return "excluded by its name"
        for member in group.members:
            if member.name in self._excluded:
                return self._excluded[member.name]
        if group.role not in self._allowed:
            return f"its role {group.role!r} is not among axes={', '.join(self._given)}"
        return ""


def _close(groups: ChannelGroups, word: str) -> str:
    return close_to(word, [*_known_names(groups), *(group.name for group in groups)])


class _Asked:
    """Ratios by group, pattern and role."""

    def __init__(self, groups: ChannelGroups, ratios: Mapping[str, float]) -> None:
        self._groups = groups
        self._ratios = dict(ratios)
        if not self._ratios:
            raise ArgumentError("ratio is an empty mapping; expected ratios by role, name pattern or group.")
        as_names("keys of ratio", self._ratios)
        for key, ratio in self._ratios.items():
            check_ratio(f"ratio[{key!r}]", ratio)
        names = {group.name for group in groups}
        self._patterns = [key for key in self._ratios if key not in names and key not in ROLES and key != "*"]
        self._aliases = _names_of(groups)
        self._deciding: dict[str, str] = {}

    def of(self, group: ChannelGroup) -> Target:
        """What the most telling key asks of a group."""
        for key in self._fitting(group):
            self._deciding[group.name] = key
            return Target(float(self._ratios[key]))
        return Target(None, "no key of ratio fits it")

    def names(self, group: str) -> bool:
        """Whether a key is the name of this very group."""
        return group in self._ratios

    def _fitting(self, group: ChannelGroup) -> Iterable[str]:
        """Keys that fit a group, the most telling first."""
        if group.name in self._ratios:
            yield group.name
        yield from self._one_pattern(group)
        if group.role in self._ratios:
            yield group.role
        yield from (name for name, roles in FAMILIES.items() if group.role in roles[1:] and name in self._ratios)
        if "*" in self._ratios:
            yield "*"

    def _one_pattern(self, group: ChannelGroup) -> list[str]:
        fitting = self._patterns_of(group)
        if len({self._ratios[key] for key in fitting}) > 1:
            asked = " and ".join(f"{key!r} asks {self._ratios[key]}" for key in fitting)
            raise ArgumentError(
                f"ratio: group {group.name!r} (role {group.role}) is made by layers of several patterns: {asked}. Give "
                f"it a ratio under its own name, or write patterns that do not overlap in it."
            )
        return fitting[:1]

    def _patterns_of(self, group: ChannelGroup) -> list[str]:
        """Patterns that fit a layer which makes the group's units; layers that only read them do not count."""
        makers = [member for member in group.members if member.roles & _MAKERS]
        makers = makers or [member for member in group.members if member.roles != {"in"}] or list(group.members)
        names = {alias for member in makers for alias in self._aliases.get(member.name, (member.name,))}
        return [key for key in self._patterns if any(matches(key, name) for name in names)]

    def check_all_used(self, targets: Mapping[str, Target]) -> None:
        """Raise ArgumentError for a key that decides nothing."""
        can_shrink = {group.name for group in self._groups.prunable}
        used = {key for name, key in self._deciding.items() if name in can_shrink}
        for key in self._ratios:
            if key not in used and key != "*":
                raise ArgumentError(f"ratio: the key {key!r} decides nothing: {self._why_unused(key, targets)}")

    def _why_unused(self, key: str, targets: Mapping[str, Target]) -> str:
        meant = [group for group in self._groups if self._fits(key, group)]
        for group in meant:
            if targets[group.name].reason:
                return f"group {group.name!r} stays whole, {targets[group.name].reason}."
            if not group.is_prunable:
                return f"group {group.name!r} cannot shrink: {group.reason}."
            return f"for group {group.name!r} the key {self._deciding[group.name]!r} comes first."
        if key in ROLES:
            return f"no group has that role; {_roles_here(self._groups)}"
        for fixed in self._groups.fixed:
            if any(matches(key, alias) for alias in self._aliases.get(fixed.name, (fixed.name,))):
                return f"what it names makes no channel group; {fixed.name}[{fixed.dim}] is fixed: {fixed.reason}."
        if any(matches(key, alias) for aliases in self._aliases.values() for alias in aliases):
            return "what it names makes no channel group."
        close = close_to(key, [*ROLES, *_known_names(self._groups), *(group.name for group in self._groups)])
        return f"it is no channel group and no role, and fits no parameter or module.{close}"

    def _fits(self, key: str, group: ChannelGroup) -> bool:
        return key == group.name or group.role in _narrower(key) or key in self._patterns_of(group)


def _check_something_left(groups: ChannelGroups, targets: Mapping[str, Target], axes: object, exclude: object) -> None:
    """Raise ArgumentError if what was asked leaves nothing of all that could shrink."""
    if not groups.prunable or any(targets[group.name].ratio is not None for group in groups.prunable):
        return
    asked = ", ".join(f"{name}={given!r}" for name, given in (("axes", axes), ("exclude", exclude)) if given)
    stuck = next((group for group in groups if targets[group.name].ratio is not None), None)
    why = f" Group {stuck.name!r} cannot: {stuck.reason}." if stuck is not None else ""
    raise ArgumentError(f"{asked} leaves nothing that can shrink.{why} {_roles_here(groups)}")
