"""All that is to be known about a channel group: members with positions and source lines, constraints and reasons."""

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import fx

from torchshear._arguments import check_kind
from torchshear.dependency import Axis, ChannelGroup, ChannelGroups, Member
from torchshear.dependency.groups._groups import check_groups
from torchshear.errors import ArgumentError
from torchshear.graph import Graph
from torchshear.graph._location import locate

_RANGES = 4  # runs of positions that are written out


@dataclass(frozen=True, slots=True)
class Constraint:
    """Limit on the choice of units in a group, or on the meaning of cutting them.

    Attributes:
        kind: "minimum", "balanced", "tied blocks", "cross-channel" or "fixed".
        text: what it demands, in a phrase.
        where: the operators that demand it, with module and source line; empty where no single one does.
    """

    kind: str
    text: str
    where: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MemberDetail:
    """A dimension that shrinks with a group.

    Attributes:
        name: qualified name of the parameter or buffer.
        dim: the dimension.
        kind: "parameter", "buffer" or "constant".
        shape: sizes of the tensor.
        purposes: what the dimension is for, sorted; see `torchshear.dependency.Member`.
        size: positions that the dimension has, all blocks together.
        n_positions: how many of them lie in the group.
        multiplicity: the fewest positions that go with one unit.
        first: the positions that go with unit 0, as "0, 8..15".
        n_blocks: 0, or the number of blocks of dimension 0 that hold other positions each.
        where: the operators that read the tensor, with module and source line.
    """

    name: str
    dim: int
    kind: str
    shape: tuple[int, ...]
    purposes: tuple[str, ...]
    size: int
    n_positions: int
    multiplicity: int
    first: str
    n_blocks: int
    where: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GroupDetail:
    """A channel group in words and numbers.

    Attributes:
        number: its place among the groups of the network, from 0.
        name: its name.
        width: number of units.
        max_cut: the most units that can be cut.
        is_prunable: whether any can.
        reason: why none can, or None.
        n_blocks: blocks that lose equally many; 1 where there is no balance.
        is_cross_channel: whether a norm, a softmax or a mean runs over the units.
        role: what its units are for, one of `torchshear.dependency.ROLES`.
        purposes: what its dimensions are for, over all members, sorted.
        n_params: elements of all parameters in which it has a dimension.
        unit_params: parameter elements that go with one unit, on average and as long as all other groups are whole.
        constraints: what limits the choice.
        members: the dimensions that shrink with it.
        where: the first operators that use it.
    """

    number: int
    name: str
    width: int
    max_cut: int
    is_prunable: bool
    reason: str | None
    n_blocks: int
    is_cross_channel: bool
    role: str
    purposes: tuple[str, ...]
    n_params: int
    unit_params: float
    constraints: tuple[Constraint, ...]
    members: tuple[MemberDetail, ...]
    where: tuple[str, ...]


def describe_groups(groups: ChannelGroups) -> tuple[GroupDetail, ...]:
    """Describe every channel group of a network.

    Args:
        groups: the analysed network.

    Returns:
        One description a group, in their order.
    """
    check_groups(groups)
    users = _users(groups.graph)
    demands = _demands(groups)
    return tuple(_detail(groups.graph, number, group, users, demands[number]) for number, group in enumerate(groups))


def find_group(groups: ChannelGroups, text: str) -> int:
    """Find the number of the group that a name stands for.

    Args:
        groups: the analysed network.
        text: its number; its name; or a member as "name[dim]", or as "name" if all its dimensions are in one group.

    Returns:
        Its number, from 0.

    Raises:
        ArgumentError: no group, or more than one, fits.
    """
    check_groups(groups)
    check_kind("text", text, str, "the number or the name of a group")
    if re.fullmatch(r"-?[0-9]+", text):
        if 0 <= int(text) < len(groups):
            return int(text)
        known = f"0 to {len(groups) - 1}" if groups else "none: no dimension of this network can shrink"
        raise ArgumentError(f"no channel group of number {text}. Expected the number or name of one; numbers: {known}.")
    names = [group.name for group in groups]
    if text in names:
        return names.index(text)
    inside: dict[str, set[int]] = defaultdict(set)
    for number, group in enumerate(groups):
        for member in group.members:
            inside[member.name].add(number)
            inside[f"{member.name}[{member.dim}]"].add(number)
    found = sorted(inside.get(text, ()))
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f"{number} ({names[number]})" for number in found)
        raise ArgumentError(f"{text!r} lies in {len(found)} channel groups: {several}. Give the number of one of them.")
    near = difflib.get_close_matches(text, [*names, *inside], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ArgumentError(
        f"no channel group {text!r}.{hint} Expected the number or name of a group, or one of its members."
    )


def _users(graph: Graph) -> dict[str, tuple[str, ...]]:
    """For each tensor of the model the operators that read it, those of the training graph after the others."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for part in _graphs(graph):
        for node in part:
            if node.op == "get_attr":
                found[str(node.target)].update(dict.fromkeys(str(locate(user)) for user in node.users))
    return {name: tuple(where) for name, where in found.items()}


def _graphs(graph: Graph) -> list[Graph]:
    return [graph] if graph.training is None else [graph, graph.training]


def _demands(groups: ChannelGroups) -> dict[int, list[Constraint]]:
    """Collect the demands of operators on each group: balance, and statistics over its units."""
    store = groups.algebra.store
    group_of = np.full(len(store), -1, np.int64)
    for number, group in enumerate(groups):
        group_of[group.atoms] = number

    def along(axis: Axis) -> Iterator[int]:
        return (int(number) for number in np.unique(group_of[store.resolve(axis.units)]) if number >= 0)

    found: dict[int, list[Constraint]] = defaultdict(list)
    blocks: dict[tuple[int, int], dict[str, None]] = defaultdict(dict)
    for balance in groups.facts.balances:
        for number in along(balance.axis):
            blocks[number, balance.n_blocks][str(locate(balance.node))] = None
    for (number, n_blocks), where in blocks.items():
        found[number].append(_balance(groups[number], n_blocks, tuple(where)))
    for number, places in _mixers(groups, along).items():
        text = "a norm, a softmax or a mean runs over its units: cutting them is not the same as zeroing them"
        found[number].append(Constraint("cross-channel", text, tuple(places)))
    return found


def _balance(group: ChannelGroup, n_blocks: int, where: tuple[str, ...]) -> Constraint:
    if group.balance is None:
        return Constraint("tied blocks", f"the {n_blocks} blocks of an axis lose the same positions", where)
    return Constraint("balanced", f"each of {n_blocks} blocks loses equally many units", where)


def _mixers(groups: ChannelGroups, along: Callable[[Axis], Iterable[int]]) -> dict[int, dict[str, None]]:
    found: dict[int, dict[str, None]] = defaultdict(dict)
    for graph, facts in zip(_graphs(groups.graph), (groups.facts, groups.training_facts), strict=False):
        nodes: dict[str, fx.Node] = {node.name: node for node in graph}
        for name, axes in facts.cross_channel.items() if facts is not None else ():
            for axis in axes:
                for number in along(axis):
                    found[number][str(locate(nodes[name]))] = None
    return found


def _detail(
    graph: Graph, number: int, group: ChannelGroup, users: dict[str, tuple[str, ...]], demands: list[Constraint]
) -> GroupDetail:
    first = Constraint("fixed", group.reason) if group.reason else Constraint("minimum", _minimum(group))
    parameters = {m.name: graph.state[m.name] for m in group.members if graph.state[m.name].kind == "parameter"}
    unit_params = sum(
        m.positions.size * prod(parameters[m.name].shape) / m.size for m in group.members if m.name in parameters
    )
    return GroupDetail(
        number=number,
        name=group.name,
        width=group.width,
        max_cut=group.max_cut,
        is_prunable=group.is_prunable,
        reason=group.reason,
        n_blocks=group.n_blocks,
        is_cross_channel=group.is_cross_channel,
        role=group.role,
        purposes=tuple(sorted(frozenset().union(*(member.purposes for member in group.members)))),
        n_params=sum(prod(entry.shape) for entry in parameters.values()),
        unit_params=unit_params / group.width,
        constraints=(first, *demands),
        members=tuple(_member(graph, member, users.get(member.name, ())) for member in group.members),
        where=group.where,
    )


def _minimum(group: ChannelGroup) -> str:
    left = group.width - group.max_cut
    return f"at least {left} of {group.width} unit{'s' * (group.width > 1)} stay{'s' * (left == 1)}"


def _member(graph: Graph, member: Member, where: tuple[str, ...]) -> MemberDetail:
    return MemberDetail(
        name=member.name,
        dim=member.dim,
        kind=graph.state[member.name].kind,
        shape=graph.state[member.name].shape,
        purposes=tuple(sorted(member.purposes)),
        size=member.size,
        n_positions=len(np.unique(member.positions)),
        multiplicity=member.multiplicity,
        first=_as_ranges(member.positions[member.units == 0]),
        n_blocks=member.n_blocks,
        where=where,
    )


def _as_ranges(positions: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> str:
    """Positions as runs, "0, 8..15"; of more than a few the first ones."""
    ordered = np.unique(positions)
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs[:_RANGES]]
    return ", ".join(words) + (", ..." if len(runs) > _RANGES else "")
