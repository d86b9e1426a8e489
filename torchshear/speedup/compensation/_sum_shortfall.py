"""Error of the other operand of a sum, which a layer in front of the sum can make up for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.dependency.rules._call import bind_arguments
from torchshear.graph._operator_record import operator_of


@dataclass(frozen=True, slots=True)
class SumBehind:
    """The sum that alone reads the value of a layer.

    Attributes:
        node: the sum.
        place: number of the argument that comes from the layer, 0 or 1.
        other: the other operand.
        norm: the batch norm in between, or None.
    """

    node: fx.Node
    place: int
    other: fx.Node
    norm: fx.Node | None


def find_sum(node: fx.Node) -> SumBehind | None:
    """Find the sum that alone reads the value of a layer, if need be through a batch norm."""
    norm: fx.Node | None = None
    last = node
    while len(last.users) == 1:
        user = next(iter(last.users))
        known = operator_of(user)
        if known.is_sum:
            others = [(1 - place, operand) for place, operand in enumerate(user.args[:2]) if operand is not last]
            if len(others) == 1 and isinstance(others[0][1], fx.Node):  # not a number, nor the value itself
                return SumBehind(user, others[0][0], others[0][1], norm)
            return None
        if norm is None and _normalizes_by_running_statistics(user, last):
            norm = user
        elif not (known.keeps_positions or known.passes == "dropout"):
            return None
        last = user
    return None


def _normalizes_by_running_statistics(node: fx.Node, operand: fx.Node) -> bool:
    """Check that a call is a batch norm over an operand, in eval mode."""
    norm = operator_of(node).norm
    if norm is None or norm.over != "batch":
        return False
    given = bind_arguments(node)
    return given.get(norm.input) is operand and not given.get(norm.own)


def shortfall(
    found: SumBehind,
    dense: Tensor,
    small: Tensor,
    state: Mapping[str, Tensor],
) -> Tensor:
    """Return what has to be added to the value of a layer so that the sum behind it is that of the original.

        a' = a + (c_b / c_a) (b - b') / f

    where the sum is c_a a + c_b b, b the other operand in the original and b' in the smaller network, and f the factor
    of the batch norm in between, or 1.

    Args:
        found: the sum behind the layer.
        dense: the other operand in the original, at the kept positions.
        small: the same in the smaller network.
        state: canonical name -> tensor of the smaller network.
    """
    node, norm, own = found.node, found.norm, found.place

    def coefficient(of_first: float, of_second: float) -> float:
        one, other = (torch.tensor(value, dtype=torch.float64) for value in (of_first, of_second))
        result: Tensor = node.target(one, other, *node.args[2:], **node.kwargs)  # type: ignore[operator]
        return float(result)

    coefficients = coefficient(1.0, 0.0), coefficient(0.0, 1.0)
    missing = (dense - small) * (coefficients[1 - own] / coefficients[own])
    if norm is None:
        return missing
    factor = _factor(norm, state)
    line = [1] * missing.ndim
    line[1] = -1
    large = factor.abs() > 1e-3 * factor.abs().max()
    return missing * torch.where(large, 1 / torch.where(large, factor, 1.0), 0.0).to(missing).reshape(line)


def _factor(node: fx.Node, state: Mapping[str, Tensor]) -> Tensor:
    """Return the factor of each channel of a batch norm, shape (C,), float64."""
    norm, given = operator_of(node).norm, bind_arguments(node)
    assert norm is not None, "found as a norm"

    def tensor(argument: str) -> Tensor | None:
        held: Any = given.get(argument)
        return state[str(held.target)].double() if isinstance(held, fx.Node) and held.op == "get_attr" else None

    variance, scale = tensor(norm.variance), tensor(norm.scale)
    assert variance is not None, "running statistics are used"
    factor = 1 / (variance + (given.get("eps") or 0.0)).sqrt()
    return factor if scale is None else factor * scale
