"""Weights of a channel group, position by position."""

import numpy as np
import torch
from torch import Tensor

from torchshear.dependency import Member
from torchshear.dependency.plans._tensor_plans import StatePlan


def by_position(member: Member, tensor: Tensor) -> Tensor:
    """The values at each position of a member's dimension.

    Args:
        member: the dimension; of blocked weights the positions of all blocks, one block after another.
        tensor: a tensor of the parameter's shape.

    Returns:
        Shape (member.size, values of one position).
    """
    if member.n_blocks:
        blocks = tensor.reshape(member.n_blocks, -1, *tensor.shape[1:]).movedim(member.dim + 1, 1)
        return blocks.flatten(2).flatten(0, 1)
    return tensor.movedim(member.dim, 0).reshape(member.size, -1)


def mask_of_units(member: Member, shape: tuple[int, ...], kept: Tensor) -> Tensor:
    """A mask of a parameter's shape that is False at all positions of the units that are not kept.

    Args:
        member: the dimension.
        shape: shape of the parameter.
        kept: bool tensor, one entry a unit of the group.
    """
    line = np.ones(member.size, bool)
    np.logical_and.at(line, member.positions, kept.cpu().numpy()[member.units])
    blocks = {member.dim: member.n_blocks} if member.n_blocks else {}
    return StatePlan(shape, {member.dim: np.flatnonzero(line)}, blocks).mask()


def unit_values(member: Member, lines: Tensor, width: int, reduce: str = "sum") -> Tensor:
    """Sum or maximum of a member's values for each unit, from one value a position.

    Args:
        member: the dimension.
        lines: shape (member.size,), on the CPU.
        width: number of units of the group.
        reduce: "sum" or "max".

    Returns:
        Shape (width,), float64; of a unit that has no position 0, or -inf as the maximum.
    """
    found = np.full(width, -np.inf if reduce == "max" else 0.0)
    combine = np.maximum if reduce == "max" else np.add
    combine.at(found, member.units, lines.numpy()[member.positions])
    return torch.from_numpy(found)
