"""Sums over the weights that go with each unit of a group."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from torchshear.dependency import ChannelGroup, Member
from torchshear.errors import WeightError

# What a unit's removal deletes and that is a weight of the unit itself. Input columns ("in") belong to the layers that
# read the unit and biases ("bias") are offsets; either is counted only on request. Running statistics never are.
OWN_ROLES = frozenset({"out", "depthwise", "norm", "embedding", "raw"})


def unit_sums(
    group: ChannelGroup,
    weights: Mapping[str, Tensor],
    value: Callable[[Tensor], Tensor],
    roles: frozenset[str] = OWN_ROLES,
) -> Tensor:
    """Sum a function of every weight that a unit's removal deletes.

    s_c = sum over members m with a role in `roles`, over all weights w of m that go with unit c, of value(w)

    Args:
        group: the coupled dimensions; C = group.width units.
        weights: parameter name -> tensor, at least of the group's members.
        value: elementwise function of a float64 tensor.
        roles: which members count. A group that has none of them is scored by all of its members.

    Returns:
        Sums of shape (C,), float64, on the CPU.

    Raises:
        WeightError: a weight is missing, on the meta device, or not finite.
    """
    total = torch.zeros(group.width, dtype=torch.float64)
    for member in scored_members(group, weights, roles):
        lines = _per_position(member, value(_finite(member, weights[member.name])))
        total.index_add_(0, torch.from_numpy(member.units), lines[torch.from_numpy(member.positions)])
    return total


def scored_members(
    group: ChannelGroup, weights: Mapping[str, Tensor], roles: frozenset[str] = OWN_ROLES
) -> Iterator[Member]:
    """Members with a role in `roles`; all members that are parameters if no member has one.

    Raises:
        WeightError: `weights` holds no tensor for a member, and it is not a buffer.
    """
    known = [member for member in group.members if member.name in weights]
    chosen = [member for member in known if member.roles & roles]
    if not known:
        raise WeightError(
            f"no weight of group {group.name!r} was given; expected at least one of "
            f"{', '.join(member.name for member in group.members[:4])}."
        )
    yield from chosen or known


def _finite(member: Member, weight: Tensor) -> Tensor:
    if weight.is_meta:
        raise WeightError(
            f"{member.name!r} is on the meta device and has no values to score; load the weights, or make the plan "
            f"from kept units with torchshear.pruners.plan_from_kept."
        )
    weight = weight.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise WeightError(
            f"{member.name!r} holds {bad} values that are NaN or infinite; expected finite weights. Train or load the "
            f"model again: scores of such weights would be meaningless."
        )
    return weight


def _per_position(member: Member, values: Tensor) -> Tensor:
    """Sum over all dimensions but the member's; blocks of a blocked weight one after another."""
    if member.n_blocks:
        blocks = values.unflatten(0, (member.n_blocks, -1)).movedim(member.dim + 1, 1)
        return blocks.flatten(2).sum(2).flatten()
    return values.movedim(member.dim, 0).flatten(1).sum(1) if values.ndim > 1 else values
