"""The public view of a network: operators and parameters as nodes, axis relations on the edges."""

from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from torch import fx

from torchshear.dependency._axis import Algebra, Axes
from torchshear.dependency._call import Facts
from torchshear.dependency._units import PAD
from torchshear.graph import Graph, locate
from torchshear.graph._graph import shape_of


def draw_network(
    graph: Graph, algebra: Algebra, facts: Facts, names: npt.NDArray[np.object_]
) -> "nx.MultiDiGraph[str]":
    """Build the graph of a network.

    Args:
        graph: the captured network.
        algebra: the relations between its units.
        facts: the axes of its values.
        names: group name of each unit, "" for none; shape (units,).

    Returns:
        A graph with one node a value. Node attributes: `kind` ("input", "parameter", "buffer", "constant", "operator",
        "output"), `operator`, `module`, `source`, `shape`, `groups` (names, of all dimensions) and `mixed`. Edge
        attributes: `operand` (number of the operand) and `axes`, for each dimension the groups that run along it.
        Parallel edges exist: `a * a` has two.
    """
    network: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    labels = {node.name: _labels(algebra, facts.axes.get(node.name), names) for node in graph}
    for node in graph:
        location = locate(node)
        network.add_node(
            node.name,
            kind=_kind(graph, node),
            operator=location.operator,
            module=location.module,
            source=location.source,
            shape=shape_of(node),
            groups=_all_groups(algebra, facts.axes.get(node.name), names),
            mixed=node.name in facts.mixed,
        )
    for node in graph:
        for number, operand in enumerate(_operands(node)):
            network.add_edge(operand.name, node.name, operand=number, axes=labels[operand.name])
    return network


def _all_groups(algebra: Algebra, axes: Any, names: npt.NDArray[np.object_]) -> tuple[str, ...]:
    """Groups along any dimension of a node's value, or of its values if it has several."""
    values = axes if isinstance(axes, list) else [axes]
    return tuple(dict.fromkeys(name for value in values for axis in _labels(algebra, value, names) for name in axis))


def _kind(graph: Graph, node: fx.Node) -> str:
    if node.op == "get_attr":
        return graph.state[str(node.target)].kind
    return {"placeholder": "input", "output": "output"}.get(node.op, "operator")


def _labels(algebra: Algebra, axes: Any, names: npt.NDArray[np.object_]) -> tuple[tuple[str, ...], ...]:
    if not isinstance(axes, tuple):
        return ()
    return tuple(_groups_along(algebra, axes, dim, names) for dim in range(len(axes)))


def _groups_along(algebra: Algebra, axes: Axes, dim: int, names: npt.NDArray[np.object_]) -> tuple[str, ...]:
    rows = algebra.store.resolve(axes[dim].units)
    return tuple(dict.fromkeys(str(name) for name in names[np.unique(rows[rows != PAD])] if name))


def _operands(node: fx.Node) -> list[fx.Node]:
    """Operands in order, each as often as it is given."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found
