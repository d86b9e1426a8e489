"""Weights as products read them: directly, with dimensions exchanged, one of several, or rows that data picks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from torchshear.dependency._call import Call, bind_arguments
from torchshear.dependency._registry import operator_name
from torchshear.graph._computed import is_from_state
from torchshear.graph._graph import shape_of

Place = int | None
_Given = Mapping[str, Any]
_Moved = Callable[[_Given, list[Place]], list[Place] | None]


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
    for role, dims in (("out", makes), ("in_", reads)):
        for dim in dims:
            place = places[dim]
            if place is not None:
                call.role(weight, **{role: place})


def weight_behind(operand: fx.Node, carriers: Mapping[str, fx.Node]) -> tuple[fx.Node, list[Place]] | None:
    """The parameter or buffer behind an operand, and of each dimension of the operand its own; None of a new one.

    Args:
        operand: the operand.
        carriers: computed weight, by the name of its node -> the tensor of the model that it stands for.
    """
    weight, calls = unmoved(operand)
    weight = carriers.get(weight.name, weight)
    if weight.op != "get_attr":
        return None
    places: list[Place] | None = list(range(len(shape_of(weight))))
    for call in reversed(calls):
        moved = _moved_by(call)
        places = moved(bind_arguments(call), places) if moved is not None and places is not None else None
    return None if places is None else (weight, places)


def unmoved(operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The value behind all calls that only move dimensions, and these calls, the last first."""
    calls: list[fx.Node] = []
    while _moved_by(operand) is not None and operand.args and isinstance(operand.args[0], fx.Node):
        calls.append(operand)
        operand = operand.args[0]
    return operand, calls


def _moved_by(call: fx.Node) -> _Moved | None:
    namespace, name, *_ = operator_name(call).split(".")
    return _MOVED.get(name) if namespace == "aten" else None


def _transposed(given: _Given, places: list[Place]) -> list[Place]:
    one, other, moved = int(given["dim0"]), int(given["dim1"]), list(places)
    moved[one], moved[other] = places[other], places[one]
    return moved


def _selected(given: _Given, places: list[Place]) -> list[Place]:
    dim = int(given["dim"]) % len(places)
    return places[:dim] + places[dim + 1 :]


def _indexed(given: _Given, places: list[Place]) -> list[Place] | None:
    if len(given["indices"]) != 1:
        return None
    return [None] * len(shape_of(given["indices"][0])) + places[1:]


def _rows_selected(given: _Given, places: list[Place]) -> list[Place]:
    return [None if at == int(given["dim"]) % len(places) else place for at, place in enumerate(places)]


# Calls that do no more than move dimensions: where those of the result are in the operand; None if they do more.
_MOVED: dict[str, _Moved] = {
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "to", "_to_copy"), lambda given, places: places),
    "t": lambda given, places: places[::-1],
    "numpy_T": lambda given, places: places[::-1],
    "mT": lambda given, places: [*places[:-2], places[-1], places[-2]],
    "transpose": _transposed,
    "permute": lambda given, places: [places[int(dim)] for dim in given["dims"]],
    "select": _selected,
    "index": _indexed,
    "index_select": _rows_selected,
}
