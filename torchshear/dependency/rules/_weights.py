"""Weights as products read them: directly, with dimensions exchanged, one of several, or rows that data picks."""

from collections.abc import Sequence

from torch import fx

from torchshear.dependency._call import Call, bind_arguments
from torchshear.graph._graph import shape_of

_SAME = frozenset({"alias", "clone", "contiguous", "detach", "to", "_to_copy"})

Place = int | None


def weight_roles(call: Call, operand: fx.Node, makes: Sequence[int], reads: Sequence[int]) -> None:
    """Say that an operand is a layer's weight, if it is a parameter or is made of one by moving dimensions.

    Args:
        call: the call that multiplies it with a value.
        operand: the operand.
        makes: its dimensions that the result keeps and the value does not have.
        reads: those that are summed over.
    """
    found = weight_behind(operand)
    if found is None:
        return
    weight, places = found
    for role, dims in (("out", makes), ("in_", reads)):
        for dim in dims:
            place = places[dim]
            if place is not None:
                call.role(weight, **{role: place})


def weight_behind(operand: fx.Node) -> tuple[fx.Node, list[Place]] | None:
    """The parameter or buffer behind an operand, and of each dimension of the operand its own; None of a new one."""
    if operand.op == "get_attr":
        return operand, list(range(len(shape_of(operand))))
    parts = str(operand.target).split(".")
    if parts[0] != "aten" or not operand.args or not isinstance(operand.args[0], fx.Node):
        return None
    found = weight_behind(operand.args[0])
    places = None if found is None else _moved(parts[1], operand, found[1])
    return None if found is None or places is None else (found[0], places)


def _moved(name: str, node: fx.Node, places: list[Place]) -> list[Place] | None:
    """Where dimensions are behind a call; None if it does more than move them."""
    given = bind_arguments(node)
    if name in _SAME:
        return places
    if name in ("t", "numpy_T", "mT"):
        return places[::-1] if name != "mT" else [*places[:-2], places[-1], places[-2]]
    if name == "transpose":
        one, other = int(given["dim0"]), int(given["dim1"])
        moved = list(places)
        moved[one], moved[other] = places[other], places[one]
        return moved
    if name == "permute":
        return [places[int(dim)] for dim in given["dims"]]
    if name == "select":
        dim = int(given["dim"]) % len(places)
        return places[:dim] + places[dim + 1 :]
    if name == "index" and len(given["indices"]) == 1:
        return [None] * len(shape_of(given["indices"][0])) + places[1:]
    if name == "index_select":
        return [None if at == int(given["dim"]) % len(places) else place for at, place in enumerate(places)]
    return None
