"""Values that a graph computes of the model's own tensors alone, as weights under a mask or a weight norm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.graph._run import is_only_read

_OF_STATE = "of_state"  # in the meta of a node


def is_from_state(node: fx.Node) -> bool:
    """Whether a value is a tensor of the model, or computed of such tensors and of constants alone."""
    if _OF_STATE not in node.meta:
        for each in node.graph.nodes:
            is_call = each.op == "call_function"
            each.meta[_OF_STATE] = each.op == "get_attr" or (
                is_call and all(operand.meta[_OF_STATE] for operand in each.all_input_nodes)
            )
    return bool(node.meta[_OF_STATE])


def ancestors(node: fx.Node) -> list[fx.Node]:
    """All nodes that a value is computed of and the value itself, in execution order."""
    found, waiting = {node}, [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                waiting.append(operand)
    return sorted(found)


def compute_from_state(node: fx.Node, load: Callable[[str], Tensor]) -> Tensor:
    """A value that is computed of the model's own tensors.

    Args:
        node: the node that gives it; `is_from_state`.
        load: gives the tensor of a parameter, buffer or constant by its canonical name; not written to.
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
