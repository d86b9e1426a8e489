"""Convolutions of any rank, plain, grouped, depthwise and transposed."""

from collections.abc import Sequence
from math import prod

from torch import fx

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._registry import operator_rule
from torchshear.dependency.rules._role_evidence import Kind
from torchshear.graph._operator_record import Operator, Product, Shape


def _macs(operands: Sequence[Shape], result: Shape) -> int:
    """Count for every output value one product with each weight of its row."""
    return prod(result) * prod(operands[1][1:])


def _macs_transposed(operands: Sequence[Shape], result: Shape) -> int:
    """Count for every input value one product with each weight that reads it."""
    return prod(operands[0]) * prod(operands[1][1:])


def _plain_layer(n_space: int) -> Operator:
    channel = -1 - n_space
    layer = Product(left="input", right="weight", bias="bias", contracted=(channel, 1), channels=channel)
    return Operator(product=layer, macs=_macs)


def _transposed_layer(n_space: int) -> Operator:
    channel = -1 - n_space
    layer = Product(left="input", right="weight", bias="bias", contracted=(channel, 0), channels=channel)
    return Operator(product=layer, macs=_macs_transposed)


@operator_rule("aten.conv1d", operator=_plain_layer(1))
@operator_rule("aten.conv2d", operator=_plain_layer(2))
@operator_rule("aten.conv3d", operator=_plain_layer(3))
def _convolution(call: Call) -> Axes:
    """Weight is (out, in / groups, *kernel)."""
    x, weight = call.axes("input"), call.axes("weight")
    channel = len(x) - len(weight) + 1
    groups = x[channel].size // weight[1].size
    kind: Kind = "convolution"
    _mix_if_computed(call, x[channel])
    if call.arg("groups") == 1:
        call.purpose("weight", out=0, in_=1)
        call.tie(weight[1], x[channel])
    elif weight[1].size == 1:
        _depthwise(call, x[channel], weight[0], groups)
        kind = "depthwise"
    elif isinstance(call.arg("groups"), fx.Node):
        call.tie(_alike_groups(call, x[channel], groups)[1], weight[1])
        _alike_groups(call, weight[0], groups)
    else:
        _relate_groups(call, x[channel], weight, groups)
    return _finish(call, x, channel, weight[0], kind)


@operator_rule("aten.conv_transpose1d", operator=_transposed_layer(1))
@operator_rule("aten.conv_transpose2d", operator=_transposed_layer(2))
@operator_rule("aten.conv_transpose3d", operator=_transposed_layer(3))
def _transposed_convolution(call: Call) -> Axes:
    """Weight is (in, out / groups, *kernel)."""
    x, weight = call.axes("input"), call.axes("weight")
    channel = len(x) - len(weight) + 1
    groups = call.out_shape[channel] // weight[1].size
    call.purpose("weight", in_=0, out=1)
    kind: Kind = "convolution"
    _mix_if_computed(call, x[channel])
    if call.arg("groups") == 1:
        call.tie(weight[0], x[channel])
        out = weight[1]
    elif groups == weight[0].size:
        call.tie(weight[0], x[channel])
        call.edit_size("groups", x[channel])
        out = weight[0] if weight[1].size == 1 else call.algebra.merge(weight[:2])
        kind = "depthwise"
    elif not _is_own_weight(call):
        blocks, inside = _alike_groups(call, x[channel], groups)
        call.tie(inside, _alike_groups(call, weight[0], groups)[1])
        out = call.algebra.merge((blocks, weight[1]))
    else:
        out = _relate_transposed_groups(call, x[channel], weight, groups)
    return _finish(call, x, channel, out, kind)


@operator_rule("aten.conv_tbc")
def _time_first(call: Call) -> Axes:
    """Input (time, batch, in), weight (kernel, in, out)."""
    x, weight = call.axes("self"), call.axes("weight")
    call.purpose("weight", in_=1, out=2)
    call.purpose("bias", bias=0)
    call.tie(weight[1], x[2])
    call.tie(weight[2], call.axes("bias")[0])
    call.fix(weight[:1], "size of a kernel")
    call.fix(x[:1], "space that a kernel slides over")
    return (call.fixed_axis(call.out_shape[0], "space"), x[1], weight[2])


def _finish(call: Call, x: Axes, channel: int, out: Axis, kind: Kind) -> Axes:
    """Tie the bias, fix the kernel and the space that it slides over, and put the result together."""
    call.contract((call.arg("input"), call.arg("weight")), (x[channel],), ((), (out,)), kind=kind)
    if call.is_tensor("bias"):
        call.tie(out, call.axes("bias")[0])
        call.purpose("bias", bias=0)
    call.fix(call.axes("weight")[2:], "size of a kernel")
    return (*x[:channel], out, *(_space(call, axis, i) for i, axis in enumerate(x[channel + 1 :])))


def _space(call: Call, axis: Axis, i: int) -> Axis:
    """Spatial axis i of the result: that of the input where the kernel looks at one place at a time."""
    kernel, strides = call.shape("weight")[2 + i], set(call.arg("stride"))
    size = call.out_shape[len(call.out_shape) - len(call.shape("weight")) + 2 + i]
    if call.arg("output_padding") is None and kernel == 1 and strides == {1} and size == axis.size:
        return axis
    call.fix([axis], "space that a kernel slides over")
    return call.fixed_axis(size, "space")


def _mix_if_computed(call: Call, channels: Axis) -> None:
    """A weight that is computed need not be zero where what it is computed from is."""
    if call.state_name("weight") is None:
        call.mix(channels)


def _alike_groups(call: Call, axis: Axis, groups: int) -> tuple[Axis, Axis]:
    """Groups, and the channels inside, of a dimension of which every group loses the same ones.

    Such are the samples of a batch, each convolved with filters that are computed for it.
    """
    blocks, channels = call.algebra.factor(axis, (groups, axis.size // groups))
    call.fix([blocks], "groups of a convolution whose weight is computed or shared")
    return blocks, channels


def _depthwise(call: Call, channels: Axis, out: Axis, groups: int) -> None:
    """Each input channel has its own outputs: one, or a multiplier that is a factor of its own."""
    call.purpose("weight", depthwise=0)
    if out.size == groups:
        call.tie(channels, out)
    else:
        per_channel, _ = call.algebra.factor(out, (groups, out.size // groups))
        call.tie(channels, per_channel)
    call.edit_size("groups", channels)


def _relate_groups(call: Call, channels: Axis, weight: Axes, groups: int) -> None:
    """Each group may keep channels of its own choice, but all groups equally many."""
    call.purpose("weight", out=0, in_=1)
    call.balance(weight[0], groups)
    if _is_own_weight(call):
        call.balance(channels, groups)
        call.fix(weight[1:2], "input channels inside a group")
        call.block("weight", 1, channels, groups)
    else:
        call.tie(_alike_groups(call, channels, groups)[1], weight[1])


def _relate_transposed_groups(call: Call, channels: Axis, weight: Axes, groups: int) -> Axis:
    call.balance(weight[0], groups)
    call.tie(weight[0], channels)
    out = call.algebra.fresh(groups * weight[1].size)
    call.balance(out, groups)
    call.fix(weight[1:2], "output channels inside a group")
    call.block("weight", 1, out, groups)
    return out


def _is_own_weight(call: Call) -> bool:
    """Return True if only calls of this operator read the weight, a parameter, so that its blocks can differ."""
    weight = call.arg("weight")
    return call.state_name(weight) is not None and all(
        user.target is call.node.target and user.args[1] is weight for user in weight.users
    )
