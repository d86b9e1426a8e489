"""Interpret a captured graph node by node."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.graph._operator import operator_of

Load = Callable[[str], Tensor]
Apply = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
Replace = Callable[[fx.Node, Any], Any]


def arguments_by_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by schema name, defaults filled in; positions as names for plain Python functions."""
    if not isinstance(target, torch._ops.OpOverload):
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    bound: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(args):
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def _as_it_is(node: fx.Node, value: Any) -> Any:
    """Replace nothing."""
    return value


def interpret(
    graph: fx.Graph, leaves: list[Any], load: Load, apply: Apply, replace: Replace = _as_it_is
) -> Iterator[tuple[fx.Node, Any]]:
    """Run a graph and give each node with its value; values are dropped after their last use.

    Args:
        graph: nodes in execution order.
        leaves: flat inputs.
        load: gives the tensor of a parameter or buffer by its canonical name.
        apply: gives the value of a call, from the node and its arguments as values.
        replace: gives another value in place of a node's.
    """
    last_use = {operand: node for node in graph.nodes for operand in node.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    inputs = iter(leaves)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            values[node] = load(str(node.target))
        elif node.op == "output":
            values[node] = fx.map_arg(node.args[0], lambda n: values[n])
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = apply(node, args, kwargs)
        values[node] = replace(node, values[node])
        yield node, values[node]
        for operand in node.all_input_nodes:
            if last_use[operand] is node:
                values.pop(operand, None)


def graph_values(
    graph: fx.Graph, state: Mapping[str, Tensor], leaves: list[Any], replace: Replace = _as_it_is
) -> Iterator[tuple[fx.Node, Any]]:
    """Run a graph as it is, and give each node with its value. The tensors of `state` are not written to.

    Args:
        graph: nodes in execution order.
        state: canonical name -> tensor.
        leaves: flat inputs.
        replace: gives another value in place of a node's.
    """
    shared = {str(node.target) for node in graph.nodes if node.op == "get_attr" and is_only_read(node)}

    def load(name: str) -> Tensor:
        tensor = state[name].detach()
        return tensor if name in shared and tensor.ndim > 1 else tensor.clone()

    def apply(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return node.target(*args, **kwargs)  # type: ignore[operator]

    yield from interpret(graph, leaves, load, apply, replace)


def graph_output(graph: fx.Graph, state: Mapping[str, Tensor], leaves: list[Any], replace: Replace = _as_it_is) -> Any:
    """Run a graph as `graph_values` does, and give its output only."""
    value: Any = None
    for _, latest in graph_values(graph, state, leaves, replace):
        value = latest
    return value


def is_only_read(node: fx.Node) -> bool:
    """Whether no call writes to a tensor or gives a view of it. Statistics of batch norms, of rank 1, do not say so."""
    for user in node.users:
        if not isinstance(user.target, torch._ops.OpOverload):
            return False
        given = dict(zip((a.name for a in user.target._schema.arguments), user.args, strict=False)) | user.kwargs
        if any(given.get(a.name) is node and a.alias_info for a in user.target._schema.arguments):
            return False
    return True


def is_written(node: fx.Node) -> bool:
    """Whether a call writes to the memory of a value, itself or by a view of it; or whoever reads the outputs may.

    That batch norms write to their statistics in train mode is not seen.
    """
    for user in node.users:
        is_dropout = operator_of(user).passes == "dropout"  # its schema does not tell that it may give its operand
        if user.target is operator.getitem or is_dropout:
            if is_written(user):
                return True
        elif isinstance(user.target, torch._ops.OpOverload):
            given = dict(zip((a.name for a in user.target._schema.arguments), user.args, strict=False)) | user.kwargs
            infos = [a.alias_info for a in user.target._schema.arguments if given.get(a.name) is node]
            if any(i is not None and (i.is_write or is_written(user)) for i in infos):
                return True
        else:
            return True
    return False
