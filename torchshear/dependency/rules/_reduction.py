"""Operators that reduce axes to one value, or order the values along one."""

from torchshear.dependency.algebra._axis import Axes
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._elementwise import broadcast
from torchshear.dependency.rules._findings import Result
from torchshear.dependency.rules._normalization import reduce_axes
from torchshear.dependency.rules._registry import operator_rule


@operator_rule(
    "aten.all",
    "aten.amax",
    "aten.amin",
    "aten.any",
    "aten.count_nonzero",
    "aten.linalg_matrix_norm",
    "aten.linalg_norm",
    "aten.logsumexp",
    "aten.mean",
    "aten.median.default",
    "aten.nanmean",
    "aten.nanmedian.default",
    "aten.nansum",
    "aten.prod",
    "aten.std",
    "aten.sum",
    "aten.var",
)
def _reduce(call: Call) -> Axes:
    return reduce_axes(call, call.axes("self"), call.arg("dim"), bool(call.arg("keepdim")))


@operator_rule("aten.var_mean", "aten.std_mean", "aten.aminmax")
def _reduce_to_two(call: Call) -> Result:
    axes = reduce_axes(call, call.axes("self"), call.arg("dim"), bool(call.arg("keepdim")))
    return [axes, axes]


@operator_rule("aten.quantile", "aten.nanquantile")
def _quantile(call: Call) -> Axes:
    """One value, or with a vector of quantiles a new first dimension of them."""
    axes = reduce_axes(call, call.axes("self"), call.arg("dim"), bool(call.arg("keepdim")))
    return (*call.axes("q"), *axes) if call.is_tensor("q") else axes


@operator_rule("aten.median.dim", "aten.nanmedian.dim", "aten.mode")
def _extreme_with_position(call: Call) -> Result:
    """Values and the positions at which they stand; positions are meaningful only while the axis is whole."""
    x = call.axes("self")
    dim = int(call.arg("dim"))
    if any(user.args[1] == 1 and user.users for user in call.node.users):
        call.fix([x[dim % len(x)]], "positions along it are a result")
    axes = reduce_axes(call, x, dim, bool(call.arg("keepdim")))
    return [axes, axes]


@operator_rule("aten.max.default", "aten.min.default")
def _extreme(call: Call) -> Axes:
    return reduce_axes(call, call.axes("self"), None, False)


@operator_rule("aten.kthvalue")
def _kth(call: Call) -> Result:
    x, dim = call.axes("self"), int(call.arg("dim"))
    call.fix([x[dim % len(x)]], "its k-th value is taken")
    axes = reduce_axes(call, x, dim, bool(call.arg("keepdim")))
    return [axes, axes]


@operator_rule("aten.sort", "aten.argsort")
def _sorted(call: Call) -> Result:
    """Positions along one axis change places with the data; all other axes pass."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    call.fix([x[dim]], "its positions are sorted")
    shape = call.out_shape[0] if isinstance(call.out_shape[0], tuple) else call.out_shape
    axes = (*x[:dim], call.fixed_axis(shape[dim], "sorted positions"), *x[dim + 1 :])
    return [axes, axes] if isinstance(call.out_shape[0], tuple) else axes


@operator_rule("aten.trapezoid.dx", "aten.diff")
def _neighbours(call: Call) -> Axes:
    """Each position is related to the next one along an axis."""
    operands = [call.axes(node) for node in call.tensor_args]
    dim = call.dim("dim", len(operands[0]))
    call.fix([axes[dim] for axes in operands], "its neighbours are compared")
    for axes in operands[1:]:
        for i, axis in enumerate(axes):
            if i != dim:
                call.tie(operands[0][i], axis)
    x = operands[0]
    left = (call.fixed_axis(call.out_shape[dim], "differences"),) if "diff" in str(call.node.target) else ()
    return (*x[:dim], *left, *x[dim + 1 :])


@operator_rule("aten.cosine_similarity", "aten.linalg_vecdot", "aten.pairwise_distance")
def _compare(call: Call) -> Axes:
    """Two values are compared along one axis, which goes; others are broadcast."""
    operands = [call.axes(node) for node in call.tensor_args]
    rank = max(len(axes) for axes in operands)
    shape = [max(axes[-back].size for axes in operands if len(axes) >= back) for back in range(rank, 0, -1)]
    both = broadcast(call, operands, shape)
    return reduce_axes(call, both, -1 if call.arg("dim") is None else call.arg("dim"), bool(call.arg("keepdim")))


@operator_rule("aten.cdist")
def _distances(call: Call) -> Axes:
    """Distances of each of P rows to each of R: (..., P, M) and (..., R, M) give (..., P, R)."""
    left, right = call.axes("x1"), call.axes("x2")
    call.mix(call.tie(left[-1], right[-1]))
    return (*broadcast(call, [left[:-2], right[:-2]], call.out_shape[:-2]), left[-2], right[-2])
