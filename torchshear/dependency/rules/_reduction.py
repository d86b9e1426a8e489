"""Operators that reduce axes to one value, or order the values along one."""

from torchshear.dependency._axis import Axes
from torchshear.dependency._call import Call, Result
from torchshear.dependency._registry import operator_rule
from torchshear.dependency.rules._normalization import reduced


@operator_rule(
    "aten.all",
    "aten.amax",
    "aten.amin",
    "aten.any",
    "aten.logsumexp",
    "aten.mean",
    "aten.prod",
    "aten.std",
    "aten.sum",
    "aten.var",
)
def _reduce(call: Call) -> Axes:
    return reduced(call, call.axes("self"), call.arg("dim"), bool(call.arg("keepdim")))


@operator_rule("aten.max.dim", "aten.min.dim")
def _extreme_with_position(call: Call) -> Result:
    """Values and the positions at which they stand; positions are meaningful only while the axis is whole."""
    x = call.axes("self")
    dim = int(call.arg("dim"))
    if any(user.args[1] == 1 and user.users for user in call.node.users):
        call.fix([x[dim % len(x)]], "positions along it are a result")
    axes = reduced(call, x, dim, bool(call.arg("keepdim")))
    return [axes, axes]


@operator_rule("aten.max.default", "aten.min.default")
def _extreme(call: Call) -> Axes:
    return reduced(call, call.axes("self"), None, False)


@operator_rule("aten.argmax", "aten.argmin")
def _position(call: Call) -> Axes:
    x, dim = call.axes("self"), call.arg("dim")
    call.fix(x if dim is None else [x[dim % len(x)]], "positions along it are the result")
    return reduced(call, x, dim, bool(call.arg("keepdim")))
