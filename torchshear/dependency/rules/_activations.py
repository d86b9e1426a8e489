"""Activations: elementwise functions behind layers, and what of their results is zero."""

from torchshear.dependency.algebra._axis import Axes
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._elementwise import pointwise
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Activation, Operator, describe_operator

_SMOOTH = Operator(is_pointwise=True, activation=Activation())
_WITH_ZEROS = Operator(is_pointwise=True, activation=Activation(has_zeros=True))
_RELU = Operator(is_pointwise=True, activation=Activation(has_zeros=True, is_nonnegative=True))
_SIGMOID = Operator(is_pointwise=True, activation=Activation(is_nonnegative=True))


def _clamp(lower_bound: str) -> Operator:
    return Operator(is_pointwise=True, activation=Activation(lower_bound=lower_bound))


# torch tags most of them as elementwise, which is their rule; the others are given it here.
describe_operator("aten.relu", "aten.relu_", "aten.relu6", "aten.hardsigmoid", "aten.hardsigmoid_", operator=_RELU)
describe_operator("aten.threshold", "aten.hardshrink", "aten.softshrink", operator=_WITH_ZEROS)
describe_operator("aten.sigmoid", "aten.sigmoid_", operator=_SIGMOID)
describe_operator("aten.clamp", "aten.clamp_", "aten.clamp_min", "aten.clamp_min_", operator=_clamp("min"))
describe_operator("aten.hardtanh", "aten.hardtanh_", operator=_clamp("min_val"))
describe_operator(
    "aten.celu",
    "aten.elu",
    "aten.elu_",
    "aten.gelu",
    "aten.leaky_relu",
    "aten.leaky_relu_",
    "aten.logit",
    "aten.mish",
    "aten.rrelu",
    "aten.selu",
    "aten.selu_",
    "aten.silu",
    "aten.silu_",
    "aten.softplus",
    "aten.tanh",
    "aten.tanh_",
    operator=_SMOOTH,
)
operator_rule("aten.relu6_", operator=_RELU)(pointwise)
operator_rule("aten.hardswish", "aten.hardswish_", "aten.threshold_", operator=_WITH_ZEROS)(pointwise)
operator_rule("aten.gelu_", "aten.log_sigmoid", "aten.mish_", operator=_SMOOTH)(pointwise)


@operator_rule("aten.prelu", operator=Operator(activation=Activation()))
def _prelu(call: Call) -> Axes:
    """One slope a channel: the weight lies along dimension 1 of the input, whatever follows."""
    x, weight = call.axes("self"), call.axes("weight")
    if len(weight) == 1 and len(x) > 1 and weight[0].size > 1:
        call.tie(x[1], weight[0])
    return x
