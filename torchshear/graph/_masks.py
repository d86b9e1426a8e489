"""Sizes that depend on values which are known: how many positions a mask picks that a model holds."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.graph._graph import StateTensor

_COPIES = frozenset(f"aten.{name}.default" for name in ("alias", "detach", "detach_", "lift_fresh_copy"))


def mask_behind(operand: fx.Node) -> fx.Node:
    """The buffer or literal that an operand is, also behind copies of it; else the operand itself."""
    node = operand
    while str(node.target) in _COPIES:
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else operand


def settle_sizes(graph: fx.Graph, state: Mapping[str, StateTensor]) -> None:
    """Give values the sizes that they have by the masks which a model holds; torch.export knows no values.

    Args:
        graph: a captured graph; the descriptions of its values are changed in place.
        state: canonical name -> tensor of the model, or constant.
    """
    known: dict[Any, int] = {}
    for node in graph.nodes:
        if str(node.target) == "aten.index.Tensor":
            (*_, last) = (mask_behind(index) for index in node.args[1] if index is not None)
            entry = state.get(str(last.target)) if last.op == "get_attr" else None
            if entry is not None and entry.tensor.dtype is torch.bool and not entry.tensor.is_meta:
                for size in _unknown(node.meta.get("val")):
                    known.setdefault(size.node.expr, int(entry.tensor.sum()))
    for node in graph.nodes if known else ():
        value = node.meta.get("val")
        if _unknown(value):
            sizes = [_number(size, known) for size in value.shape]
            with value.fake_mode:
                node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)


def _unknown(value: Any) -> list[torch.SymInt]:
    """Sizes of a tensor that torch.export does not know."""
    sizes = value.shape if isinstance(value, Tensor) else ()
    return [size for size in map(_as_symbol, sizes) if size is not None]


def _as_symbol(size: Any) -> torch.SymInt | None:
    return size if isinstance(size, torch.SymInt) and size.node.hint is None else None


def _number(size: Any, known: Mapping[Any, int]) -> Any:
    """A size as a number, where it follows from known ones."""
    if _as_symbol(size) is None:
        return size
    number = size.node.expr.subs(known)
    return int(number) if number.is_number else size
