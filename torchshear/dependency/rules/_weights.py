"""Weights as products read them: directly, with dimensions exchanged, one of several, or rows that data picks."""

from collections.abc import Mapping, Sequence

from torch import fx

from torchshear.dependency.rules._call import Call, bind_arguments
from torchshear.graph._nodes import is_from_state, shape_of
from torchshear.graph._operator_record import SourceDim, operator_of


def weight_roles(call: Call, operand: fx.Node, makes: Sequence[int], reads: Sequence[int]) -> None:
    """Say that an operand is a layer's weight, if it is a parameter or is made of one by moving dimensions.

    Args:
        call: the call that multiplies it with a value.
        operand: the operand.
        makes: its dimensions that the result keeps and the value does not have.
        reads: those that are summed over.
    """
    found = weight_behind(operand, call.carriers)
    if found is None or is_from_state(call.node):  # no layer: a weight is computed
        return
    weight, places = found
    for purpose, dims in (("out", makes), ("in_", reads)):
        for dim in dims:
            place = places[dim]
            if place is not None:
                call.purpose(weight, **{purpose: place})


def weight_behind(operand: fx.Node, carriers: Mapping[str, fx.Node]) -> tuple[fx.Node, list[SourceDim]] | None:
    """Find the parameter or buffer behind an operand, and its dimension for each of the operand; None of a new one.

    Args:
        operand: the operand.
        carriers: computed weight, by the name of its node -> the tensor of the model that it stands for.
    """
    weight, calls = unwrap_moves(operand)
    weight = carriers.get(weight.name, weight)
    if weight.op != "get_attr":
        return None
    places: list[SourceDim] | None = list(range(len(shape_of(weight))))
    for call in reversed(calls):
        moved = operator_of(call).source_dims
        if moved is not None and places is not None:  # any other call leaves dimensions where they are
            places = moved(bind_arguments(call), places)
    return None if places is None else (weight, places)


def unwrap_moves(operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return the value behind all calls that only move dimensions, and these calls, the last first."""
    calls: list[fx.Node] = []
    while operand.args and isinstance(operand.args[0], fx.Node):
        known = operator_of(operand)
        if not known.keeps_positions and known.source_dims is None:
            break
        calls.append(operand)
        operand = operand.args[0]
    return operand, calls
