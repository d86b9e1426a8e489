"""Layers and the batch norms behind them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from torchshear.dependency.groups._groups import ChannelGroup
from torchshear.dependency.rules._call import bind_arguments
from torchshear.dependency.rules._findings import Facts
from torchshear.dependency.rules._weights import weight_behind
from torchshear.graph import Graph
from torchshear.graph._nodes import is_from_state
from torchshear.graph._operator_record import operator_of


def assign_norm_scales(graph: Graph, facts: Facts, groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Note at the outputs of each layer the scale of the only batch norm that reads its result.

    Args:
        graph: the captured network.
        facts: results of the rules.
        groups: its groups.
    """
    scale_of = _norm_scales(graph, facts.carriers)
    found = []
    for group in groups:
        norms = {member.name: member for member in group.members if "norm" in member.purposes}
        members = []
        for member in group.members:
            norm = norms.get(scale_of.get(member.name, "")) if "out" in member.purposes else None
            fits = norm is not None and norm.size == member.size
            members.append(replace(member, norm_scale=norm.name) if norm is not None and fits else member)
        found.append(replace(group, members=tuple(members)))
    return tuple(found)


def _norm_scales(graph: Graph, carriers: Mapping[str, fx.Node]) -> dict[str, str]:
    """Map the weight of a layer to the scale of the batch norm that alone reads its result."""
    read: dict[fx.Node, list[fx.Node]] = {
        node: [behind[0] for n in node.all_input_nodes if (behind := weight_behind(n, carriers)) is not None]
        for node in graph
        if node.op == "call_function" and not is_from_state(node)
    }
    n_calls = Counter(weight for weights in read.values() for weight in weights)
    found: dict[str, str] = {}
    for node in read:
        norm = operator_of(node).norm
        if norm is None or norm.over != "batch":
            continue
        given = bind_arguments(node)
        source, scale = given.get(norm.input), given.get(norm.scale)
        if isinstance(source, fx.Node) and isinstance(scale, fx.Node) and len(source.users) == 1:
            weights = [weight for weight in read.get(source, ()) if len(graph.state[str(weight.target)].shape) > 1]
            held = weight_behind(scale, carriers)
            if len(weights) == 1 and n_calls[weights[0]] == 1 and held is not None:
                found[str(weights[0].target)] = str(held[0].target)
    return found
