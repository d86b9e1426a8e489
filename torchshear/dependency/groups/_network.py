"""The public view of a network: operators and parameters as nodes, axis relations on the edges."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx

from torchshear.dependency.algebra._axis import Algebra, Axis
from torchshear.dependency.algebra._units import PAD, Ids
from torchshear.dependency.rules._findings import Facts
from torchshear.graph import Graph
from torchshear.graph._location import locate

# Control characters, lone surrogates and non-characters cannot stand in XML 1.0, and so not in GraphML or GEXF.
_NOT_IN_XML = {*range(0x20), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF} - {0x09, 0x0A, 0x0D}
_PLAIN: Mapping[int, str] = dict.fromkeys(_NOT_IN_XML, "\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension of a value.

    Attributes:
        size: number of positions; "batch", "49*batch" or "batch+1" where it follows the batch, "by batch" where it does
            in another way, a symbol where it follows data.
        groups: numbers of the channel groups of which units lie along it.
        fixed: why positions of it cannot be cut, "" if none is fixed.
    """

    size: int | str
    groups: tuple[int, ...]
    fixed: str


@dataclass(frozen=True, slots=True)
class Value:
    """A node of the network: an operator call with what it computes, a parameter, an input, or the output.

    Attributes:
        name: name of the node, unique.
        kind: "input", "parameter", "buffer", "constant", "operator" or "output".
        operator: as in "aten.conv2d.default"; "" for what is no operator.
        state: qualified name of the parameter, buffer or constant; else "".
        module: qualified name of the module that made the call or owns the tensor.
        source: "file.py:12", the line that made the call, for tensors the first that uses them; "" if unknown.
        tensors: dimensions of each tensor that the value consists of: one, none for a number, several for a list.
        operands: names of the nodes that it is computed from, in order, each as often as it is given.
        is_cross_channel: whether the operator computes a statistic over channels (a norm, a softmax, a mean).
    """

    name: str
    kind: str
    operator: str
    state: str
    module: str
    source: str
    tensors: tuple[tuple[Dimension, ...], ...]
    operands: tuple[str, ...]
    is_cross_channel: bool

    @property
    def groups(self) -> tuple[int, ...]:
        """Numbers of all groups along any of its dimensions, in order of appearance."""
        return tuple(dict.fromkeys(number for dims in self.tensors for dim in dims for number in dim.groups))


def describe_network(graph: Graph, algebra: Algebra, facts: Facts, group_of: Ids) -> tuple[Value, ...]:
    """Describe every node of a captured graph in order of execution.

    Args:
        graph: the captured network.
        algebra: the relations between its units.
        facts: the axes of its values.
        group_of: number of the group of each unit, -1 for none; shape (units,).
    """
    found: dict[int, tuple[Axis, tuple[int, ...], str]] = {}

    def dimension(axis: Axis, size: int | str) -> Dimension:
        known = found.get(id(axis.units))
        if known is None:  # the axis is kept with the answer, so that its id is not given to another
            known = found[id(axis.units)] = (axis, _groups_along(algebra, axis, group_of), _reason(algebra, axis))
        return Dimension(size, known[1], known[2])

    def tensors(node: fx.Node) -> tuple[tuple[Dimension, ...], ...]:
        axes, value = facts.axes.get(node.name), node.meta.get("val")
        if isinstance(axes, tuple) and isinstance(value, Tensor):
            own = _with_blocked(facts, node, axes)
            return (tuple(map(dimension, own, _sizes(graph, node, value))),)
        if isinstance(axes, list) and isinstance(value, list | tuple):
            return tuple(
                tuple(map(dimension, own, _sizes(graph, node, item, number)))
                for number, (own, item) in enumerate(zip(axes, value, strict=True))
                if isinstance(item, Tensor)
            )
        return ()

    return tuple(_describe(graph, node, tensors(node), node.name in facts.cross_channel) for node in graph)


def _describe(graph: Graph, node: fx.Node, tensors: tuple[tuple[Dimension, ...], ...], is_cross_channel: bool) -> Value:
    state = str(node.target) if node.op == "get_attr" else ""
    location = locate(next(iter(node.users), node)) if state else locate(node)
    return Value(
        name=node.name,
        kind=graph.state[state].kind
        if state
        else {"placeholder": "input", "output": "output"}.get(node.op, "operator"),
        operator=location.operator if node.op == "call_function" else "",
        state=state,
        module=state.rpartition(".")[0] if state else location.module,
        source=location.source,
        tensors=tensors,
        operands=tuple(operand.name for operand in _operands(node)),
        is_cross_channel=is_cross_channel,
    )


def draw_network(values: tuple[Value, ...], names: tuple[str, ...]) -> "nx.MultiDiGraph[str]":
    """Put the description of a network into a NetworkX graph; see `ChannelGroups.to_networkx`.

    Args:
        values: the nodes.
        names: names of the groups.
    """
    network: nx.MultiDiGraph[str] = nx.MultiDiGraph()

    @cache
    def named(groups: tuple[int, ...]) -> list[str]:
        return [names[number] for number in groups]

    by_name = {value.name: value for value in values}
    for value in values:
        network.add_node(
            value.name,
            label=(value.state.rpartition(".")[2] or value.name).translate(_PLAIN),
            kind=value.kind,
            operator=value.operator,
            parameter=value.state.translate(_PLAIN),
            module=value.module.translate(_PLAIN),
            source=value.source.translate(_PLAIN),
            shape=_text([[dim.size for dim in dims] for dims in value.tensors]),
            group=named(value.groups)[0].translate(_PLAIN) if value.groups else "",
            groups=json.dumps(named(value.groups)),
            axes=_text([[named(dim.groups) for dim in dims] for dims in value.tensors]),
            fixed=_text([[dim.fixed for dim in dims] for dims in value.tensors]),
            mixed=value.is_cross_channel,
        )
    for value in values:
        for number, name in enumerate(value.operands):
            operand = by_name[name]
            network.add_edge(
                name,
                value.name,
                operand=number,
                groups=json.dumps(named(operand.groups)),
                axes=_text([[named(dim.groups) for dim in dims] for dims in operand.tensors]),
            )
    return network


def _text(tensors: list[list[Any]]) -> str:
    """Something of each dimension as JSON: a list for the usual single tensor, a list of lists for several."""
    return json.dumps(tensors[0] if len(tensors) == 1 else tensors)


def _with_blocked(facts: Facts, node: fx.Node, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Axes of a value; the dimension of a weight that holds blocks of a longer axis stands for all of that axis."""
    blocked = facts.blocked.get(str(node.target)) if node.op == "get_attr" else None
    if blocked is None:
        return axes
    dim, whole, _ = blocked
    return (*axes[:dim], whole, *axes[dim + 1 :])


def _groups_along(algebra: Algebra, axis: Axis, group_of: Ids) -> tuple[int, ...]:
    rows = algebra.store.resolve(axis.units)
    numbers, first = np.unique(group_of[rows[rows != PAD]], return_index=True)
    return tuple(int(number) for number in numbers[np.argsort(first)] if number >= 0)


def _reason(algebra: Algebra, axis: Axis) -> str:
    return str(algebra.store.first_reason(axis.units) or "")


def _sizes(graph: Graph, node: fx.Node, value: Tensor, item: int | None = None) -> list[int | str]:
    """Sizes of one tensor of a node as people read them: free ones by what they follow, not as they were captured."""
    sizes: list[int | str] = []
    for dim, size in enumerate(value.shape):
        place = dim if item is None else (item, dim)
        if isinstance(size, torch.SymInt):
            sizes.append(str(size))
        elif graph.is_dynamic(node, place):
            sizes.append(str(graph.batch_formula(node, place) or "by batch"))
        else:
            sizes.append(int(size))
    return sizes


def _operands(node: fx.Node) -> list[fx.Node]:
    """Operands in order, each as often as it is given."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found
