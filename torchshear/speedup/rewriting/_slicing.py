"""Kept and cut positions of tensors: slicing parameters and buffers, selecting or zeroing positions of values."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from torchshear.dependency import Axes, Axis
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._tensor_plans import StatePlan, make_state_plan
from torchshear.dependency.rules._findings import Facts

Bools = npt.NDArray[np.bool_]


def slice_state(cut: Cut, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slice parameters and buffers to their kept positions.

    Args:
        cut: the checked choice of units.
        tensors: canonical name -> tensor of the model to be shrunk.

    Returns:
        Canonical name -> new tensor, of the same class (Parameter or Tensor), dtype, device, memory format (as channels
        last) and `requires_grad`.
    """
    sliced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plan = make_state_plan(cut, name)
        with torch.no_grad():
            value = tensor.detach()
            if plan is not None:
                value = slice_like_memory(value, plan)
            value = value.clone() if value.data_ptr() == tensor.data_ptr() or value.is_meta else value
        if isinstance(tensor, nn.Parameter):
            sliced[name] = nn.Parameter(value, requires_grad=tensor.requires_grad)
        else:
            sliced[name] = value.requires_grad_(tensor.requires_grad)
    return sliced


def slice_like_memory(value: Tensor, plan: StatePlan) -> Tensor:
    """Slice a tensor as `slice_tensor` does; its dimensions lie in memory in the order that they had, as channels last.

    Args:
        value: tensor of shape `plan.shape`.
        plan: what is kept of it.

    Returns:
        Tensor of shape `plan.new_shape`, same dtype and device; `value` itself where nothing changes.
    """
    sliced = slice_tensor(value, plan)
    places = [(-stride, -size) for stride, size in zip(value.stride(), value.shape, strict=True)]
    order = sorted(range(value.ndim), key=places.__getitem__)
    if 0 in value.stride() or order == list(range(value.ndim)):
        return sliced
    inverse = [order.index(dim) for dim in range(value.ndim)]
    return sliced.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


def slice_tensor(value: Tensor, plan: StatePlan) -> Tensor:
    """Slice a tensor to its kept positions; a buffer that holds positions of another axis gets their new numbers.

    Args:
        value: tensor of shape `plan.shape`.
        plan: what is kept of it.

    Returns:
        Tensor of shape `plan.new_shape`, same dtype and device; `value` itself where nothing changes.
    """
    for dim, n_blocks in plan.blocks.items():  # each block of rows keeps positions of its own, all of them equally many
        index = torch.from_numpy(plan.kept[dim].reshape(n_blocks, -1) % value.shape[dim]).to(value.device)
        blocks = value.reshape(n_blocks, -1, *value.shape[1:]).movedim(dim + 1, 1)
        shape = (n_blocks, index.shape[1], *(1 for _ in blocks.shape[2:]))
        taken = blocks.gather(1, index.reshape(shape).expand(-1, -1, *blocks.shape[2:]))
        value = taken.movedim(1, dim + 1).flatten(0, 1)
    for dim, kept in plan.kept.items():
        if dim not in plan.blocks:
            value = value.index_select(dim, torch.from_numpy(kept).to(value.device))
    if plan.numbers is None:
        return value
    new_numbers = np.zeros(plan.numbers.size, np.int64)
    new_numbers[plan.numbers.kept] = np.arange(len(plan.numbers.kept))
    return torch.from_numpy(new_numbers).to(value.device)[value.long() % plan.numbers.size].to(value.dtype)


def keep_mask(axis: Axis, size: int, cut: Cut) -> Bools:
    """Return a mask of the kept positions of an axis that has `size` positions in a run.

    The size differs from that of the capture if the axis holds the batch as well; the mask then repeats with every
    sample.

    Raises:
        IndexError: the size differs for another reason.
    """
    keep = cut.keep(axis)
    if len(keep) == size:
        return keep
    batch = cut.groups.graph.batch_hint or 1
    rest = len(keep) // batch
    for outer in (n for n in range(1, rest + 1) if rest % n == 0 and len(keep) % batch == 0):
        samples = keep.reshape(outer, batch, -1)
        if size % rest == 0 and (samples == samples[:, :1]).all():
            return np.repeat(samples[:, :1], size // rest, 1).reshape(-1)
    raise IndexError(f"an axis of {len(keep)} positions in the capture has {size}")


def map_axes(function: Callable[[Tensor, Axes], Any], value: Any, axes: Any) -> Any:
    """Apply a function to a tensor and its axes, or to each of several; return values without axes as they are."""
    if isinstance(value, list | tuple) and isinstance(axes, list):
        return [map_axes(function, item, own) for item, own in zip(value, axes, strict=False)]
    if isinstance(value, Tensor) and isinstance(axes, tuple):
        return function(value, axes)
    return value


def select_kept(tensor: Tensor, axes: Axes, cut: Cut) -> Tensor:
    """Select the kept positions of a value."""
    if any(axis.rows for axis in axes):
        return torch.stack([select_kept(row, own, cut) for row, own in zip(tensor, _axes_by_row(axes), strict=True)])
    for dim, axis in enumerate(axes):
        if cut.changes(axis):
            kept = np.flatnonzero(keep_mask(axis, tensor.shape[dim], cut))
            tensor = tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))
    return tensor


def zero_cut(tensor: Tensor, axes: Axes, cut: Cut) -> Tensor:
    """Set cut positions to zero: in place, so that views of the value agree, unless positions share memory."""
    changed = [dim for dim, axis in enumerate(axes) if cut.changes(axis)]
    if any(axes[dim].rows for dim in changed):
        return torch.stack([zero_cut(row, own, cut) for row, own in zip(tensor, _axes_by_row(axes), strict=True)])
    if changed and any(stride == 0 for stride in tensor.stride()):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    for dim in changed:
        is_cut = np.flatnonzero(~keep_mask(axes[dim], tensor.shape[dim], cut))
        tensor.index_fill_(dim, torch.from_numpy(is_cut).to(tensor.device), 0)
    return tensor


def _axes_by_row(axes: Axes) -> list[Axes]:
    """Return the axes of each row of dimension 0, for a value whose rows differ in some dimension."""
    n_rows = next(len(axis.rows) for axis in axes if axis.rows)
    return [tuple(axis.rows[row] if axis.rows else axis for axis in axes[1:]) for row in range(n_rows)]


def is_touched(node: fx.Node, facts: Facts, cut: Cut) -> bool:
    """Check that some axis of a call's operands or results loses positions."""
    for value in (node, *node.all_input_nodes):
        axes = facts.axes.get(value.name)
        for own in axes if isinstance(axes, list) else [axes or ()]:
            if any(cut.changes(axis) for axis in own):
                return True
    return False


def writes_to_operand(node: fx.Node) -> bool:
    """Check that a call writes to an operand."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
