"""Normalisations: parameters lie along the channels; statistics over channels mix them."""

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import Result
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Norm, Operator, operator_of


def _tie_parameters(call: Call, axes: Axes) -> None:
    """Tie scale, shift and running statistics of a norm, each of which lies along some axes of its input."""
    norm = operator_of(call.node).norm
    assert norm is not None
    purposes = {norm.scale: "norm", norm.shift: "bias", norm.mean: "statistic", norm.variance: "statistic"}
    for name, purpose in purposes.items():
        if call.is_tensor(name):
            for dim, (axis, own) in enumerate(zip(axes, call.axes(name), strict=True)):
                call.tie(axis, own)
                call.purpose(name, **{purpose: dim})


@operator_rule(
    "aten.batch_norm",
    operator=Operator(norm=Norm(over="batch", channels=1, mean="running_mean", variance="running_var", own="training")),
)
@operator_rule(
    "aten.instance_norm",
    operator=Operator(
        norm=Norm(over="space", channels=1, mean="running_mean", variance="running_var", own="use_input_stats")
    ),
)
def _per_channel(call: Call) -> Axes:
    """Each channel has its own statistics. Those of the input itself mix its other axes, as those of a kernel do."""
    x = call.axes("input")
    _tie_parameters(call, x[1:2])
    if call.arg("training"):
        call.mix(x[0])
    call.mix(*x[2:])  # with running statistics in train mode only, in which the result must hold as well
    return x


@operator_rule("aten.layer_norm", "aten.rms_norm", operator=Operator(norm=Norm(over="features", channels=-1)))
def _over_last(call: Call) -> Axes:
    """Statistics run over the last axes, whose sizes the call names."""
    x = call.axes("input")
    n_normalized = len(call.arg("normalized_shape"))
    normalized = x[-n_normalized:]
    _tie_parameters(call, normalized)
    for i, axis in enumerate(normalized):
        call.edit_size("normalized_shape", axis, i)
    call.mix(*normalized)
    return x


@operator_rule("aten.group_norm", operator=Operator(norm=Norm(over="blocks", channels=1)))
def _over_groups(call: Call) -> Axes:
    """Statistics run over blocks of channels; blocks of one channel mix nothing and go with it."""
    x = call.axes("input")
    n_groups = int(call.arg("num_groups"))
    _tie_parameters(call, x[1:2])
    if n_groups == x[1].size:
        call.edit_size("num_groups", x[1])
    else:
        if n_groups > 1:
            call.balance(x[1], n_groups)
        call.mix(x[1])
    return x


@operator_rule("aten._weight_norm")
def _weight_norm(call: Call) -> Axes:
    """G * v / norm(v): one scale for each position of `dim`, one norm over all other axes."""
    v, g = call.axes("v"), call.axes("g")
    dim = call.dim("dim", len(v))
    call.tie(v[dim], g[dim])
    call.mix(*v)
    return v


@operator_rule("aten.renorm")
def _renorm(call: Call) -> Axes:
    """Each slice along one axis is scaled by its norm over all others."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    call.mix(*x[:dim], *x[dim + 1 :])
    return x


@operator_rule("aten.cummax", "aten.cummin")
def _running_extreme(call: Call) -> Result:
    """Values and where they stand; positions are meaningful only while the axis is whole."""
    x = call.axes("self")
    axis = x[call.dim("dim", len(x))]
    call.mix(axis)
    if any(user.args[1] == 1 and user.users for user in call.node.users):
        call.fix([axis], "positions along it are a result")
    return [x, x]


@operator_rule("aten.softmax", "aten._softmax", operator=Operator(has_softmax=True))
@operator_rule("aten.log_softmax", "aten._log_softmax", "aten.cumsum", "aten.cumprod", "aten.logcumsumexp")
def _along_one(call: Call) -> Axes:
    """The values along one axis depend on each other."""
    x = call.axes("self")
    call.mix(x[call.dim("dim", len(x))])
    return x


@operator_rule("aten.linalg_vector_norm", "aten.norm")
def _vector_norm(call: Call) -> Axes:
    x = call.axes("self")
    return reduce_axes(call, x, call.arg("dim"), bool(call.arg("keepdim")))


def reduce_axes(call: Call, x: Axes, dims: object, keepdim: bool) -> Axes:
    """Axes after a reduction over `dims` (None or empty: over all); what is reduced is mixed."""
    given = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, list | tuple) else []
    over = {dim % len(x) for dim in given} if given else set(range(len(x)))
    call.mix(*(x[dim] for dim in over))
    kept: list[Axis] = []
    for i, axis in enumerate(x):
        if i not in over:
            kept.append(axis)
        elif keepdim:
            kept.append(call.fixed_axis(1, "reduced"))
    return tuple(kept)
