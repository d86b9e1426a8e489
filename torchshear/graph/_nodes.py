"""Facts about single nodes of a captured graph: shapes, operands, and what is done with their values."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.graph._operator_record import operator_of

_IS_FROM_STATE = "is_from_state"  # key in the meta of a node


def shape_of(value: Any) -> Any:
    """Return the shape of a value at capture, given by its node.

    Returns:
        A tuple of ints, 0 for sizes that depend on data; a tuple of shapes for several values; None for no tensor.
    """
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    if isinstance(value, list | tuple):
        return tuple(shape_of(item) for item in value)
    if not isinstance(value, Tensor):
        return None
    # A symbol has a hint unless it depends on data.
    return tuple(int(size.node.hint or 0) if isinstance(size, torch.SymInt) else int(size) for size in value.shape)


def is_data_dependent(size: Any) -> bool:
    """Return whether a size is known only when the model runs, as where a mask picks positions."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def has_data_dependent_shape(node: fx.Node) -> bool:
    """Return whether a size of a node's value is known only when the model runs."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(map(is_data_dependent, value.shape))


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a call that are tensors, in order, each as often as it is given."""
    operands: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), operands.append)
    return [operand for operand in operands if isinstance(operand.meta.get("val"), Tensor)]


def unwrap_copies(operand: fx.Node) -> fx.Node:
    """Return the buffer or literal of which an operand is a copy; the operand itself if there is none."""
    node = operand
    while operator_of(node).passes == "copy":
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else operand


def format_arguments(value: Any, labels: Mapping[fx.Node, str]) -> str:
    """Return the arguments of a call as text without devices and types.

    Args:
        value: the arguments.
        labels: text for each node; a conversion is written as its operand.
    """
    if isinstance(value, fx.Node):
        return format_arguments(value.args[0], labels) if operator_of(value).keeps_positions else labels[value]
    if isinstance(value, torch.device | torch.dtype):
        return ""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={format_arguments(item, labels)}" for key, item in value.items())
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, list | tuple):
        return "(" + ",".join(format_arguments(item, labels) for item in value) + ")"
    return str(value)


def ancestors(node: fx.Node) -> list[fx.Node]:
    """Return all nodes that a value is computed from, in execution order; the node itself comes last."""
    found, waiting = {node}, [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                waiting.append(operand)
    return sorted(found)


def is_from_state(node: fx.Node) -> bool:
    """Return whether a value is a tensor of the model, or computed from such tensors and constants alone."""
    if _IS_FROM_STATE not in node.meta:
        for each in node.graph.nodes:
            is_call = each.op == "call_function"
            each.meta[_IS_FROM_STATE] = each.op == "get_attr" or (
                is_call and all(operand.meta[_IS_FROM_STATE] for operand in each.all_input_nodes)
            )
    return bool(node.meta[_IS_FROM_STATE])


def compute_from_state(node: fx.Node, load: Callable[[str], Tensor]) -> Tensor:
    """Compute a value that depends on the model's own tensors alone, as a weight under a mask or a weight norm.

    Args:
        node: the node of the value, of which `is_from_state` holds.
        load: returns the tensor of a parameter, buffer or constant by its canonical name; it is not written to.
    """
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for each in ancestors(node):
            if each.op == "get_attr":
                tensor = load(str(each.target)).detach()
                values[each] = tensor if is_only_read(each) else tensor.clone()
            else:
                args, kwargs = fx.map_arg((each.args, each.kwargs), values.__getitem__)
                values[each] = each.target(*args, **kwargs)  # type: ignore[operator]
    result: Tensor = values[node]
    return result


def _alias_infos(node: fx.Node, user: fx.Node) -> list[Any]:
    """Return the notes on aliasing in a call's schema for the arguments that are a node; None for arguments without."""
    arguments = user.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in arguments), user.args, strict=False)) | user.kwargs
    return [argument.alias_info for argument in arguments if given.get(argument.name) is node]


def is_only_read(node: fx.Node) -> bool:
    """Return whether no call writes to a tensor or returns a view of it.

    Batch norms do not say that they write to their statistics, which are of rank 1.
    """
    return all(
        isinstance(user.target, torch._ops.OpOverload) and not any(_alias_infos(node, user)) for user in node.users
    )


def is_written(node: fx.Node) -> bool:
    """Return whether the memory of a value may be written to: by a call, through a view, or by who reads the outputs.

    Batch norms do not say that they write to their statistics in train mode.
    """
    for user in node.users:
        is_dropout = operator_of(user).passes == "dropout"  # its schema does not say that it may return its operand
        if user.target is operator.getitem or is_dropout:
            if is_written(user):
                return True
        elif not isinstance(user.target, torch._ops.OpOverload):
            return True
        else:
            infos = _alias_infos(node, user)
            if any(info is not None and (info.is_write or is_written(user)) for info in infos):
                return True
    return False
