"""Cost of a graph node in multiply-accumulate operations, from the shapes of its operands and result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchshear.graph._operator_record import Shape, operator_named


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
    """Count the multiply-accumulate operations of one operator call.

    Args:
        target: operator name, as in "aten.conv2d.default".
        operands: shapes of the tensor operands in order.
        result: shape of the result; a tuple of shapes for several results.

    Returns:
        The count for the whole batch; 0 for operators that are neither convolutions nor matrix products.
    """
    formula = operator_named(target).macs
    return formula(operands, result) if formula is not None else 0
