"""Weights that the network computes of its own tensors: under masks, weight norms and other parametrizations."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, fx

from torchshear.dependency.algebra._axis import Algebra
from torchshear.dependency.groups._groups import ChannelGroup, ChannelGroups
from torchshear.dependency.rules._findings import Facts
from torchshear.dependency.rules._weights import unwrap_moves
from torchshear.graph import Graph
from torchshear.graph._nodes import ancestors, format_arguments, is_from_state
from torchshear.graph._operator_record import operator_of


def carrier_of(node: fx.Node, algebra: Algebra, facts: Facts) -> fx.Node | None:
    """Find the tensor of the model that a computed weight stands for, position by position.

    It is the first that it is computed of: the dense weight under a mask, the direction under a weight norm.

    Args:
        node: any node, all operands of which have their axes.
        algebra: the relations between units.
        facts: what is known of the graph so far.

    Returns:
        The node of that tensor; None if the value depends on an input, is no tensor, or stands for none.
    """
    axes = facts.axes.get(node.name)
    if not is_from_state(node) or not isinstance(node.meta.get("val"), Tensor) or not isinstance(axes, tuple):
        return None
    for held in ancestors(node):
        own = facts.axes.get(held.name) if held.op == "get_attr" else None
        if isinstance(own, tuple) and [axis.size for axis in own] == [axis.size for axis in axes]:
            pairs = zip(axes, own, strict=True)
            rows = [(algebra.store.resolve(one.units), algebra.store.resolve(other.units)) for one, other in pairs]
            if all(np.array_equal(one, other) for one, other in rows):
                return held
    return None


def computed_weights(groups: ChannelGroups) -> dict[str, tuple[fx.Node, ...]]:
    """Find the parameters in whose place the network reads a value that it computes of them.

    Args:
        groups: the analysed network.

    Returns:
        Canonical name of a parameter -> the nodes that give that value, of the parameter's shape; several where a
        module is called more than once. A parameter that is also read as it is, or of which different values are
        computed, is left out.
    """
    state = groups.graph.state
    read = list(_read(groups.graph))
    direct = {str(node.target) for node in read if node.op == "get_attr"}
    found: dict[str, list[fx.Node]] = {}
    for node in dict.fromkeys(read):
        held = groups.facts.carriers.get(node.name)
        if held is not None and state[str(held.target)].kind == "parameter" and str(held.target) not in direct:
            found.setdefault(str(held.target), []).append(node)
    alike = {name: nodes for name, nodes in found.items() if len({_expression(node) for node in nodes}) == 1}
    return {name: tuple(nodes) for name, nodes in alike.items()}


def _expression(node: fx.Node) -> str:
    """Return the computation of a value as a text."""
    parts = [part for part in ancestors(node) if not operator_of(part).keeps_positions]
    labels = {part: f"%{number}" for number, part in enumerate(parts)}
    return ";".join(f"{part.target}{format_arguments((part.args, part.kwargs), labels)}" for part in parts)


def _read(graph: Graph) -> Iterator[fx.Node]:
    """Yield the values computed of the model's own tensors alone that calls with other operands read."""
    for node in graph:
        if is_from_state(node) and any(not is_from_state(user) for user in node.users):
            yield unwrap_moves(node)[0]


def assign_factor_roles(graph: Graph, facts: Facts, groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Give the purpose "factor" to what a weight is computed of beside the tensor that it stands for.

    Args:
        graph: the captured network.
        facts: what rules noted of it.
        groups: its groups.
    """
    read = list(_read(graph))
    direct = {str(node.target) for node in read if node.op == "get_attr"}
    beside: dict[str, set[str]] = {}
    for node in read:
        held = facts.carriers.get(node.name)
        for other in ancestors(node) if held is not None else ():
            if other.op == "get_attr" and other is not held and str(other.target) not in direct:
                beside.setdefault(str(other.target), set()).add(str(held.target))  # type: ignore[union-attr]
    found, factor = [], frozenset({"factor"})
    for group in groups:
        names = {member.name for member in group.members}
        members = (replace(m, purposes=factor) if names & beside.get(m.name, set()) else m for m in group.members)
        found.append(replace(group, members=tuple(members)))
    return tuple(found)
