"""Weights of layers: those that the network computes of its own tensors, and the scales of the batch norms behind them.

Weights are computed under masks, weight norms and other parametrizations.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, fx

from torchshear.dependency.algebra._axis import Algebra
from torchshear.dependency.groups._groups import ChannelGroup, ChannelGroups
from torchshear.dependency.rules._call import bind_arguments
from torchshear.dependency.rules._findings import Facts
from torchshear.dependency.rules._weights import unwrap_moves, weight_behind
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


def assign_norm_scales(graph: Graph, facts: Facts, groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Note at the outputs of each layer the scale of the only batch norm that reads its result.

    Args:
        graph: the captured network.
        facts: results of the rules.
        groups: its groups.
    """
    # Layers by the call that multiplies with their weight.
    read: dict[fx.Node, list[fx.Node]] = {
        node: [behind[0] for n in node.all_input_nodes if (behind := weight_behind(n, facts.carriers)) is not None]
        for node in graph
        if node.op == "call_function" and not is_from_state(node)
    }
    n_calls = Counter(weight for weights in read.values() for weight in weights)
    # The batch norm that alone reads the result of a layer, which is called once.
    scale_of: dict[str, str] = {}
    for node in read:
        norm = operator_of(node).norm
        if norm is None or norm.over != "batch":
            continue
        given = bind_arguments(node)
        source, scale = given.get(norm.input), given.get(norm.scale)
        if isinstance(source, fx.Node) and isinstance(scale, fx.Node) and len(source.users) == 1:
            weights = [weight for weight in read.get(source, ()) if len(graph.state[str(weight.target)].shape) > 1]
            held = weight_behind(scale, facts.carriers)
            if len(weights) == 1 and n_calls[weights[0]] == 1 and held is not None:
                scale_of[str(weights[0].target)] = str(held[0].target)
    # The scale goes with the outputs of the layer if it stands in the same group.
    found = []
    for group in groups:
        norms = {member.name: member for member in group.members if "norm" in member.purposes}
        members = []
        for member in group.members:
            found_norm = norms.get(scale_of.get(member.name, "")) if "out" in member.purposes else None
            fits = found_norm is not None and found_norm.size == member.size
            members.append(replace(member, norm_scale=found_norm.name) if found_norm is not None and fits else member)
        found.append(replace(group, members=tuple(members)))
    return tuple(found)
