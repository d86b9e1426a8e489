"""Slicing parameters and buffers to the positions that are kept."""

import numpy as np
import torch
from torch import Tensor, nn

from torchshear.dependency import Cut


def slice_state(cut: Cut, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut every tensor to its kept positions.

    Args:
        cut: the checked choice of units.
        tensors: canonical name -> tensor of the model to be shrunk.

    Returns:
        Canonical name -> new tensor, of the same class (Parameter or Tensor), dtype, device and `requires_grad`.
    """
    return {name: _slice(cut, name, tensor) for name, tensor in tensors.items()}


def _slice(cut: Cut, name: str, tensor: Tensor) -> Tensor:
    with torch.no_grad():
        value = tensor.detach()
        if name in cut.groups.facts.state_axes:
            value = _positions(cut, name, _kept_values(cut, name, value))
        value = value.clone() if value.data_ptr() == tensor.data_ptr() or value.is_meta else value
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value.requires_grad_(tensor.requires_grad)


def _kept_values(cut: Cut, name: str, value: Tensor) -> Tensor:
    masks, blocked = cut.state_keep(name)
    if blocked is not None:
        dim, n_blocks = blocked
        value = _kept_of_blocks(value, masks[dim], n_blocks, dim)
        masks[dim] = np.ones(value.shape[dim], bool)
    for dim, mask in enumerate(masks):
        if not mask.all():
            value = value.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(value.device))
    return value


def _kept_of_blocks(value: Tensor, mask: np.ndarray, n_blocks: int, dim: int) -> Tensor:
    """Take, in each block of rows, the positions that this block keeps; all blocks keep equally many."""
    rows = mask.reshape(n_blocks, -1)
    index = torch.from_numpy(np.flatnonzero(rows.reshape(-1)).reshape(n_blocks, -1) % rows.shape[1]).to(value.device)
    blocks = value.reshape(n_blocks, -1, *value.shape[1:]).movedim(dim + 1, 1)
    shape = (n_blocks, index.shape[1], *(1 for _ in blocks.shape[2:]))
    taken = blocks.gather(1, index.reshape(shape).expand(-1, -1, *blocks.shape[2:]))
    return taken.movedim(1, dim + 1).flatten(0, 1)


def _positions(cut: Cut, name: str, value: Tensor) -> Tensor:
    """A buffer that holds positions of another axis counts only those that are left."""
    axis = cut.groups.facts.positions.get(name)
    if axis is None or not cut.changes(axis):
        return value
    rank = torch.from_numpy(np.cumsum(cut.keep(axis)) - 1).to(value.device)
    return rank[value.long() % axis.size].to(value.dtype)
