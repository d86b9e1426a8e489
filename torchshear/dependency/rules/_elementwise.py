"""Operators that compute each value from the values at the same position, and those that leave values alone."""

from collections.abc import Sequence

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Operator, describe_operator


def broadcast(call: Call, operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """Tie operands aligned at their last dimension; an operand of size 1 is repeated and restricts nothing."""
    result: list[Axis] = []
    for back in range(len(shape), 0, -1):
        aligned = [axes[-back] for axes in operands if len(axes) >= back and axes[-back].size == shape[-back]]
        if not aligned:
            result.append(call.fixed_axis(shape[-back]))
            continue
        for other in aligned[1:]:
            call.tie(aligned[0], other)
        result.append(aligned[0])
    return tuple(result)


# Elementwise operators that torch does not tag as such are named beside the word that stands for the tag.
@operator_rule(
    "torchshear.pointwise",
    "aten.__and__",
    "aten.__or__",
    "aten.__xor__",
    "aten.complex",
    "aten.floor_divide",
    "aten.fmod",
    "aten.isclose",
    "aten.isnan",
    "aten.masked_fill.Tensor",
    "aten.masked_fill_",
    "aten.polar",
    "aten.remainder",
    "aten.round",
    "aten.where.Scalar",
    "aten.where.ScalarOther",
    "aten.where.ScalarSelf",
    operator=Operator(is_pointwise=True),
)
def pointwise(call: Call) -> Axes:
    """Tie the axes of all operands, aligned at the last dimension."""
    return broadcast(call, [call.axes(node) for node in call.tensor_args], call.out_shape)


describe_operator("aten.add", "aten.add_", "aten.sub", "aten.sub_", operator=Operator(is_pointwise=True, is_sum=True))
describe_operator("aten.lift_fresh", operator=Operator(passes="copy"))  # a number in the code as a tensor


@operator_rule(
    "aten.alias",
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.detach_",
    "aten.lift_fresh_copy",
    operator=Operator(passes="copy"),
)
@operator_rule("aten.to", "aten._to_copy", "aten.type_as", operator=Operator(passes="conversion"))
@operator_rule(
    "aten.alpha_dropout",
    "aten.alpha_dropout_",
    "aten.dropout",
    "aten.dropout_",
    "aten.feature_dropout",
    "aten.feature_alpha_dropout",
    "aten.feature_alpha_dropout_",
    "aten.feature_dropout_",
    operator=Operator(passes="dropout"),
)
@operator_rule("aten.full_like", "aten.ones_like", "aten.zeros_like", operator=Operator(is_uniform=True))
@operator_rule("aten.empty_like", "aten.fill_", "aten.imag", "aten.real", "aten.zero_")
def _same_axes(call: Call) -> Axes:
    return call.axes(call.tensor_args[0])


@operator_rule("aten.copy_")
def _copy(call: Call) -> Axes:
    return broadcast(call, [call.axes("self"), call.axes("src")], call.out_shape)


@operator_rule("aten.glu")
def _glu(call: Call) -> Axes:
    """The first half of an axis is gated by the second half, position by position."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    half = x[dim].size // 2
    value, gate = call.algebra.take(x[dim], slice(0, half)), call.algebra.take(x[dim], slice(half, None))
    return (*x[:dim], call.tie(value, gate), *x[dim + 1 :])
