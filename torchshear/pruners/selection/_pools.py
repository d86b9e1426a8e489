"""Pools of groups that are ranked against one another, and the order in which their units go.

A group narrows in steps from one width that it may have to the next. A pool puts the steps of its groups into one
order, the least worth first; how far each pool goes is decided elsewhere, by a share of its units or by a budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import numpy.typing as npt

from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.groups._network import Value

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ROUNDS = 3  # of neighbourhoods that tell graphs apart


@dataclass(frozen=True, slots=True, eq=False)
class WidthSteps:
    """Widths that a group passes through, one step after another.

    Attributes:
        group: the group.
        widths: from its own width down to the narrowest, shape (n_steps + 1,).
        order: its units in the order in which they go, shape (C,); None where that is not known yet.
        scores: scores of the units, shape (C,), -inf for units that are gone already; None likewise.
        n_forced: number of steps that are taken whatever the scores.
        pool: name of the pool; groups of the same pool are ranked together.
        speed: relative share that is to go, where groups differ in it.
    """

    group: ChannelGroup
    widths: Indices
    order: Indices | None = None
    scores: Floats | None = None
    n_forced: int = 0
    pool: str = ""
    speed: float = 1.0

    @property
    def most(self) -> int:
        """Largest number of units that can go."""
        return int(self.widths[0] - self.widths[-1])


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Steps of several groups, in the order in which they are taken.

    Attributes:
        group: number of the group of each step.
        size: units that go with it.
        is_forced: whether it is taken in any case.
        key: by which pools go side by side: share of the pool that is gone after it.
        pool: the pool of each step.
    """

    group: Indices
    size: Indices
    is_forced: npt.NDArray[np.bool_]
    key: Floats
    pool: npt.NDArray[np.str_]


def rank(width_steps: Sequence[WidthSteps], normalize: bool) -> Steps:
    """Put the steps of all groups into the order in which they are taken.

    Forced steps come first. Within a pool, steps go by the mean score of their units, the lowest first; among equal
    ones those of the earlier group first. Steps of a group without scores go by the share of its units that is gone.

    Args:
        width_steps: one of each group that may shrink.
        normalize: whether scores are divided by their mean over the group first.
    """
    group = np.concatenate([np.full(len(one.widths) - 1, i) for i, one in enumerate(width_steps)]).astype(np.int64)
    size = np.concatenate([-np.diff(one.widths) for one in width_steps]).astype(np.int64)
    number = np.concatenate([np.arange(len(one.widths) - 1) for one in width_steps])
    is_forced = np.concatenate([np.arange(len(one.widths) - 1) < one.n_forced for one in width_steps])
    worth = np.concatenate([_worth(one, normalize) for one in width_steps])
    pool = np.array([width_steps[i].pool for i in group])
    order = np.lexsort((number, group, worth, ~is_forced))
    key = np.zeros(len(order))
    for name in np.unique(pool):
        here = order[pool[order] == name]
        members = [one for one in width_steps if one.pool == name]
        key[here] = np.cumsum(size[here]) / sum(one.group.width for one in members) / members[0].speed
    order = order[np.lexsort((key[order], ~is_forced[order]))]
    return Steps(group[order], size[order], is_forced[order], key[order], pool[order])


def _worth(one: WidthSteps, normalize: bool) -> Floats:
    """Return the mean score of the units of each step, never falling from one step to the next."""
    gone = one.widths[0] - one.widths
    if one.scores is None or one.order is None:
        return np.asarray(gone[1:] / one.group.width, np.float64)
    if len(gone) == 1:
        return np.zeros(0)
    scores = one.scores[one.order]
    mean = float(np.abs(scores[np.isfinite(scores)]).mean()) if np.isfinite(scores).any() else 0.0
    scores = scores / mean if normalize and mean else scores
    sums = np.add.reduceat(scores[: gone[-1]], gone[:-1])
    return np.asarray(np.maximum.accumulate(sums / np.diff(gone)), np.float64)


def take_share(steps: Steps, room: Mapping[str, int], n_groups: int) -> Indices:
    """Take steps of each pool as long as they fit into the number of units that are to go.

    A step that does not fit is the last one looked at in its group; steps of other groups may still fit.

    Args:
        steps: the steps in order.
        room: pool -> units that are to go.
        n_groups: number of groups that have steps.

    Returns:
        Number of steps taken in each group, shape (n_groups,).
    """
    left = dict(room)
    taken, is_open = np.zeros(n_groups, np.int64), np.ones(n_groups, bool)
    for group, size, pool in zip(steps.group.tolist(), steps.size.tolist(), steps.pool.tolist(), strict=True):
        if not is_open[group]:
            continue
        if size <= left[pool]:
            left[pool] -= size
            taken[group] += 1
        else:
            is_open[group] = False
    return taken


def isomorphism_classes(groups: ChannelGroups) -> dict[str, str]:
    """Return the class of each group by name: groups whose operators and parameters form the same graph, sizes aside.

    The graph of a group holds every value along which its units run, labelled by operator or, for a parameter, by the
    purposes of its dimensions. Graphs are compared by Weisfeiler-Lehman hashes.

    Args:
        groups: the analysed network.

    Reference: Fang et al., ECCV 2024, arXiv:2407.04616, which ranks isomorphic sub-structures together.
    """
    values = groups.describe()
    by_name = {value.name: value for value in values}
    along: dict[int, list[Value]] = {}
    for value in values:
        for number in value.groups:
            along.setdefault(number, []).append(value)
    return {group.name: _hash(group, along.get(number, []), by_name) for number, group in enumerate(groups)}


def _hash(group: ChannelGroup, values: Sequence[Value], by_name: Mapping[str, Value]) -> str:
    purposes = {(member.name, member.dim): ",".join(sorted(member.purposes)) for member in group.members}
    graph: nx.Graph[str] = nx.Graph()
    for value in values:
        of = [purpose for (name, _), purpose in sorted(purposes.items()) if name == value.state]
        graph.add_node(value.name, label=f"{value.operator or value.kind}:{';'.join(of)}")
    for value in values:
        graph.add_edges_from((operand, value.name) for operand in value.operands if operand in graph)
    return f"{group.role}:{nx.weisfeiler_lehman_graph_hash(graph, node_attr='label', iterations=_ROUNDS)}"
