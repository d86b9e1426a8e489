"""Operators that compute each value from the values at the same position, and those that leave values alone."""

from collections.abc import Sequence

from torchshear.dependency._axis import Axes, Axis
from torchshear.dependency._call import Call
from torchshear.dependency._registry import operator_rule


def broadcast(call: Call, operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """Tie operands aligned at their last dimension; an operand of size 1 is repeated and restricts nothing."""
    result: list[Axis] = []
    for back in range(len(shape), 0, -1):
        aligned = [axes[-back] for axes in operands if len(axes) >= back and axes[-back].size == shape[-back]]
        if not aligned:
            result.append(call.fixed(shape[-back]))
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
    "aten.gelu_",
    "aten.hardswish",
    "aten.hardswish_",
    "aten.isclose",
    "aten.isnan",
    "aten.log_sigmoid",
    "aten.masked_fill.Tensor",
    "aten.masked_fill_",
    "aten.mish_",
    "aten.polar",
    "aten.relu6_",
    "aten.remainder",
    "aten.round",
    "aten.threshold_",
    "aten.where.Scalar",
    "aten.where.ScalarOther",
    "aten.where.ScalarSelf",
)
def _pointwise(call: Call) -> Axes:
    return broadcast(call, [call.axes(node) for node in call.tensor_args], call.out_shape)


@operator_rule(
    "aten.alias",
    "aten.alpha_dropout",
    "aten.alpha_dropout_",
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.detach_",
    "aten.dropout",
    "aten.dropout_",
    "aten.empty_like",
    "aten.feature_dropout",
    "aten.feature_alpha_dropout",
    "aten.feature_alpha_dropout_",
    "aten.feature_dropout_",
    "aten.fill_",
    "aten.full_like",
    "aten.imag",
    "aten.lift_fresh_copy",
    "aten.ones_like",
    "aten.real",
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "aten.zero_",
    "aten.zeros_like",
)
def _same_axes(call: Call) -> Axes:
    return call.axes(call.tensor_args[0])


@operator_rule("aten.copy_")
def _copy(call: Call) -> Axes:
    return broadcast(call, [call.axes("self"), call.axes("src")], call.out_shape)


@operator_rule("aten.prelu")
def _prelu(call: Call) -> Axes:
    """One slope a channel: the weight lies along dimension 1 of the input, whatever follows."""
    x, weight = call.axes("self"), call.axes("weight")
    if len(weight) == 1 and len(x) > 1 and weight[0].size > 1:
        call.tie(x[1], weight[0])
    return x


@operator_rule("aten.glu")
def _glu(call: Call) -> Axes:
    """The first half of an axis is gated by the second half, position by position."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    half = x[dim].size // 2
    value, gate = call.algebra.take(x[dim], slice(0, half)), call.algebra.take(x[dim], slice(half, None))
    return (*x[:dim], call.tie(value, gate), *x[dim + 1 :])
