"""Recurrent calls one layer and direction at a time, so that what each gives at every step can be seen.

A call of several layers shows what the last one gives at every step, and of the others the last step alone. Run one
after another they give the same numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.dependency.algebra._axis import Axis
from torchshear.dependency.rules._call import bind_arguments
from torchshear.dependency.rules._findings import Result
from torchshear.graph._nodes import shape_of
from torchshear.graph._operator_record import Recurrence, operator_of

See = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Pass:
    """One layer in one direction of a recurrent call.

    Attributes:
        node: name of the call.
        number: its place among the layers and directions of the call.
        weights: canonical names of its weights: that for inputs, for states, and that of a projection if there is one;
            "" of one that is computed.
        biases: canonical names of the biases of the first two; empty if there are none.
        source: what its inputs are called among the values that are seen.
        before: what the states that it reads are called.
        sums: what its gates are called before their sigmoid or tanh, the sums that its weights make.
        has_zeros: whether what it gives is exactly zero over a range of inputs.
        shape: of what it gives.
        batch: dimension of it along which the batch of the call stands.
    """

    node: str
    number: int
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    source: str
    before: str
    sums: str
    has_zeros: bool
    shape: tuple[int, ...]
    batch: int

    @property
    def name(self) -> str:
        """Name of the results at all steps."""
        return f"{self.node}:{self.number}"

    @property
    def dim(self) -> int:
        """Dimension of the units in what it gives, and of the numbers that it reads."""
        return len(self.shape) - 1


def is_recurrent(node: fx.Node) -> bool:
    """Return whether a call is that of a recurrent layer or cell."""
    return operator_of(node).recurrence is not None


def _recurrence(node: fx.Node) -> Recurrence:
    found = operator_of(node).recurrence
    assert found is not None
    return found


def passes(node: fx.Node) -> tuple[Pass, ...]:
    """All layers and directions of a recurrent call, in the order of its weights."""
    return tuple([_pass_of_cell(node)] if _recurrence(node).is_cell else _passes_of_layers(node))


def axes_of(results: Result, n_passes: int) -> list[Axis]:
    """Axes of the units that each pass of a call gives, from those of its results."""
    if isinstance(results, tuple):
        return [results[-1]]
    assert results is not None
    last = results[1][-1]
    return list(last.rows) if n_passes > 1 else [last]


def run(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], see: See, shows_sums: bool = False) -> Any:
    """The results of a recurrent call.

    Args:
        node: the call.
        args: its arguments as values.
        kwargs: likewise.
        see: called with the name of a value (see `Pass`) and the value, gives the value to go on with. Final states
            are what it gives at the last step.
        shows_sums: whether zeros that are added to the sums that weights make are seen as well: the gradient by them is
            that by the sums. What states tell the last gate of a GRU is taken as if that gate was not reset.
    """
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, args, strict=False)) | kwargs
    if _recurrence(node).is_cell:
        return _run_cell(node, given, see, shows_sums)
    return _run_layers(node, given, see, shows_sums)


def _name(weight: fx.Node) -> str:
    return str(weight.target) if weight.op == "get_attr" else ""


def _passes_of_layers(node: fx.Node) -> Iterator[Pass]:
    given = bind_arguments(node)
    weights = [_name(weight) for weight in given["params"]]
    n_directions = 2 if given["bidirectional"] else 1
    n_passes = int(given["num_layers"]) * n_directions
    n_each, n_biases = len(weights) // n_passes, 2 if given["has_biases"] else 0
    for number in range(n_passes):
        own = weights[number * n_each : (number + 1) * n_each]
        layer = number // n_directions
        w_hh = given["params"][number * n_each + 1]
        yield Pass(
            node=node.name,
            number=number,
            weights=(*own[:2], *own[2 + n_biases :]),
            biases=tuple(own[2 : 2 + n_biases]),
            source=f"{node.name}:read by {layer}" if layer else given["input"].name,
            before=f"{node.name}:before {number}",
            sums=f"{node.name}:sums {number}",
            has_zeros=_recurrence(node).has_zeros,
            shape=(*shape_of(given["input"])[:2], shape_of(w_hh)[1]),
            batch=0 if given["batch_first"] else 1,
        )


def _pass_of_cell(node: fx.Node) -> Pass:
    given = bind_arguments(node)
    state = given["hx"][0] if isinstance(given["hx"], list | tuple) else given["hx"]
    return Pass(
        node=node.name,
        number=0,
        weights=(_name(given["w_ih"]), _name(given["w_hh"])),
        biases=tuple(_name(given[word]) for word in ("b_ih", "b_hh") if given[word] is not None),
        source=given["input"].name,
        before=state.name,
        sums=f"{node.name}:sums 0",
        has_zeros=_recurrence(node).has_zeros,
        shape=shape_of(state),
        batch=0,
    )


def _run_cell(node: fx.Node, given: dict[str, Any], see: See, shows_sums: bool) -> Any:
    if shows_sums:
        x, w_ih = _add_zeros(given["input"], given["w_ih"], f"{node.name}:sums 0", see)
        given = given | {"input": x, "w_ih": w_ih}
    found = node.target(**given)  # type: ignore[operator]
    if isinstance(found, Tensor):
        return see(f"{node.name}:0", found)
    return (see(f"{node.name}:0", found[0]), *found[1:])


def _run_layers(node: fx.Node, given: dict[str, Any], see: See, shows_sums: bool) -> tuple[Tensor, ...]:
    """Every layer reads what the directions below it give, side by side; there is no dropout in eval mode."""
    n_layers, is_both = int(given["num_layers"]), bool(given["bidirectional"])
    n_directions = 2 if is_both else 1
    n_each = len(given["params"]) // (n_layers * n_directions)
    states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
    time = 1 if given["batch_first"] else 0
    x, ends = given["input"], []
    for layer in range(n_layers):
        x = see(f"{node.name}:read by {layer}", x) if layer else x
        results = []
        for number in range(layer * n_directions, (layer + 1) * n_directions):
            own = given["params"][number * n_each : (number + 1) * n_each]
            first = [state[number : number + 1].contiguous() for state in states]
            is_backward = number % n_directions == 1
            read = x.flip(time) if is_backward else x
            if shows_sums:
                read, w_ih = _add_zeros(read, own[0], f"{node.name}:sums {number}", see)
                own = [w_ih, *own[1:]]
            out, *last = run_pass(node, given, read, first, own)
            out = see(f"{node.name}:{number}", out.flip(time) if is_backward else out)
            see(f"{node.name}:before {number}", states_before(first[0], out, time, is_backward))
            ends.append([out.select(time, 0 if is_backward else out.shape[time] - 1)[None], *last[1:]])
            results.append(out)
        x = torch.cat(results, 2) if is_both else results[0]
    return (x, *(torch.cat(state) for state in zip(*ends, strict=True)))


def _add_zeros(x: Tensor, w_ih: Tensor, name: str, see: See) -> tuple[Tensor, Tensor]:
    """Return an input with zeros beside it, one for each sum that a weight makes of it, and a weight that adds them.

    The zeros depend on the weight, so that the gradient by them is known when that by the weight is taken.
    """
    n_sums = len(w_ih)
    zeros = see(name, x.new_zeros(*x.shape[:-1], n_sums) * w_ih[0, 0])
    return torch.cat([x, zeros], -1), torch.cat([w_ih, torch.eye(n_sums, dtype=w_ih.dtype, device=w_ih.device)], 1)


def states_before(start: Tensor, out: Tensor, time: int, is_backward: bool) -> Tensor:
    """The states that the steps of a layer in one direction read, in the shape of what it gives.

    Args:
        start: the initial state, shape (1, batch, out).
        out: what it gives at all steps.
        time: dimension of the steps.
        is_backward: whether it begins with the last step. The initial state comes first all the same.
    """
    after = out.narrow(time, 1 if is_backward else 0, out.shape[time] - 1)
    return torch.cat([start.transpose(0, 1) if time else start, after], time)


def run_pass(
    node: fx.Node, given: dict[str, Any], x: Tensor, states: list[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The results of one layer in one direction.

    Args:
        node: the call that it is a part of.
        given: arguments of the call by name.
        x: what the layer reads, its steps in the order in which it takes them.
        states: initial states, each of shape (1, batch, width).
        weights: its weights and biases.
    """
    hx = states if isinstance(given["hx"], list | tuple) else states[0]
    is_train = torch.is_grad_enabled()  # without dropout it is the same, and cuDNN gives gradients in train mode only
    rest = (given["has_biases"], 1, 0.0, is_train, False, given["batch_first"])
    found: tuple[Tensor, ...] = node.target(x, hx, list(weights), *rest)  # type: ignore[operator]
    return found
