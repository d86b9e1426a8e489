"""Layers and the batch norms behind them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from torchshear.dependency._call import bind_arguments
from torchshear.dependency._groups import ChannelGroup, Member
from torchshear.dependency._registry import operator_name
from torchshear.graph import Graph


def with_scales(graph: Graph, groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Note at the outputs of each layer the scale of the only batch norm that reads its result.

    Args:
        graph: the captured network.
        groups: its groups.
    """
    scale_of = _scales(graph)
    return tuple(replace(group, members=_members(group, scale_of)) for group in groups)


def _members(group: ChannelGroup, scale_of: Mapping[str, str]) -> tuple[Member, ...]:
    norms = {member.name: member for member in group.members if "norm" in member.roles}
    found = []
    for member in group.members:
        norm = norms.get(scale_of.get(member.name, "")) if "out" in member.roles else None
        fits = norm is not None and norm.size == member.size
        found.append(replace(member, scale=norm.name) if norm is not None and fits else member)
    return tuple(found)


def _scales(graph: Graph) -> dict[str, str]:
    """Weight of a layer -> scale of the only batch norm that reads its result, which nothing else reads."""
    held = Counter(str(node.target) for node in graph if node.op == "get_attr" for _ in node.users)
    found: dict[str, str] = {}
    for node in graph:
        if node.op != "call_function" or "batch_norm" not in operator_name(node):
            continue
        given = bind_arguments(node)
        source, scale = given.get("input"), given.get("weight")
        if isinstance(source, fx.Node) and isinstance(scale, fx.Node) and len(source.users) == 1:
            weight = _weight(source, graph)
            if weight and held[weight] == 1:
                found[weight] = str(scale.target)
    return found


def _weight(call: fx.Node, graph: Graph) -> str:
    """The parameter of several dimensions that a call reads, if it reads one."""
    names = [str(node.target) for node in call.all_input_nodes if node.op == "get_attr"]
    weights = [name for name in names if len(graph.state[name].shape) > 1]
    return weights[0] if len(weights) == 1 else ""
