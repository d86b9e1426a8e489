"""Sizes that depend on values which are known: how many positions a mask picks that a model holds."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from torchshear.graph._graph import StateTensor, has_data_dependent_shape, is_data_dependent
from torchshear.graph._operator import operator_of


def unwrap_copies(operand: fx.Node) -> fx.Node:
    """The buffer or literal that an operand is, also behind copies of it; else the operand itself."""
    node = operand
    while operator_of(node).passes == "copy":
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else operand


def resolve_mask_sizes(graph: fx.Graph, state: Mapping[str, StateTensor]) -> None:
    """Give values the sizes that they have by the masks which a model holds; torch.export knows no values.

    Args:
        graph: a captured graph; the descriptions of its values are changed in place.
        state: canonical name -> tensor of the model, or constant.
    """
    known: dict[Any, int] = {}
    for node in graph.nodes:
        if str(node.target) == "aten.index.Tensor":
            (*_, last) = (unwrap_copies(index) for index in node.args[1] if index is not None)
            entry = state.get(str(last.target)) if last.op == "get_attr" else None
            if entry is not None and entry.tensor.dtype is torch.bool and not entry.tensor.is_meta:
                for size in filter(is_data_dependent, node.meta["val"].shape):
                    known.setdefault(size.node.expr, int(entry.tensor.sum()))
    for node in graph.nodes if known else ():
        if has_data_dependent_shape(node):
            value = node.meta["val"]
            sizes = [_number(size, known) for size in value.shape]
            with value.fake_mode:
                node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)


def _number(size: Any, known: Mapping[Any, int]) -> Any:
    """A size as a number, where it follows from known ones."""
    if not is_data_dependent(size):
        return size
    number = size.node.expr.subs(known)
    return int(number) if number.is_number else size
