"""The request for a plan: criterion, share or budget, and limits; values by role, pattern of names or group."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from torchshear._arguments import MOST, close_names, is_share, is_whole, matches, parse_names, quote
from torchshear.dependency import ROLES, ChannelGroup, ChannelGroups
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.rules._role_evidence import FAMILIES
from torchshear.errors import ArgumentError
from torchshear.pruners.criteria._criterion import Criterion, find_criterion, is_per_cost
from torchshear.pruners.selection._latency import check_latency
from torchshear.pruners.selection._scoring import GROUP_REDUCTIONS
from torchshear.pruners.selection._size import FileOverhead, parse_size

SCOPES: Final[Mapping[str, str]] = {
    "auto": "global under targets of MACs, parameters or size where scores say what a cut costs in loss, else local",
    "local": "every group loses its own share",
    "global": "units of all groups are ranked together",
    "isomorphic": "units of groups with the same operators around them are ranked together",
}
"""Scope -> which units are ranked against one another."""

_ANY_WIDTH: Final = Alignment.none()
NORMALIZE: Final = ("auto", "mean", "none")
_WEIGHTS: Final = frozenset({"weight", "weight_orig", "weight_v"})  # the latter of hooks of `torch.nn.utils`
_MAKERS = frozenset({"out", "embedding"})

Ratio = float | Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Request for a plan; `torchshear.plan` explains each field but `file`.

    A target of size is of tensors alone where `file`, what real files take beside them, is None.

    Raises:
        ArgumentError: a value is outside what it may be, or two contradict each other.
    """

    criterion: str | Criterion = "l1"
    ratio: Ratio | None = None
    scope: str = "auto"
    target_macs: float | None = None
    target_params: float | None = None
    target_size: float | str | None = None
    file: FileOverhead | None = None
    target_latency: float | str | None = None
    min_ratio: Ratio = 0.0
    max_ratio: Ratio | None = None
    alignment: Alignment = _ANY_WIDTH
    min_width: int = 1
    roles: str | Collection[str] | None = None
    exclude: str | Collection[str] = ()
    group_reduction: str = "sum"
    normalize: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what means nothing; what only a network can tell is refused when a plan is made."""
        for name, words in (("scope", SCOPES), ("group_reduction", GROUP_REDUCTIONS), ("normalize", NORMALIZE)):
            word = getattr(self, name)
            if not isinstance(word, str) or word not in words:
                raise ArgumentError(
                    f"{name}={word!r}; expected one of {', '.join(words)}.{close_names(str(word), words)}"
                )
        if not is_whole(self.min_width) or not 1 <= self.min_width <= MOST:
            raise ArgumentError(
                f"min_width={self.min_width!r}; expected an integer of at least 1, the fewest channels to keep."
            )
        for name in ("target_macs", "target_params"):
            target: Any = getattr(self, name)
            is_number = isinstance(target, int | float | np.integer | np.floating) and not isinstance(target, bool)
            is_share_left = is_number and 0 < target <= 1
            is_amount = is_number and target >= 2 and (is_whole(target) or target == math.inf or target.is_integer())
            if target is not None and not is_share_left and not is_amount:
                raise ArgumentError(
                    f"{name}={target!r}; expected what may be left: a share of the dense model in (0, 1], or a whole "
                    f"number of at least 2."
                )
        if self.target_size is not None:
            parse_size(self.target_size)
        if self.target_latency is not None:
            check_latency(self.target_latency, ratio=self.ratio, scope=self.scope, normalize=self.normalize)
        elif self.has_budget and self.ratio is not None and not isinstance(self.ratio, Mapping):
            raise ArgumentError(
                f"ratio={self.ratio} and a target both say how much is to go; give one. A "
                f"mapping of ratios may stand beside a target, and says how fast groups shrink beside each other."
            )
        if self.ratio is not None and not isinstance(self.ratio, Mapping):
            check_ratio("ratio", self.ratio)

    @property
    def has_budget(self) -> bool:
        """True if a target of MACs, parameters or size is given."""
        return not (self.target_macs is None and self.target_params is None and self.target_size is None)

    @property
    def pooling(self) -> str:
        """The scope, "local", "global" or "isomorphic", that "auto" stands for here."""
        if self.scope != "auto":
            return self.scope
        return (
            "global"
            if self.has_budget and self.ratio is None and is_per_cost(find_criterion(self.criterion))
            else "local"
        )

    @property
    def shares(self) -> Ratio:
        """The ratio, or the default one."""
        return 0.5 if self.ratio is None else self.ratio

    def to_json(self) -> dict[str, Any]:
        """Return the request as plain data, without fields at their default; the first four are always there."""
        criterion = self.criterion
        said: dict[str, Any] = {
            "criterion": criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom"),
            "alignment": self.alignment.name,
            "min_width": self.min_width,
        }
        if self.ratio is not None or not (self.has_budget or self.target_latency is not None):
            said["ratio"] = _plain(self.shares)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in (*said, "alignment", "ratio", "file") and value != field.default:
                said[field.name] = (
                    [value] if field.name in ("roles", "exclude") and isinstance(value, str) else _plain(value)
                )
        return said


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, Collection) and not isinstance(value, str) else value


def check_ratio(what: str, ratio: object) -> None:
    """Raise ArgumentError unless a ratio is a number in [0, 1)."""
    if not is_share(ratio):
        raise ArgumentError(
            f"{what}={quote(ratio)}; expected a number in [0, 1), the fraction of channels to remove, or a mapping to "
            f"such numbers from roles, name patterns or groups."
        )


def narrower(role: str) -> tuple[str, ...]:
    """A role and the narrower ones that it stands for."""
    return FAMILIES.get(role, (role,))


def roles_here(groups: ChannelGroups) -> str:
    """The roles in this model with the number of their groups, and the others that there are."""
    counts = Counter(group.role for group in groups)
    here = ", ".join(f"{role} ({counts[role]})" for role in ROLES if counts[role]) or "none"
    return f"roles of this model's groups are {here}; other roles are {', '.join(r for r in ROLES if not counts[r])}."


def names_of(groups: ChannelGroups) -> dict[str, tuple[str, ...]]:
    """Canonical name of each parameter, buffer and constant -> all of its names."""
    names = {name: [name] for name in groups.graph.state}
    for alias, name in groups.graph.aliases.items():
        if alias != name and name in names:
            names[name].append(alias)
    return {name: tuple(found) for name, found in names.items()}


def known_names(groups: ChannelGroups) -> list[str]:
    """Names of parameters and of the modules that hold them."""
    names = [name for found in names_of(groups).values() for name in found]
    return [".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2)]


def layer_of(weight: str) -> str:
    """Return the name of a weight's layer: its module, or the weight where a module has several (`in_proj_weight`)."""
    module, attribute = owner_of(weight)
    return module if attribute in _WEIGHTS else weight


def owner_of(parameter: str) -> tuple[str, str]:
    """The module that a parameter is of, and its attribute there; of what is kept for a parametrization, its layer."""
    module, found, rest = f".{parameter}".partition(".parametrizations.")
    if not found:
        module, _, rest = parameter.rpartition(".")
    return module.removeprefix("."), rest.partition(".")[0]


class PerGroupRatio:
    """Shares by group, pattern and role.

    Args:
        groups: the analysed network.
        what: name of the argument that they were given as.
        ratios: key -> share.

    Raises:
        ArgumentError: there is none, or one is outside [0, 1).
    """

    def __init__(self, groups: ChannelGroups, what: str, ratios: Mapping[str, float]) -> None:
        self._groups = groups
        self._what = what
        self._ratios = dict(ratios)
        if not self._ratios:
            raise ArgumentError(f"{what} is an empty mapping; expected ratios by role, name pattern or group.")
        parse_names(f"keys of {what}", self._ratios)
        for key, ratio in self._ratios.items():
            check_ratio(f"{what}[{key!r}]", ratio)
        names = {group.name for group in groups}
        self._patterns = [key for key in self._ratios if key not in names and key not in ROLES and key != "*"]
        self._aliases = names_of(groups)
        self._deciding: dict[str, str] = {}

    def of(self, group: ChannelGroup) -> float | None:
        """Return the share under the most specific key that fits a group, or None."""
        key = self.key_of(group)
        return None if key is None else float(self._ratios[key])

    def key_of(self, group: ChannelGroup) -> str | None:
        """The most telling key that fits a group, or None."""
        for key in self._fitting(group):
            self._deciding[group.name] = key
            return key
        return None

    def names(self, group: str) -> bool:
        """Return whether a key is the name of this very group."""
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
                f"{self._what}: group {group.name!r} (role {group.role}) is made by layers of several patterns: "
                f"{asked}. Give it a ratio under its own name, or write patterns that do not overlap in it."
            )
        return fitting[:1]

    def _patterns_of(self, group: ChannelGroup) -> list[str]:
        """Patterns that fit a layer which makes the group's units; layers that only read them do not count."""
        makers = [member for member in group.members if member.purposes & _MAKERS]
        makers = makers or [member for member in group.members if member.purposes != {"in"}] or list(group.members)
        names = {alias for member in makers for alias in self._aliases.get(member.name, (member.name,))}
        return [key for key in self._patterns if any(matches(key, name) for name in names)]

    def check_all_used(self, stuck: Mapping[str, str]) -> None:
        """Raise ArgumentError for a key that decides nothing.

        Args:
            stuck: name of a group that stays whole for another reason -> the reason.
        """
        can_shrink = {group.name for group in self._groups.prunable}
        used = {key for name, key in self._deciding.items() if name in can_shrink}
        for key in self._ratios:
            if key not in used and key != "*":
                raise ArgumentError(f"{self._what}: the key {key!r} decides nothing: {self._why_unused(key, stuck)}")

    def _why_unused(self, key: str, stuck: Mapping[str, str]) -> str:
        meant = [group for group in self._groups if self._fits(key, group)]
        for group in meant:
            if group.name in stuck:
                return f"group {group.name!r} stays whole, {stuck[group.name]}."
            if not group.is_prunable:
                return f"group {group.name!r} cannot shrink: {group.reason}."
            return f"for group {group.name!r} the key {self._deciding[group.name]!r} comes first."
        if key in ROLES:
            return f"no group has that role; {roles_here(self._groups)}"
        for fixed in self._groups.fixed:
            if any(matches(key, alias) for alias in self._aliases.get(fixed.name, (fixed.name,))):
                return f"what it names makes no channel group; {fixed.name}[{fixed.dim}] is fixed: {fixed.reason}."
        if any(matches(key, alias) for aliases in self._aliases.values() for alias in aliases):
            return "what it names makes no channel group."
        close = close_names(key, [*ROLES, *known_names(self._groups), *(group.name for group in self._groups)])
        return f"it is no channel group and no role, and fits no parameter or module.{close}"

    def _fits(self, key: str, group: ChannelGroup) -> bool:
        return key == group.name or group.role in narrower(key) or key in self._patterns_of(group)
