"""Sums over the weights that go with each unit of a group."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchshear.calibration._sums import wide
from torchshear.dependency import ChannelGroup, Member
from torchshear.dependency.groups._purposes import OWN_PURPOSES
from torchshear.errors import WeightError

_PIECE = 1 << 19  # elements that are worked on at a time: a few MB, which stay in the cache


def unit_sums(
    group: ChannelGroup,
    weights: Mapping[str, Tensor],
    value: Callable[[Tensor], Tensor],
    purposes: frozenset[str] = OWN_PURPOSES,
) -> Tensor:
    """Sum a function of every weight of a unit's own: not of biases, nor of what other layers read it with.

    s_c = sum over members m with a purpose in `purposes`, over all weights w of m that go with unit c, of value(w)

    Args:
        group: the coupled dimensions; C = group.width units.
        weights: parameter name -> tensor, at least of the group's members.
        value: elementwise function of a floating tensor, in the weight's dtype or float32, whichever is wider.
        purposes: which members count. A group that has none of them is scored by all of its members.

    Returns:
        Sums of shape (C,), float64, on the CPU.

    Raises:
        WeightError: a weight is missing, on the meta device, or not finite.
    """
    known = [member for member in group.members if member.name in weights]
    if not known:
        raise WeightError(
            f"no weight of group {group.name!r} was given; expected at least one of "
            f"{', '.join(member.name for member in group.members[:4])}."
        )
    total = torch.zeros(group.width, dtype=torch.float64)
    for member in [member for member in known if member.purposes & purposes] or known:
        lines = position_sums(member, weights, value)
        total.index_add_(0, torch.from_numpy(member.units), lines[torch.from_numpy(member.positions)])
    return total


def position_sums(member: Member, weights: Mapping[str, Tensor], value: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum at each position of a member, in float64; blocks of a blocked weight come one after another.

    The weight is let go before another is read.

    Raises:
        WeightError: the weight is on the meta device, or not finite.
    """
    weight = readable(member, weights[member.name])
    others = [dim for dim in range(weight.ndim) if dim != member.dim]
    if member.n_blocks:
        blocks = value(wide(weight)).reshape(member.n_blocks, -1, *weight.shape[1:]).movedim(member.dim + 1, 1)
        lines = blocks.flatten(2).sum(2, dtype=torch.float64).flatten().cpu()
    elif not others:
        lines = value(wide(weight)).to("cpu", torch.float64)
    else:  # in pieces, so that no temporary is as large as the weight
        rows = max(1, _PIECE // max(1, weight.numel() // weight.shape[member.dim]))
        pieces = torch.split(weight, rows, member.dim)
        lines = torch.cat([value(wide(piece)).sum(others, dtype=torch.float64) for piece in pieces]).cpu()
    if not bool(torch.isfinite(lines).all()):
        raise not_finite(member, weight)
    return lines


def readable(member: Member, weight: Tensor) -> Tensor:
    """A weight without its gradient.

    Raises:
        WeightError: it has no values.
    """
    if weight.is_meta:
        raise WeightError(
            f"{member.name!r} is on the meta device and has no values to score; load the weights, or make the plan "
            f"from kept units with torchshear.pruners.plan_from_kept."
        )
    return weight.detach()


def not_finite(member: Member, weight: Tensor) -> WeightError:
    """The error for a weight whose scores are NaN or infinite."""
    bad = int((~torch.isfinite(weight)).sum())
    what = f"{bad} values that are NaN or infinite" if bad else "values so large that their sum overflows"
    return WeightError(
        f"{member.name!r} holds {what}; expected finite weights. Train or load the model again: scores of such weights "
        f"would be meaningless."
    )
