"""The masked network as a reference: the original graph, run on the original tensors with cut positions held at zero.

Where an operator mixes the positions of an axis (a norm, a softmax, a mean over channels), zeroing is not removing;
there the operator alone is run on the kept positions and its result is put back among zeros.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.dependency import Axes, Axis, Cut
from torchshear.graph import Graph
from torchshear.graph._run import interpret
from torchshear.speedup._rewrite import rewritten_call

Bools = npt.NDArray[np.bool_]


def masked_values(
    graph: Graph, cut: Cut, state: Mapping[str, Tensor], leaves: list[Any]
) -> Iterator[tuple[fx.Node, Any]]:
    """Run the original graph as the masked network, and give each node with its value.

    Args:
        graph: the captured graph, in eval mode.
        cut: the units that are cut.
        state: canonical name -> original tensor, in the dtype to compute in.
        leaves: flat inputs.
    """
    facts = cut.groups.facts

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_mixed(node, cut):
            return on_kept_positions(node, cut, args, kwargs)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        return map_axes(lambda tensor, axes: zero_cut(tensor, axes, cut), value, facts.axes.get(node.name))

    def load(name: str) -> Tensor:
        tensor = state[name].clone()
        axes = facts.state_axes.get(name)
        return tensor if axes is None or name in facts.blocked else zero_cut(tensor, axes, cut)

    yield from interpret(graph.fx_graph, leaves, load, call)


def mixes(cut: Cut) -> bool:
    """Whether any operator mixes positions of which some are cut, so that zeroing is not removing."""
    return any(cut.changes(axis) for axes in cut.groups.facts.mixed.values() for axis in axes)


def is_mixed(node: fx.Node, cut: Cut) -> bool:
    """Whether an operator mixes positions of which some are cut."""
    return any(cut.changes(axis) for axis in cut.groups.facts.mixed.get(node.name, []))


def on_kept_positions(node: fx.Node, cut: Cut, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operator on the kept positions of all of its operands, and put the result back among zeros."""
    facts = cut.groups.facts
    call = rewritten_call(node, facts, cut)
    full = dict(
        zip(_nodes_in((node.args, node.kwargs)), _values_of((node.args, node.kwargs), (args, kwargs)), strict=True)
    )

    def gathered(operand: fx.Node) -> Any:
        axes = facts.axes.get(operand.name)
        return map_axes(lambda tensor, own: gather(tensor, own, cut), full[operand], axes)

    new_args, new_kwargs = fx.map_arg((call.args, call.kwargs), gathered)
    value = call.target(*new_args, **new_kwargs)
    return map_axes(lambda tensor, own: _scatter(tensor, own, cut), value, facts.axes.get(node.name))


def _nodes_in(arguments: Any) -> list[fx.Node]:
    return [
        leaf
        for leaf in pytree.tree_leaves(arguments, is_leaf=lambda v: isinstance(v, fx.Node))
        if isinstance(leaf, fx.Node)
    ]


def _values_of(nodes: Any, values: Any) -> list[Any]:
    """Values at the places where `nodes` holds nodes; both have one structure above the nodes."""
    if isinstance(nodes, fx.Node):
        return [values]
    if isinstance(nodes, list | tuple):
        return [found for n, v in zip(nodes, values, strict=True) for found in _values_of(n, v)]
    if isinstance(nodes, dict):
        return [found for key in nodes for found in _values_of(nodes[key], values[key])]
    return []


def map_axes(function: Callable[[Tensor, Axes], Any], value: Any, axes: Any) -> Any:
    """Apply a function to a tensor with its axes, or to each of several; what has no axes stays as it is."""
    if isinstance(value, list | tuple) and isinstance(axes, list):
        return [map_axes(function, item, own) for item, own in zip(value, axes, strict=False)]
    if isinstance(value, Tensor) and isinstance(axes, tuple):
        return function(value, axes)
    return value


def zero_cut(tensor: Tensor, axes: Axes, cut: Cut) -> Tensor:
    """Set cut positions to zero: in place, so that values seen through views agree, unless copies share memory."""
    changed = [dim for dim, axis in enumerate(axes) if cut.changes(axis)]
    if any(axes[dim].rows for dim in changed):
        rows = [zero_cut(row, own, cut) for row, own in zip(tensor, _by_row(axes), strict=True)]
        return torch.stack(rows)
    if changed and any(stride == 0 for stride in tensor.stride()):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    for dim in changed:
        gone = ~_keep(axes[dim], tensor.shape[dim], cut)
        tensor.index_fill_(dim, _positions(gone, tensor), 0)
    return tensor


def gather(tensor: Tensor, axes: Axes, cut: Cut) -> Tensor:
    """The kept positions of a value."""
    if any(axis.rows for axis in axes):
        return torch.stack([gather(row, own, cut) for row, own in zip(tensor, _by_row(axes), strict=True)])
    for dim, axis in enumerate(axes):
        if cut.changes(axis):
            tensor = tensor.index_select(dim, _positions(_keep(axis, tensor.shape[dim], cut), tensor))
    return tensor


def _by_row(axes: Axes) -> list[Axes]:
    """Axes of each row of dimension 0, of a value whose rows differ in some dimension."""
    n_rows = next(len(axis.rows) for axis in axes if axis.rows)
    return [tuple(axis.rows[row] if axis.rows else axis for axis in axes[1:]) for row in range(n_rows)]


def _scatter(tensor: Tensor, axes: Axes, cut: Cut) -> Tensor:
    for dim, axis in enumerate(axes):
        if cut.changes(axis):
            shape = list(tensor.shape)
            shape[dim] = shape[dim] * axis.size // int(cut.keep(axis).sum())
            index = _positions(_keep(axis, shape[dim], cut), tensor)
            tensor = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device).index_copy(dim, index, tensor)
    return tensor


def _keep(axis: Axis, size: int, cut: Cut) -> Bools:
    """Which of `size` positions are kept; an axis that holds the batch as well repeats with every sample.

    Raises:
        IndexError: the axis has another size, and samples are not one after another in it.
    """
    keep = cut.keep(axis)
    if len(keep) == size:
        return keep
    samples = keep.reshape(cut.groups.graph.batch_hint or 1, -1)
    if size % samples.shape[1] or not (samples == samples[0]).all():
        raise IndexError(f"an axis of {len(keep)} positions in the capture has {size}")
    return np.tile(samples[0], size // samples.shape[1])


def _positions(mask: Bools, tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(tensor.device)
