"""Recurrent layers: gate blocks of the weights repeat the hidden units, which every step reads again.

The layers and directions of one call may keep hidden units of their own choice, but equally many: the call has one
hidden size. Cut hidden units stay zero through time if they begin at zero, so the masked network is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import Result
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Operator, Recurrence, Shape, operator_of


def _macs_of_layers(operands: Sequence[Shape], result: Any) -> int:
    """Count each matrix once a step and sample; operands of rank 3 are input and states, of rank 1 biases."""
    return prod(operands[0][:2]) * sum(prod(shape) for shape in operands if len(shape) == 2)


def _macs_of_cell(operands: Sequence[Shape], result: Any) -> int:
    """Count both matrices once a sample; operands of rank 2 before them are input and states."""
    matrices = [shape for shape in operands if len(shape) == 2][-2:]
    return operands[0][0] * sum(prod(shape) for shape in matrices)


def _layers_of(n_gates: int, has_zeros: bool = False) -> Operator:
    return Operator(recurrence=Recurrence(n_gates=n_gates, has_zeros=has_zeros), macs=_macs_of_layers)


def _cell_of(n_gates: int, has_zeros: bool = False) -> Operator:
    return Operator(recurrence=Recurrence(n_gates=n_gates, is_cell=True, has_zeros=has_zeros), macs=_macs_of_cell)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One direction of one layer: axes of its hidden units, of what it hands on, and of what it reads."""

    hidden: Axis
    handed_on: Axis
    read: Axis


@operator_rule("aten.lstm.input", operator=_layers_of(4))
@operator_rule("aten.gru.input", operator=_layers_of(3))
@operator_rule("aten.rnn_tanh.input", operator=_layers_of(1))
@operator_rule("aten.rnn_relu.input", operator=_layers_of(1, has_zeros=True))
def _recurrent(call: Call) -> Result:
    """Input (steps, batch, in) or (batch, steps, in); states (layers * directions, batch, hidden).

    Weights of each layer and direction: w_ih (gates * hidden, in), w_hh (gates * hidden, out), biases (gates * hidden)
    if there are any, and w_hr (out, hidden) where the hidden units are projected; else out is hidden.
    """
    x = call.axes("input")
    batch, time = (0, 1) if call.arg("batch_first") else (1, 0)
    call.fix([x[time]], "steps of a recurrent layer")
    layers = _layers(call, x[2])
    states = call.arg("hx")
    states = list(states) if isinstance(states, list | tuple) else [states]
    of_states = [[layer.handed_on for layer in layers], [layer.hidden for layer in layers]][: len(states)]
    results = [_tie_state(call, *pair, x[batch]) for pair in zip(states, of_states, strict=True)]
    last = layers[-2:] if call.arg("bidirectional") else layers[-1:]
    out = (*x[:2], call.algebra.concat([layer.handed_on for layer in last]))
    return [out, *results]


def _layers(call: Call, given: Axis) -> list[_Layer]:
    """Relate the weights of all layers and directions, each layer reading what the directions below hand on."""
    n_directions = 2 if call.arg("bidirectional") else 1
    weights: list[fx.Node] = list(call.arg("params"))
    n_each = len(weights) // (int(call.arg("num_layers")) * n_directions)
    layers: list[_Layer] = []
    for at in range(0, len(weights), n_each):
        layers.append(_layer(call, weights[at : at + n_each], bool(call.arg("has_biases"))))
        above = len(layers) - 1 - (len(layers) - 1) % n_directions
        below = layers[above - n_directions : above]
        call.tie(layers[-1].read, call.algebra.concat([layer.handed_on for layer in below]) if below else given)
    call.equally_wide([layer.hidden for layer in layers])
    if layers[0].handed_on is not layers[0].hidden:
        call.equally_wide([layer.handed_on for layer in layers])
        for layer in layers:
            # torch tells a projection by its being narrower than the hidden units.
            call.at_least(layer.hidden, layer.handed_on.size + 1)
    return layers


def _layer(call: Call, weights: Sequence[fx.Node], has_biases: bool) -> _Layer:
    hidden, handed_on, read = _gates(call, weights[0], weights[1], weights[2:4] if has_biases else ())
    projections = weights[4:] if has_biases else weights[2:]
    for projection in projections:
        call.purpose(projection, out=0, in_=1)
        call.tie(hidden, call.axes(projection)[1])
        call.tie(call.axes(projection)[0], handed_on)
    if not projections:
        handed_on = call.tie(hidden, handed_on)
    return _Layer(hidden, handed_on, read)


def _gates(call: Call, w_ih: fx.Node, w_hh: fx.Node, biases: Sequence[fx.Node]) -> tuple[Axis, Axis, Axis]:
    """Tie the blocks of rows, one a gate; gives the axes of hidden units and of the columns of both weights."""
    call.one_layer((w_ih, w_hh))
    for weight in (w_ih, w_hh):
        call.purpose(weight, out=0, in_=1)
    for bias in biases:
        call.purpose(bias, bias=0)
    rows = [call.axes(weight)[0] for weight in (w_ih, w_hh, *biases)]
    recurrence = operator_of(call.node).recurrence
    assert recurrence is not None
    size = rows[0].size // recurrence.n_gates
    blocks = [call.algebra.take(row, slice(at, at + size)) for row in rows for at in range(0, row.size, size)]
    for block in blocks[1:]:
        call.tie(blocks[0], block)
    call.declare_role("hidden", blocks[0])
    return blocks[0], call.axes(w_hh)[1], call.axes(w_ih)[1]


def _tie_state(call: Call, state: fx.Node, layers: Sequence[Axis], batch: Axis) -> Axes:
    """Tie an initial state, one row a layer and direction, and give the axes of the final one.

    Where the state has one value throughout any positions of it can go, so it ties nothing but its size.
    """
    *_, width = given = call.raw_axes(state)
    call.fix(given[:1], "one row a recurrent layer and direction")
    call.tie(given[1], batch)
    for row, axis in enumerate(layers[:1] if _is_uniform(state) else layers):
        call.tie(axis, width.rows[row] if width.rows else width)
    n_rows = call.fixed_axis(len(layers), "one row a recurrent layer and direction")
    return (n_rows, batch, Axis(layers[0].units, tuple(layers)) if len(layers) > 1 else layers[0])


def _is_uniform(node: fx.Node) -> bool:
    """Return True if a value is the same at every position."""
    known = operator_of(node)
    return known.is_uniform or (known.keeps_values and _is_uniform(node.all_input_nodes[0]))


@operator_rule("aten.lstm_cell", operator=_cell_of(4))
@operator_rule("aten.gru_cell", operator=_cell_of(3))
@operator_rule("aten.rnn_tanh_cell", operator=_cell_of(1))
@operator_rule("aten.rnn_relu_cell", operator=_cell_of(1, has_zeros=True))
def _cell(call: Call) -> Result:
    """One step: input (batch, in), states (batch, hidden)."""
    x = call.axes("input")
    biases = [call.arg(name) for name in ("b_ih", "b_hh") if call.is_tensor(name)]
    hidden, again, read = _gates(call, call.arg("w_ih"), call.arg("w_hh"), biases)
    call.tie(hidden, again)
    call.tie(read, x[1])
    states = call.arg("hx")
    for state in states if isinstance(states, list | tuple) else [states]:
        call.tie(hidden, call.axes(state)[1])
        call.tie(x[0], call.axes(state)[0])
    result = (x[0], hidden)
    return [result, result] if isinstance(states, list | tuple) else result
