"""The outputs of a graph by name, and which of them may shrink."""

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError
from torchshear.graph._graph import Graph, shape_of
from torchshear.graph._names import close_names, matches, parse_names
from torchshear.graph._output_names import output_names


def output_nodes(graph: Graph) -> list[tuple[str, Any]]:
    """Name and value of each output of a graph; values that no node makes are constants."""
    end = next(node for node in reversed(graph.fx_graph.nodes) if node.op == "output")
    values = pytree.tree_leaves(end.args[0], is_leaf=lambda value: isinstance(value, fx.Node))
    return list(zip(output_names(graph.out_spec), values, strict=True))


def check_outputs(graph: Graph, given: object) -> tuple[str, ...]:
    """Names or patterns of outputs that may shrink, each of which must fit one.

    Raises:
        ArgumentError: one fits no output; lists the outputs with their shapes. Or the graph is of parts of a model.
    """
    patterns = parse_names("prunable_outputs", given)
    if patterns and graph.parts is not None:
        raise ArgumentError(
            f"prunable_outputs={list(patterns)!r} with submodules; outputs of parts keep their shapes, since the rest "
            f"of the model reads them. Leave prunable_outputs out."
        )
    shown = {name: f"{name} {_shape(graph, value)}" for name, value in output_nodes(graph)}
    if graph.training is not None:
        for name, value in output_nodes(graph.training):
            shown.setdefault(name, f"{name} {_shape(graph.training, value)} in train mode")
    for pattern in patterns:
        if not any(matches(pattern, name) for name in shown):
            known = ", ".join(list(shown.values())[:40])
            raise ArgumentError(
                f"prunable_outputs: {pattern!r} fits no output of {graph.model_type}, which has {known}"
                f"{', ...' if len(shown) > 40 else ''}. Name one of these, or a pattern such as 'features.*'."
                f"{close_names(pattern, shown)}"
            )
    return patterns


def shape_with_batch(graph: Graph, node: fx.Node) -> tuple[int | None, ...]:
    """Sizes of a node's value, None where they follow the batch."""
    return tuple(None if graph.is_dynamic(node, dim) else size for dim, size in enumerate(shape_of(node)))


def _shape(graph: Graph, value: Any) -> str:
    if not isinstance(value, fx.Node) or not isinstance(shape_of(value), tuple):
        return "(no tensor)"
    return f"({', '.join('batch' if size is None else str(size) for size in shape_with_batch(graph, value))})"
