"""Small networks for `mutations.py`: for each operator that has a rule at least one that can be cut through it.

Mostly a layer of 12 units, a call, and a layer that reads each of them: what comes out of a call is read as it is, for
`x * call(x)` would tie a mirrored result to its operand, which couples more than is needed and is no fault.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

A = torch.ops.aten
Run = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A network for some operators.

    Attributes:
        operators: names as in the registry, with an overload where the network calls that one.
        run: forward of the network, `run(module, *inputs)`.
        parts: makes layers, parameters and buffers.
        inputs: shapes of the inputs, the batch first; or one tensor itself.
        name: said beside the operator where it has several networks.
    """

    operators: tuple[str, ...]
    run: Run
    parts: Callable[[], dict[str, Any]]
    inputs: tuple[Any, ...]
    name: str = ""


@dataclass(frozen=True)
class Kind:
    """What lies between two layers: the shape of inputs, the layers, and the dimension of the 12 units."""

    shape: tuple[int, ...]
    layer: Callable[[int, int], nn.Module]
    dim: int


UNITS = 12
KINDS = {
    "features": Kind((3, 4), nn.Linear, -1),
    "tokens": Kind((3, 5, 4), nn.Linear, -1),
    "square": Kind((3, UNITS, 4), nn.Linear, -1),
    "rows": Kind((3, 4, 5, 4), nn.Linear, -1),
    "signals": Kind((3, 4, 8), lambda i, o: nn.Conv1d(i, o, 1), 1),
    "maps": Kind((3, 4, 6, 6), lambda i, o: nn.Conv2d(i, o, 1), 1),
    "volumes": Kind((3, 4, 4, 4, 4), lambda i, o: nn.Conv3d(i, o, 1), 1),
}
CASES: list[Case] = []


def full_name(name: str) -> str:
    """Name of an operator as in the registry; "@" in front says that it reads positions."""
    if name.startswith("@"):
        return f"positions:aten.{name[1:]}"
    return name if name.split(".")[0] in ("python", "torchvision", "experts") else f"aten.{name}"


def between(
    operators: str, call: Callable[[Tensor], Tensor], kind: str = "features", read: Any = None, mixes: bool = True
) -> None:
    """Add two networks: a layer, the call and a layer; and the same with a softmax over the units behind the call.

    Args:
        operators: names without "aten.", separated by spaces.
        call: what is made of the hidden values.
        kind: one of `KINDS`.
        read: makes the layer behind the call, where it is not that of the kind; its units are then the last dimension.
        mixes: whether the second network is added. Not where the result has one value throughout: a softmax of that
            is the same whichever positions go.
    """
    given = KINDS[kind]
    dim = given.dim if read is None else -1

    def parts() -> dict[str, nn.Module]:
        return {"one": given.layer(4, UNITS), "two": given.layer(UNITS, 3) if read is None else read()}

    def plain(m: Any, x: Tensor) -> Tensor:
        return m.two(call(m.one(x)))

    def mixed(m: Any, x: Tensor) -> Tensor:
        return m.two(call(m.one(x)).softmax(dim))

    names = tuple(map(full_name, operators.split()))
    CASES.append(Case(names, plain, parts, (given.shape,), "plain"))
    if mixes:
        CASES.append(Case(names, mixed, parts, (given.shape,), "before a softmax"))


def branches(operators: str, call: Callable[[Tensor, Tensor], Tensor], kind: str = "features") -> None:
    """Add a network in which the call joins two layers of units that nothing else ties."""
    given = KINDS[kind]

    def parts() -> dict[str, nn.Module]:
        return {"a": given.layer(4, UNITS), "b": given.layer(4, UNITS), "two": given.layer(UNITS, 3)}

    names = tuple(map(full_name, operators.split()))
    CASES.append(Case(names, lambda m, x: m.two(call(m.a(x), m.b(x))), parts, (given.shape,), "two branches"))


def network(operators: str, run: Run, *inputs: Any, **parts: Callable[[], Any]) -> None:
    """Add a network of its own."""
    names = tuple(map(full_name, operators.split()))
    CASES.append(Case(names, run, lambda: {name: make() for name, make in parts.items()}, inputs))


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    """Makes a parameter."""
    return lambda: nn.Parameter(torch.zeros(shape))


def linear(n_in: int, n_out: int) -> Callable[[], nn.Module]:
    """Makes a linear layer."""
    return lambda: nn.Linear(n_in, n_out)


def index(*positions: int) -> Tensor:
    """A constant vector of positions."""
    return torch.tensor(positions)


def along(x: Tensor, *positions: int) -> Tensor:
    """An index along dimension 1 of tokens, the same for every feature."""
    return index(*positions).view(1, -1, 1).expand(x.shape[0], -1, x.shape[2])


def to(x: Tensor, like: Tensor) -> Tensor:
    """In the type of another value."""
    return x.to(like.dtype)
