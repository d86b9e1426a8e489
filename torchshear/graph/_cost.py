"""Cost of a graph node in multiply-accumulate operations, from the shapes of its operands and result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

Shape = tuple[int, ...]
MacsRule = Callable[[Sequence[Shape], Any], int]  # the result is a tuple of shapes where there are several

_RULES: dict[str, MacsRule] = {}


@dataclass(frozen=True, slots=True)
class Cost:
    """Size and work of a model.

    Attributes:
        n_params: number of parameter elements, tied ones counted once.
        macs: multiply-accumulate operations of one sample (of the whole example where the batch is not free);
            convolutions and matrix products only, biases, norms and activations not counted.
    """

    n_params: int
    macs: int


def node_macs(target: str, operands: Sequence[Shape], result: Any) -> int:
    """Multiply-accumulate operations of one operator call.

    Args:
        target: operator name, as in "aten.conv2d.default".
        operands: shapes of the tensor operands in order.
        result: shape of the result; a tuple of shapes for several results.

    Returns:
        The count for the whole batch; 0 for operators that are neither convolutions nor matrix products.
    """
    name = ".".join(target.split(".")[:2])
    rule = _RULES.get(name)
    return rule(operands, result) if rule else 0


def _register(*names: str) -> Callable[[MacsRule], MacsRule]:
    def add(rule: MacsRule) -> MacsRule:
        for name in names:
            _RULES[f"aten.{name}"] = rule
        return rule

    return add


@_register("conv1d", "conv2d", "conv3d", "linear")
def _weight_per_position(operands: Sequence[Shape], result: Shape) -> int:
    """Every output value costs one product with each weight of its row."""
    return prod(result) * prod(operands[1][1:])


@_register("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _weight_per_input_position(operands: Sequence[Shape], result: Shape) -> int:
    return prod(operands[0]) * prod(operands[1][1:])


@_register("matmul", "mm", "bmm", "mv", "dot")
def _contraction(operands: Sequence[Shape], result: Shape) -> int:
    return prod(result) * operands[0][-1]


@_register("addmm", "baddbmm")
def _added_contraction(operands: Sequence[Shape], result: Shape) -> int:
    return prod(result) * operands[1][-1]


@_register("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(operands: Sequence[Shape], result: Any) -> int:
    """Every matrix is read once a step and sample; operands of rank 3 are input and states, of rank 1 biases."""
    return prod(operands[0][:2]) * sum(prod(shape) for shape in operands if len(shape) == 2)


@_register("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _recurrent_cell(operands: Sequence[Shape], result: Any) -> int:
    """Both matrices are read once a sample; operands of rank 2 before them are input and states."""
    matrices = [shape for shape in operands if len(shape) == 2][-2:]
    return operands[0][0] * sum(prod(shape) for shape in matrices)


@_register("scaled_dot_product_attention")
def _attention(operands: Sequence[Shape], result: Shape) -> int:
    query, key, value = operands[:3]
    return prod(query) * key[-2] + prod(query[:-1]) * key[-2] * value[-1]
