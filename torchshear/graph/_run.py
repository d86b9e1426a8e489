"""Running a captured graph node by node, and the model that it was captured of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.errors import first_line
from torchshear.graph._graph import Graph
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._nodes import is_only_read
from torchshear.graph.model._state import Mode, in_mode, preserve_state

Load = Callable[[str], Tensor]
Apply = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
Replace = Callable[[fx.Node, Any], Any]


def arguments_by_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names in the schema, with defaults filled in.

    The positional arguments of a plain Python function are named by their positions.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    found: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(args):
            found[argument.name] = args[i]
        elif argument.name in kwargs:
            found[argument.name] = kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value if argument.has_default_value() else None
    return found


def interpret(
    graph: fx.Graph, leaves: Sequence[Any], load: Load, apply: Apply | None = None, replace: Replace | None = None
) -> Iterator[tuple[fx.Node, Any]]:
    """Run a graph and yield each node with its value; values are dropped after their last use.

    Args:
        graph: nodes in execution order.
        leaves: flat inputs.
        load: returns the tensor of a parameter or buffer by its canonical name.
        apply: returns the value of a call, from the node and its arguments as values; None to make the call.
        replace: returns another value to go on with, from a node and its value.
    """
    last_use = {operand: node for node in graph.nodes for operand in node.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    inputs = iter(leaves)
    for node in graph.nodes:
        if node.op == "placeholder":
            value = next(inputs)
        elif node.op == "get_attr":
            value = load(str(node.target))
        elif node.op == "output":
            value = fx.map_arg(node.args[0], values.__getitem__)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            value = node.target(*args, **kwargs) if apply is None else apply(node, args, kwargs)
        values[node] = value if replace is None else replace(node, value)
        yield node, values[node]
        for operand in node.all_input_nodes:
            if last_use[operand] is node:
                values.pop(operand, None)


def graph_values(
    graph: fx.Graph, state: Mapping[str, Tensor], leaves: Sequence[Any], replace: Replace | None = None
) -> Iterator[tuple[fx.Node, Any]]:
    """Run a graph as it is and yield each node with its value.

    Args:
        graph: nodes in execution order.
        state: canonical name -> tensor; not written to.
        leaves: flat inputs.
        replace: returns another value to go on with, from a node and its value.
    """
    shared = {str(node.target) for node in graph.nodes if node.op == "get_attr" and is_only_read(node)}

    def load(name: str) -> Tensor:
        tensor = state[name].detach()
        return tensor if name in shared and tensor.ndim > 1 else tensor.clone()

    yield from interpret(graph, leaves, load, replace=replace)


def graph_output(
    graph: fx.Graph, state: Mapping[str, Tensor], leaves: Sequence[Any], replace: Replace | None = None
) -> Any:
    """Run a graph as `graph_values` does and return its output."""
    value: Any = None
    for _, latest in graph_values(graph, state, leaves, replace):
        value = latest
    return value


def run_model(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Return the outputs of a model without gradients; its state is put back."""
    own = inputs.copy()
    with torch.no_grad(), preserve_state(model):
        return model(*own.args, **own.kwargs)


def run_graph(graph: Graph, inputs: ExampleInputs) -> Any:
    """Return the outputs of a graph without gradients, computed with the tensors of the model."""
    own = inputs.copy()
    state = {name: entry.tensor for name, entry in graph.state.items()}
    with torch.no_grad():
        return graph_output(graph.fx_graph, state, pytree.tree_leaves((own.args, own.kwargs)))


def run_failure(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> str | None:
    """Return the error that a run of a model in a mode raises, in a line; None if it runs. The model is restored."""
    with in_mode(model, mode):
        try:
            run_model(model, inputs)
        except Exception as error:  # a forward may raise anything
            return f"{type(error).__name__}: {first_line(error)[:160]}"
    return None
