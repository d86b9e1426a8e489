"""Slicing parameters and buffers to the positions that are kept."""

import numpy as np
import torch
from torch import Tensor, nn

from torchshear.dependency import Cut, Renumbering, StatePlan, make_state_plan


def slice_state(cut: Cut, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut every tensor to its kept positions.

    Args:
        cut: the checked choice of units.
        tensors: canonical name -> tensor of the model to be shrunk.

    Returns:
        Canonical name -> new tensor, of the same class (Parameter or Tensor), dtype, device, layout in memory (as
        channels last) and `requires_grad`.
    """
    return {name: _slice(make_state_plan(cut, name), tensor) for name, tensor in tensors.items()}


def _slice(entry: StatePlan | None, tensor: Tensor) -> Tensor:
    with torch.no_grad():
        value = tensor.detach()
        if entry is not None:
            value = _laid_out_as(tensor, cut_tensor(value, entry))
        value = value.clone() if value.data_ptr() == tensor.data_ptr() or value.is_meta else value
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value.requires_grad_(tensor.requires_grad)


def _laid_out_as(tensor: Tensor, value: Tensor) -> Tensor:
    """A value with its dimensions in memory in the order that they have in a tensor of the same rank."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], -tensor.shape[dim]))
    if 0 in strides or order == list(range(tensor.ndim)):
        return value
    back = [order.index(dim) for dim in range(tensor.ndim)]
    return value.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def cut_tensor(value: Tensor, entry: StatePlan) -> Tensor:
    """The kept values of a tensor, and of a buffer of positions their new numbers.

    Args:
        value: tensor of shape `entry.shape`.
        entry: what is kept of it.

    Returns:
        Tensor of shape `entry.new_shape`, same dtype and device; `value` itself where nothing changes.
    """
    for dim, n_blocks in entry.blocks.items():
        value = _kept_of_blocks(value, entry.kept[dim], n_blocks, dim)
    for dim, kept in entry.kept.items():
        if dim not in entry.blocks:
            value = value.index_select(dim, torch.from_numpy(kept).to(value.device))
    return value if entry.numbers is None else _renumbered(value, entry.numbers)


def _kept_of_blocks(value: Tensor, kept: np.ndarray, n_blocks: int, dim: int) -> Tensor:
    """Take, in each block of rows, the positions that this block keeps; all blocks keep equally many."""
    index = torch.from_numpy(kept.reshape(n_blocks, -1) % value.shape[dim]).to(value.device)
    blocks = value.reshape(n_blocks, -1, *value.shape[1:]).movedim(dim + 1, 1)
    shape = (n_blocks, index.shape[1], *(1 for _ in blocks.shape[2:]))
    taken = blocks.gather(1, index.reshape(shape).expand(-1, -1, *blocks.shape[2:]))
    return taken.movedim(1, dim + 1).flatten(0, 1)


def _renumbered(value: Tensor, numbers: Renumbering) -> Tensor:
    """A buffer that holds positions of another axis counts only those that are left."""
    ranks = np.zeros(numbers.size, np.int64)
    ranks[numbers.kept] = np.arange(len(numbers.kept))
    return torch.from_numpy(ranks).to(value.device)[value.long() % numbers.size].to(value.dtype)
