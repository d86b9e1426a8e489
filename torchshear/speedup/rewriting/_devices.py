"""Devices that a graph names: those of the capture, which a model may leave."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


def follow_device(graph: fx.Graph) -> None:
    """Have calls that name a device use the one where the model's tensors are when it runs.

    A model captured on the meta device, or moved after its capture, then makes its masks and positions where its
    weights are. Graphs that name several devices are left alone.

    Args:
        graph: changed in place.
    """
    named = [node for node in graph.nodes if node.op == "call_function" and _devices(node)]
    anchor = next((node for node in graph.nodes if node.op == "get_attr"), None)
    if anchor is None or len({device for node in named for device in _devices(node)}) != 1:
        return
    with graph.inserting_after(anchor):
        here = graph.call_function(device_of, (anchor,))

    def moved(value: Any) -> Any:
        return pytree.tree_map_only(torch.device, lambda _: here, value)

    for node in named:
        node.args, node.kwargs = moved(node.args), moved(node.kwargs)


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor is."""
    return tensor.device


def _devices(node: fx.Node) -> set[torch.device]:
    """Devices among the arguments of a call."""
    return {leaf for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, torch.device)}
