"""Cut and kept positions of values, as the rules tell them: zeroed, or taken out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from torchshear.dependency import Axes, Axis, Cut

Bools = npt.NDArray[np.bool_]


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
        gone = ~keep_of(axes[dim], tensor.shape[dim], cut)
        tensor.index_fill_(dim, _positions(gone, tensor), 0)
    return tensor


def gather(tensor: Tensor, axes: Axes, cut: Cut) -> Tensor:
    """The kept positions of a value."""
    if any(axis.rows for axis in axes):
        return torch.stack([gather(row, own, cut) for row, own in zip(tensor, _by_row(axes), strict=True)])
    for dim, axis in enumerate(axes):
        if cut.changes(axis):
            tensor = tensor.index_select(dim, _positions(keep_of(axis, tensor.shape[dim], cut), tensor))
    return tensor


def writes_to_operand(node: fx.Node) -> bool:
    """Check that a call writes to an operand."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _by_row(axes: Axes) -> list[Axes]:
    """Axes of each row of dimension 0, of a value whose rows differ in some dimension."""
    n_rows = next(len(axis.rows) for axis in axes if axis.rows)
    return [tuple(axis.rows[row] if axis.rows else axis for axis in axes[1:]) for row in range(n_rows)]


def keep_of(axis: Axis, size: int, cut: Cut) -> Bools:
    """Which of `size` positions are kept; an axis that holds the batch as well repeats with every sample.

    Raises:
        IndexError: the axis has another size, and not because of the batch.
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


def _positions(mask: Bools, tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(tensor.device)
